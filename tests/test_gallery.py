"""The gallery: what its script picks and lays out, on made tensors, and that pages show all pictures that there are."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from protoseg.data import Scenes

for package in ("matplotlib", "accelerate", "open_clip", "tyro"):
    pytest.importorskip(package, reason="the extra recipes is not installed")

ROOT = Path(__file__).parents[1]
STATIC = ROOT / "docs" / "_static"
COPIES = ("benchmarks", "notebooks")  # what building the site leaves in docs
TINY = "--train-scenes 12 --eval-scenes 4 --seed 0 --device cpu"


@pytest.fixture
def gallery(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script; what it imports lies beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_gallery")


@pytest.fixture
def sheets(gallery: Any) -> Any:
    return importlib.import_module("sheets")


def plain(*colors: tuple[int, int, int], side: int = 8) -> list[Tensor]:
    """Pictures of one color each."""
    return [torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, side, side) for color in colors]


def test_best_median_and_worst_are_told_by_score(gallery: Any) -> None:
    scores = {"a": 0.5, "b": 0.9, "c": 0.1, "d": 0.7, "e": 0.2}
    assert gallery.rank(scores) == {"best": "b", "median": "a", "worst": "c"}
    assert gallery.rank({"only": 0.3}) == dict.fromkeys(("best", "median", "worst"), "only")


def test_the_nearest_come_first_and_what_is_missing_does_not_come(gallery: Any) -> None:
    distances = torch.tensor([3.0, torch.inf, 1.0, 2.0, torch.inf])
    assert gallery.nearest(distances, 2) == [2, 3]
    assert gallery.nearest(distances, 5) == [2, 3, 0]


def test_a_prototype_counts_what_it_is_nearest_to(gallery: Any) -> None:
    distances = torch.tensor([[1.0, 5.0, 1.0, torch.inf], [2.0, 4.0, 3.0, torch.inf], [9.0, 9.0, 9.0, torch.inf]])
    assert gallery.counts(distances) == [2, 1, 0]


def test_collapsed_prototypes_share_a_row(gallery: Any) -> None:
    pictures = Scenes(3, size=64)
    shares = torch.rand(3, 64, 2, generator=torch.Generator().manual_seed(0))
    shares = torch.cat([shares, shares[..., :1]], -1)
    rows = gallery.nearest_patches(shares, pictures, (8, 8))
    assert list(rows) == ["prototype 1, 3", "prototype 2"]
    assert all(len(images) == 3 for images in rows.values())

    # The first patch is that of the largest share, with its neighbors.
    index, patch = divmod(int(shares[..., 1].argmax()), 64)
    row, column = (min(max(each - 1, 0), 5) * 8 for each in divmod(patch, 8))
    wanted = pictures[index].image[:, row : row + 24, column : column + 24]
    assert torch.equal(rows["prototype 2"][0], wanted)


def test_patches_at_the_border_are_as_large_as_others(gallery: Any) -> None:
    image = torch.arange(3 * 64 * 64).view(3, 64, 64)
    for index in (0, 7, 27, 56, 63):
        assert gallery.patch_of(image, index, (8, 8)).shape == (3, 24, 24)
    assert torch.equal(gallery.patch_of(image, 63, (8, 8)), image[:, 40:, 40:])


def test_a_sheet_has_each_picture_in_its_place(sheets: Any) -> None:
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    rows = [plain(red, green), plain(blue)]
    found = sheets.sheet(rows, (90, 60), headings=["one", "two"], labels=["first", "second"])
    line, gap = sheets.LINE, sheets.GAP
    assert found.size == (180 + gap, line + 2 * (line + 60) + gap)

    def at(column: int, row: int) -> Any:
        return found.getpixel((column * (90 + gap) + 45, line + row * (line + 60 + gap) + line + 30))

    assert [at(0, 0), at(1, 0), at(0, 1), at(1, 1)] == [red, green, blue, (255, 255, 255)]
    # Words are black, and stand above what they are about.
    words = [found.crop((0, top, found.width, top + line)) for top in (0, line, 2 * line + 60 + gap)]
    assert all(area.convert("L").getextrema() == (0, 255) for area in words)


def test_a_mask_stays_sharp_where_its_picture_grows(sheets: Any) -> None:
    mask = torch.zeros(8, 8, dtype=torch.uint8)
    mask[:, 4:] = 1
    (image,) = plain((200, 200, 200))
    found = sheets.resized(image, (80, 80), mask)
    assert torch.equal(found[:, :, :39], torch.full((3, 80, 39), 200, dtype=torch.uint8))
    assert len(found[:, :, 42:].flatten(1).unique(dim=1).T) == 1
    assert sheets.resized(image, (80, 80), torch.rand(4, 4)).shape == (3, 80, 80)


def test_a_frame_leaves_the_picture_in_it(gallery: Any) -> None:
    (image,) = plain((10, 20, 30))
    found = gallery.framed(image, (255, 0, 0))
    assert found[:, 0, 60].tolist() == found[:, 60, -1].tolist() == [255, 0, 0]
    assert found[:, 60, 60].tolist() == [10, 20, 30]


def test_a_finished_run_is_not_made_again(gallery: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []
    monkeypatch.setattr(gallery.cli, "main", made.append)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "metrics.json").write_text("{}", encoding="utf-8")
    gallery.make(tmp_path / "there", "train cpal")
    gallery.make(tmp_path / "new", "train cpal --seed 3")
    assert made == [["train", "cpal", "--seed", "3", "--output", str(tmp_path / "new"), "--resume"]]


def test_the_script_writes_what_the_page_shows(gallery: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With little to show in the place of the runs."""
    image = Scenes(1, size=32)[0].image
    example = gallery.Example("best", image, {"map": torch.rand(4, 4), "mask": torch.ones(32, 32, dtype=torch.uint8)})
    bars = gallery.Bars("one", ["a", "b"], {"x": [1, 2], "y": [2, 1]})
    shown = gallery.Shown([example], {"prototype": [image]}, [bars])
    for method in ("cpal", "vpl", "pgseg"):
        monkeypatch.setattr(gallery, f"show_{method}", lambda folder: shown)
    monkeypatch.setattr(gallery, "show_prototypes", lambda folder: shown.nearest)
    monkeypatch.setattr(gallery, "make", lambda folder, command: None)
    history = [{"prototypes": {"image 1 prototype cosine": 0.5, "image 1 prototypes in use": 7.0}}] * 2
    monkeypatch.setattr(gallery, "read_json", lambda path: {"history": history})

    gallery.main(["--runs", str(tmp_path / "runs"), "--output", str(tmp_path)])
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {path.name for path in STATIC.glob("gallery-*")}
    page = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    assert written == set(re.findall(r"\(_static/(gallery-[^)]+)\)", page))


def test_pages_show_every_picture_and_no_other() -> None:
    pages = [page for page in (ROOT / "docs").rglob("*.md") if page.relative_to(ROOT / "docs").parts[0] not in COPIES]
    shown = {name for page in pages for name in re.findall(r"_static/([\w.-]+)\)", page.read_text(encoding="utf-8"))}
    there = {path.name for path in STATIC.iterdir() if path.suffix in (".jpg", ".png", ".svg")}
    assert len(there) > 10
    assert shown == there


def test_pictures_are_small_and_fit_a_page() -> None:
    pictures = [*STATIC.glob("*.jpg"), *STATIC.glob("*.png")]
    assert sum(path.stat().st_size for path in pictures) < 1.5e6
    for path in pictures:
        with Image.open(path) as picture:
            assert 700 <= picture.width <= 800, path.name


@pytest.mark.slow
def test_the_script_makes_runs_and_their_pictures(
    gallery: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pgseg = f"train pgseg {TINY} --epochs 2"
    runs = {
        "cpal": f"train cpal --stages classify seeds refine {TINY} --epochs 2 --backbone small:8",
        "vpl": f"train vpl --stages prototypes seeds refine {TINY} --cache {tmp_path} --clip-scenes 64 --clip-steps 2",
        "pgseg": pgseg,
        "pgseg-0.1": f"{pgseg} --npr-options bandwidth=0.1",
        "pgseg-1": f"{pgseg} --npr-options bandwidth=1",
    }
    assert runs.keys() == gallery.RUNS.keys()
    monkeypatch.setattr(gallery, "RUNS", runs)
    output = tmp_path / "pictures"
    output.mkdir()
    gallery.main(["--runs", str(tmp_path / "runs"), "--output", str(output)])
    assert {path.name for path in output.iterdir()} == {path.name for path in STATIC.glob("gallery-*")}
    for path in output.iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 100
            assert len(picture.convert("RGB").getcolors(2**24)) > 20
