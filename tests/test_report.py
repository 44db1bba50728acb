import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protoseg.report import Picture, formats, overlay, plots, write_report

SECTIONS = ("results", "training", "thresholds", "classes", "pictures", "run")


def metrics() -> dict[str, Any]:
    def value(miou: float) -> dict[str, Any]:
        return {
            "miou": miou,
            "threshold": 0.38,
            "per_class": {"background": 0.8, "cow": miou / 2, "boat": None},
            "miou_mask_free": miou - 0.02,
            "threshold_mask_free": 0.5,
            "contrast": 0.1234,
        }

    return {
        "method": "cpal",
        "seed": 7,
        "seconds": 161.3,
        "peak_memory_mb": 2113.4,
        "versions": {"protoseg": "0.1.0", "torch": "2.5.0"},
        "maps": {
            "train": {"cam": value(0.4), "instance": value(0.43), "pacam": value(0.4561)},
            "eval": {"cam": value(0.35), "instance": value(0.4), "pacam": value(0.44)},
        },
        "pseudo_masks": {"train": {"miou": 0.512}},
        "segmentation": {"eval": {"miou": 0.487, "per_class": {"background": 0.9, "cow": 0.6, "boat": 0.1}}},
    }


def picture(name: str, score: float | None, size: tuple[int, int] = (12, 16)) -> Picture:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    mask = torch.randint(0, 3, size, generator=generator)
    mask[0] = 255
    panels = {"cam": torch.rand(size, generator=generator), "pseudo mask": mask.to(torch.uint8)}
    return Picture(name, image, mask, panels, score, ("cow", "boat"))


def everything() -> dict[str, Any]:
    thresholds = torch.linspace(0, 1, 11)
    return {
        "title": "A run",
        "metrics": metrics(),
        "history": {"loss": [(i, 1 / (i + 1)) for i in range(100)], "lr": [(0, 0.1), (50, 0.01)]},
        "sweeps": {s: {"cam": (thresholds, 0.4 - (thresholds - 0.4) ** 2)} for s in ("train", "eval")},
        "pictures": [picture(f"id_{i:02}", i / 20) for i in range(20)] + [picture("unranked", None)],
        "classes": ["cow", "boat"],
        "config": {"command": "train --seed 7", "scales": [0.5, 1.0], "refine": True, "resume": None},
    }


def write(path: Path, **changes: Any) -> str:
    write_report(path, **{**everything(), **changes})
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("matplotlib", reason="plots need the extra 'recipes'")
    return write(tmp_path_factory.mktemp("report") / "report.html")


def test_is_self_contained(full: str) -> None:
    assert not re.search(r"https?://", full)
    assert "<script" not in full
    assert "<link" not in full
    assert "@import" not in full
    assert "url(" not in full.replace("url(#", "")
    sources = re.findall(r'src="([^"]{0,30})', full)
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)


def test_shows_each_section_and_links_to_it(full: str) -> None:
    for section in SECTIONS:
        assert full.count(f'id="{section}"') == 1
        assert full.count(f'href="#{section}"') == 1


def test_shows_the_numbers(full: str) -> None:
    text = re.sub(r"<[^>]+>", " ", full)
    for shown in ("45.6", "+5.6", "0.380", "43.6", "0.500", "\N{MINUS SIGN}2.0", "51.2", "48.7", "2 min 41 s"):
        assert shown in text, shown
    for shown in ("2,113 MB", "seed 7", "train --seed 7", "[0.5, 1.0]", "true", "2.5.0", "void", "cow", "boat"):
        assert shown in text, shown
    assert "resume" not in text, "a setting without a value says nothing"
    assert full.count('class="n best"') == 2, "one best map a split"


def test_shows_the_best_and_the_worst_and_none_twice(full: str) -> None:
    names = re.findall(r"<code>(\w+)</code>", full)
    best = [f"id_{i:02}" for i in range(19, 13, -1)]
    worst = [f"id_{i:02}" for i in range(6)]
    assert names == [*best, *worst, "unranked"]


@pytest.mark.parametrize("count", [1, 2, 3, 11, 12])
def test_few_pictures_are_all_shown_once(tmp_path: Path, count: int) -> None:
    html = write(tmp_path / "r.html", pictures=[picture(f"p{i}", i / 20) for i in range(count)], history={}, sweeps={})
    names = re.findall(r"<code>(\w+)</code>", html)
    assert sorted(names) == sorted(f"p{i}" for i in range(count))


def test_escapes_all_text(tmp_path: Path) -> None:
    evil = "<script>alert('&')</script>"
    values = metrics()
    values["maps"]["eval"][evil] = {"miou": 0.1, "per_class": {evil: 0.5}}
    values["maps"][evil] = values["maps"]["eval"]
    values["method"] = values["versions"][evil] = evil
    shown = picture(evil, 0.5)
    html = write(
        tmp_path / "r.html",
        title=evil,
        metrics=values,
        history={evil: [(0, 1.0), (1, 0.5)]},
        sweeps={evil: {evil: ([0, 1], [0.1, 0.2])}},
        pictures=[shown._replace(panels={evil: shown.panels["cam"]}, tags=(evil,))],
        classes=[evil, evil],
        config={"command": evil, evil: evil},
    )
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 10


@pytest.mark.parametrize("part", ["history", "sweeps", "pictures", "classes", "config"])
def test_argument_that_is_missing_is_left_out(tmp_path: Path, part: str) -> None:
    arguments = everything()
    del arguments[part]
    write_report(tmp_path / "r.html", **arguments)
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    section = {"history": "training", "sweeps": "thresholds", "pictures": "pictures"}.get(part)
    for name in SECTIONS:
        assert (f'id="{name}"' in html) is (name != section)


@pytest.mark.parametrize("part", list(metrics()))
def test_metric_that_is_missing_is_left_out(tmp_path: Path, part: str) -> None:
    for empty in ({}, {part: None}):
        values = {**metrics(), **empty}
        if not empty:
            del values[part]
        html = write(tmp_path / "r.html", metrics=values, history={}, pictures=[])
        assert "None" not in html


def test_nothing_at_all(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", title="Empty", metrics={})
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h1>Empty</h1>" in html
    assert "<section" not in html


def test_missing_numbers_are_dashes(tmp_path: Path) -> None:
    maps = {
        "instance": None,
        "cam": {"miou": math.nan, "per_class": {"cow": math.nan, "boat": None}},
        "pacam": {"miou": None},
    }
    html = write(
        tmp_path / "r.html",
        metrics={"maps": {"eval": maps}, "segmentation": {"eval": {"miou": math.nan}}, "seconds": math.nan},
        history={"loss": [(0, math.nan), (1, math.inf), (2, 1.0)], "broken": [(0, math.nan)]},
        sweeps={"eval": {"cam": ([0, 0.5, 1], [None, math.nan, 0.1])}},
        pictures=[picture("x", math.nan)],
        config={},
    )
    visible = re.sub(r"<svg.*?</svg>|<style.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf|None)\b", visible)
    assert visible.count("\N{EN DASH}") >= 18 + 2 + 1
    assert "broken" not in visible


def test_is_written_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "folder" / "report.html"
    write_report(path, title="First", metrics={})
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(str(path), title="Second", metrics={})
    assert [file.name for file in path.parent.iterdir()] == ["report.html"], "nothing is left behind"
    assert "First" in path.read_text(encoding="utf-8"), "the old report stands"


@pytest.mark.parametrize("module", ["matplotlib", "PIL", "jinja2"])
def test_missing_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    for name in [module, *(each for each in sys.modules if each.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    changes: dict[str, Any] = {"history": {}, "sweeps": {}} if module == "PIL" else {"pictures": []}
    with pytest.raises(ImportError, match=rf'write_report needs {module}; run pip install "protoseg\[recipes\]"'):
        write(tmp_path / "r.html", **changes)
    if module != "jinja2":
        write(tmp_path / "r.html", history={}, sweeps={}, pictures=[])  # numbers need neither plots nor pictures


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"truth": torch.zeros(12, 16).bool()}, TypeError, "scores or an integer mask, got torch.bool"),
        ({"truth": torch.zeros(5, 5).long()}, ValueError, "layer must have shape"),
        ({"truth": torch.full((12, 16), 300)}, ValueError, "mask must hold 0..255, got 300 to 300"),
    ],
)
def test_wrong_picture_is_named(
    tmp_path: Path, change: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    wrong = picture("wrong", 0.5)._replace(**change)
    with pytest.raises(error, match=message):
        write(tmp_path / "r.html", pictures=[wrong], history={}, sweeps={})
    assert not list(tmp_path.iterdir())


def test_large_pictures_are_made_smaller() -> None:
    pil_image = pytest.importorskip("PIL.Image", reason="pictures need the extra 'recipes'")
    import base64
    import io

    uri = formats.data_uri(torch.zeros(3, 300, 1200, dtype=torch.uint8))
    with pil_image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
        assert image.size == (400, 100)


def test_long_curves_do_not_swell_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra 'recipes'")
    noise = torch.rand(50_000, generator=torch.Generator().manual_seed(0)).tolist()
    write_report(tmp_path / "r.html", title="Long", metrics={}, history={"loss": list(enumerate(noise))})
    assert (tmp_path / "r.html").stat().st_size < 300_000


def test_numbers_of_any_type() -> None:
    assert [formats.number(x) for x in (1, torch.tensor(0.5), None, math.nan, "x", torch.rand(2))] == [
        1,
        0.5,
        *[None] * 4,
    ]
    assert [formats.duration(x) for x in (3.21, 161, 7384, None)] == ["3.2 s", "2 min 41 s", "2 h 3 min", formats.DASH]


def test_smooth_keeps_a_line_and_the_length() -> None:
    line = [(float(i), 2.0 * i) for i in range(200)]
    smooth = plots.smooth(line)
    assert [x for x, _ in smooth] == [x for x, _ in line]
    assert smooth[50:150] == line[50:150]


class TestOverlay:
    image = torch.tensor([10, 100, 200], dtype=torch.uint8).view(3, 1, 1).expand(3, 5, 5)

    def test_mask(self) -> None:
        mask = torch.zeros(5, 5, dtype=torch.uint8)
        mask[1:4, 1:4] = 2
        mask[0, 0] = 255
        out = overlay(self.image, mask, strength=0.5)
        assert out.shape == (3, 5, 5)
        assert out.dtype == torch.uint8
        assert out[:, 4, 4].tolist() == [10, 100, 200], "background stays"
        assert out[:, 2, 2].tolist() == [5, 114, 100], "half picture, half green"
        assert out[:, 1, 1].tolist()[1] == pytest.approx(0.05 * 100 + 0.95 * 128, abs=1), "the edge is full"
        assert out[:, 0, 0].tolist() == [64, 131, 198], "a quarter of void"
        assert torch.equal(out, overlay(self.image, mask.long(), strength=0.5))

    def test_palette_is_that_of_voc(self) -> None:
        mask = torch.arange(5).expand(5, 5)
        colors = overlay(self.image, mask, strength=1.0)[:, 2].T.tolist()
        assert colors == [[10, 100, 200], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]

    def test_heat_rises_in_lightness(self) -> None:
        score = torch.linspace(0, 1, 25).view(5, 5)
        out = overlay(self.image, score).float()
        lightness = (out * torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)).sum(0).flatten()
        assert (lightness.diff() > 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_any_precision_and_any_value(self, dtype: torch.dtype) -> None:
        score = torch.tensor([math.nan, -1, 0, 1, math.inf], dtype=dtype).expand(5, 5)
        row = overlay(self.image, score)[:, 0].T
        assert torch.equal(row[0], row[2])
        assert torch.equal(row[1], row[2])
        assert torch.equal(row[4], row[3])

    def test_one_pixel(self) -> None:
        one = self.image[:, :1, :1]
        assert overlay(one, torch.ones(1, 1, dtype=torch.int64)).shape == (3, 1, 1)
        assert overlay(one, torch.ones(1, 1)).shape == (3, 1, 1)

    @pytest.mark.parametrize(
        ("image", "layer", "error", "message"),
        [
            (torch.zeros(3, 2, 2), torch.zeros(2, 2), TypeError, "image must be uint8 .*got torch.float32"),
            (None, torch.zeros(2, 2), ValueError, r"layer must have shape \(5, 5\), got \(2, 2\); resize"),
            (torch.zeros(1, 2, 2).byte(), torch.zeros(2, 2), ValueError, r"image must have shape \(3, H, W\)"),
            (None, torch.zeros(5, 5).bool(), TypeError, "scores or an integer mask, got torch.bool"),
            (None, torch.full((5, 5), -1), ValueError, "mask must hold 0..255, got -1 to -1"),
        ],
    )
    def test_errors(self, image: Tensor | None, layer: Tensor, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            overlay(self.image if image is None else image, layer)
        with pytest.raises(ValueError, match="strength must lie between 0 and 1, got 2"):
            overlay(self.image, torch.zeros(5, 5), strength=2)
