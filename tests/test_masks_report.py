"""The page that ``protoseg masks`` leaves for people with true masks and for people without."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import folders
from tests.trainer import masks as read_masks
from tests.trainer import read

from protoseg.data import Scenes, save_mask  # isort: skip
from protoseg.metrics import ConfusionMatrix  # isort: skip
from protoseg.recipes import masks, pseudo_masks  # isort: skip

QUICK = ["--device", "cpu", "--preset", "scenes", "--size", "48", "--crop", "48", "--backbone", "small:8"]
QUICK += ["--epochs", "1", "--batch", "12", "--refine", "none"]
MASKED = 7  # pictures with a true mask, of 24


def scenes() -> list[folders.Item]:
    """24 made scenes; one is not tagged at all."""
    source = Scenes(24, size=48)
    found = []
    for sample in map(source.__getitem__, range(24)):
        assert sample.mask is not None
        pixels = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
        tags = tuple(tag for tag, here in zip(source.classes, sample.labels, strict=True) if here)
        found.append(folders.Item(sample.id, pixels, tags, sample.mask.numpy()))
    return [found[0]._replace(tags=()), *found[1:]]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without true masks, with one broken picture; not to be changed."""
    root = tmp_path_factory.mktemp("with out")
    given = scenes()
    flags = folders.plain(root, given, Scenes(1).classes)
    torn = root / "in" / f"{given[5].name}.png"
    torn.write_bytes(torn.read_bytes()[:200])
    masks.main([*flags, "--output", str(root / "out"), *QUICK, "--skip-broken"])
    return root


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with true masks for some of the pictures; not to be changed."""
    root = tmp_path_factory.mktemp("scored")
    given = scenes()
    flags = folders.plain(root, given, Scenes(1).classes)
    (root / "classes.txt").write_text("\n".join(["background", *Scenes(1).classes]))
    (root / "truth").mkdir()
    for item in given[1 : MASKED + 1]:
        save_mask(root / "truth" / f"{item.name}.png", item.mask)
    truth = ["--true-masks", str(root / "truth"), "--classes", str(root / "classes.txt")]
    masks.main([*flags, *truth, "--output", str(root / "out"), *QUICK])
    return root


def page(root: Path) -> str:
    return (root / "out" / "report.html").read_text(encoding="utf-8")


def text(html: str) -> str:
    return " ".join(re.sub(r"<style.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL).split())


def section(html: str, name: str) -> str:
    return html[html.index(f'<section id="{name}"') :].partition("</section>")[0]


def test_without_masks_the_pictures_come_first_and_no_score_anywhere(without: Path) -> None:
    html = page(without)
    assert re.findall(r'<section id="([\w-]+)"', html)[:3] == ["pictures", "masks", "left-out"]
    assert "IoU" not in text(html)
    assert "There are no true masks" in text(html)
    metrics = read(without / "out")
    assert metrics["counted"] == {"train": {"pictures": 23, "scored": 0}}
    assert metrics["trivial"] == {}


def test_every_class_that_was_found_is_among_the_large_pictures(without: Path) -> None:
    html = page(without)
    classes = (without / "out" / "classes.txt").read_text().split("\n")[1:-1]
    found = {int(value) for mask in read_masks(without / "out" / "pseudo_masks").values() for value in np.unique(mask)}
    assert found - {0}, "a run that finds nothing shows nothing here"
    written = set(re.findall(r"<text [^>]*>([^<]+)</text>", section(html, "pictures")))
    assert written == {classes[value - 1] for value in found - {0}}


def test_the_numbers_are_those_of_the_masks(without: Path) -> None:
    found = read_masks(without / "out" / "pseudo_masks")
    entry = read(without / "out")["pseudo_masks"]["train"]
    empty = [name for name, mask in found.items() if not mask.any()]
    assert (entry["count"], entry["empty"], entry["untagged"]) == (23, len(empty), 1)
    share = float(np.mean([(mask > 0).mean() for mask in found.values()]))
    assert entry["foreground"] == pytest.approx(share)
    assert set(entry["empties"]) == {*empty} - {scenes()[0].name}
    shown = text(section(page(without), "masks"))
    assert f"23 masks {len(empty)} empty, 1 of them without a tag {100 * share:.1f} %" in shown
    classes = (without / "out" / "classes.txt").read_text().split("\n")[1:-1]
    for place, name in enumerate(classes, 1):
        inside = [(mask == place).mean() for mask in found.values() if (mask == place).any()]
        assert entry["classes"][name]["found"] == len(inside)
        tagged = sum(name in item.tags for number, item in enumerate(scenes()) if number != 5)
        assert entry["classes"][name]["tagged"] == tagged
        if inside:
            assert entry["classes"][name]["share"] == pytest.approx(float(np.mean(inside)))


def test_what_was_left_out_stands_with_its_reason(without: Path) -> None:
    shown = text(section(page(without), "left-out"))
    assert "1 picture cannot be used" in shown
    assert scenes()[5].name in shown
    (fault,) = read(without / "out")["survey"]["faults"]
    assert fault in shown


def test_the_command_can_be_copied_and_deletes_nothing(without: Path) -> None:
    run = section(page(without), "run")
    line = text(run[run.index("<pre") : run.index("</pre>")])
    assert line.startswith(
        f"protoseg masks &#39;{without / 'in'}&#39; --tags &#39;{without / 'tags.csv'}&#39; --output"
    )
    assert line.endswith("--skip-broken")
    assert "--overwrite" not in line
    assert any("tags.csv" in fact for fact in read(without / "out")["survey"]["facts"])


def test_the_number_of_scored_pictures_and_the_trivial_maps_stand_beside_scores(scored: Path) -> None:
    """Row 3: masks for some of the pictures."""
    metrics = read(scored / "out")
    assert metrics["counted"] == {"train": {"pictures": 24, "scored": MASKED}}
    html = text(page(scored))
    miou = metrics["pseudo_masks"]["train"]["miou"]
    assert f"Pseudo masks {100 * miou:.1f} mIoU, training, {MASKED} of 24 pictures" in html
    entry = metrics["trivial"]["train"]
    table = text(section(page(scored), "results"))
    for words, key in (("Background everywhere", "background"), ("A true tag everywhere", "tag")):
        assert f"{words} {100 * entry[key]:.1f}" in table

    given = scenes()[1 : MASKED + 1]
    nothing = ConfusionMatrix(8)
    for item in given:
        nothing.update(torch.zeros(item.mask.shape, dtype=torch.uint8), torch.from_numpy(item.mask))
    assert entry["background"] == pytest.approx(nothing.result().miou)


def test_masks_to_score_against_are_read_once_and_by_one_process(scored: Path) -> None:
    class Counted:
        classes = Scenes(1).classes

        def __init__(self) -> None:
            self.source = Scenes(5, size=32)
            self.read: list[int] = []

        def __iter__(self) -> Any:
            for index in range(5):
                self.read.append(index)
                yield self.source[index]

    pictures: Any = Counted()
    found = pseudo_masks.trivial(pictures, pictures)
    assert pictures.read == [0, 1, 2, 3, 4]
    assert found["disc"] >= found["tag"] - 1e-9 or found["disc radius"] < 1.5


def test_the_page_is_small_enough_to_be_sent(without: Path, scored: Path) -> None:
    for root in (without, scored):
        assert (root / "out" / "report.html").stat().st_size < 8_000_000
        json.loads((root / "out" / "metrics.json").read_text(encoding="utf-8"))
