import itertools
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protoseg.report import Picture, formats, outlines, overlay, plots, write_report

SECTIONS = ("pictures", "masks", "left-out", "results", "training", "thresholds", "classes", "maps", "run")


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
        "counted": {"train": {"pictures": 12, "scored": 2}, "eval": {"pictures": 6, "scored": 6}},
        "trivial": {
            "train": {"background": 0.31, "regions": 0.03, "tag": 0.12, "disc": 0.333, "disc radius": 0.5},
            "eval": {"background": 0.29, "regions": 0.02, "tag": 0.11, "disc": 0.22, "disc radius": 0.5},
        },
        "pseudo_masks": {
            "train": {
                "miou": 0.512,
                "count": 12,
                "empty": 3,
                "untagged": 1,
                "empties": ["lost one", "lost two"],
                "foreground": 0.187,
                "classes": {
                    "cow": {"tagged": 8, "found": 7, "share": 0.25},
                    "boat": {"tagged": 5, "found": 0, "share": None},
                },
            }
        },
        "broken": {"train": {"torn": "torn.jpg: is truncated"}, "eval": {}},
        "survey": {"facts": ["12 pictures in a folder"], "faults": ["train: torn.jpg: is truncated"]},
        "segmentation": {"eval": {"miou": 0.487, "per_class": {"background": 0.9, "cow": 0.6, "boat": 0.1}}},
    }


def picture(name: str, score: float | None, size: tuple[int, int] = (12, 16)) -> Picture:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    mask = torch.randint(0, 3, size, generator=generator)
    mask[0] = 255
    panels = {"cam": torch.rand(size, generator=generator), "pseudo mask": mask.to(torch.uint8)}
    return Picture(name, image, mask, panels, score, ("cow", "boat"), mask.clone(), large=False)


def large(name: str, mask: Tensor, **changes: Any) -> Picture:
    image = torch.full((3, *mask.shape), 90, dtype=torch.uint8)
    return Picture(name, image, None, {}, tags=("cow",), mask=mask)._replace(**changes)


def blot(value: int, size: tuple[int, int] = (60, 80)) -> Tensor:
    mask = torch.zeros(size, dtype=torch.uint8)
    mask[10:40, 20:50] = value
    return mask


def everything() -> dict[str, Any]:
    thresholds = torch.linspace(0, 1, 11)
    return {
        "title": "A run",
        "metrics": metrics(),
        "history": {"loss": [(i, 1 / (i + 1)) for i in range(100)], "lr": [(0, 0.1), (50, 0.01)]},
        "sweeps": {s: {"cam": (thresholds, 0.4 - (thresholds - 0.4) ** 2)} for s in ("train", "eval")},
        "pictures": [picture(f"id_{i:02}", i / 20) for i in range(20)]
        + [picture("unranked", None), large("meadow", blot(1))],
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
    sources = re.findall(r'(?:src|href)="([^"#][^"]{0,30})', full)
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
    assert full.count("n best") == 2, "one best map a split"


def test_shows_the_best_and_the_worst_and_none_twice(full: str) -> None:
    names = re.findall(r"<code>(\w+)</code>", full[full.index('id="maps"') :])
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
    gone = {"history": ["training"], "sweeps": ["thresholds"], "pictures": ["pictures", "maps"]}.get(part, [])
    for name in SECTIONS:
        assert (f'id="{name}"' in html) is (name not in gone)


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
        "pacam": {"miou": 0.2},
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


def text_of(html: str) -> str:
    """What a person reads, in order."""
    text = re.sub(r"<style.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL)
    return " ".join(text.split())


def section(html: str, name: str) -> str:
    return html[html.index(f'<section id="{name}"') :].partition("</section>")[0]


def test_pictures_come_first_and_large_with_their_names_in_them(full: str) -> None:
    order = re.findall(r'<section id="([\w-]+)"', full)
    assert order == list(SECTIONS)
    gallery = section(full, "pictures")
    assert gallery.count("<svg") == 1, "only what is large"
    assert re.search(r"<text [^>]*>cow</text>", gallery)
    assert 'aria-label="meadow: cow"' in gallery
    assert "18.8 % foreground" in text_of(gallery)


def test_a_picture_says_what_was_not_found(tmp_path: Path) -> None:
    lost = large("lost", torch.zeros(30, 40, dtype=torch.uint8))
    half = large("half", blot(2), tags=("cow", "boat"), score=0.25)
    gallery = section(write(tmp_path / "r.html", pictures=[lost, half], history={}, sweeps={}), "pictures")
    assert "empty, tagged cow" in text_of(gallery)
    assert 'aria-label="lost: no object found"' in gallery
    assert "not found: cow" in text_of(gallery)
    assert "IoU 25.0" in text_of(gallery)


def test_masks_in_numbers(full: str) -> None:
    text = text_of(section(full, "masks"))
    assert "12 masks 3 empty, 1 of them without a tag 18.7 % of the pixels are foreground" in text
    assert "Empty although tagged: lost one , lost two ." in text
    assert "cow 8 7 25.0 % boat 5 0 \N{EN DASH}" in text
    assert section(full, "masks").count("down") == 1, "a class that is found in less than half of its pictures"


def test_what_was_left_out_and_why(full: str, tmp_path: Path) -> None:
    text = text_of(section(full, "left-out"))
    assert "1 picture cannot be used" in text
    assert "train: torn.jpg: is truncated" in text
    many = {"faults": [f"fault {place}" for place in range(100)]}
    html = write(tmp_path / "r.html", metrics={**metrics(), "survey": many}, history={}, sweeps={}, pictures=[])
    assert "fault 39 and 60 more, in metrics.json" in text_of(section(html, "left-out"))
    counts = {"broken picture": 7}
    html = write(tmp_path / "r.html", metrics={"broken": counts}, history={}, sweeps={}, pictures=[])
    assert "7 pictures cannot be used" in text_of(section(html, "left-out"))


def test_scores_stand_beside_those_of_masks_that_know_nothing(full: str) -> None:
    cards = text_of(full[: full.index('<section id="results"')])
    assert "51.2 mIoU, training, 2 of 12 pictures a true tag in a centered disc: 33.3" in cards
    assert "44.0 mIoU, evaluation, 6 pictures" in cards
    assert "background everywhere: 29.0" in cards
    table = text_of(section(full, "results"))
    assert "training, 2 of 12 pictures" in table
    for shown in ("Background everywhere 31.0", "A true tag everywhere 12.0", "A true tag in a centered disc 22.0"):
        assert shown in table
    assert section(full, "results").count("trivial") == 8


def test_without_masks_no_score_is_shown(tmp_path: Path) -> None:
    entry = {"miou": None, "threshold": None, "per_class": {}, "miou_mask_free": None, "threshold_mask_free": 0.41}
    values = metrics()
    values["maps"] = {"train": {"cam": {**entry, "contrast": 0.25}}}
    values["pseudo_masks"]["train"]["miou"] = math.nan
    values |= {"trivial": {}, "segmentation": {}, "counted": {"train": {"pictures": 12, "scored": 0}}}
    html = write(tmp_path / "r.html", metrics=values, history={}, sweeps={})
    text = text_of(html[: html.index('<section id="maps"')])
    assert "There are no true masks" in text
    assert "CAM 0.410 0.250" in text
    assert "mIoU" not in text
    assert "IoU" not in text


def test_the_command_is_one_click(full: str) -> None:
    assert re.search(r'<pre class="command"[^>]*>train --seed 7</pre>', full)
    assert "user-select: all" in full
    assert "12 pictures in a folder" in text_of(section(full, "run"))


class TestOutlined:
    def test_edges_are_bright_and_the_rest_stays(self) -> None:
        image = torch.full((3, 640, 800), 90, dtype=torch.uint8)
        mask = torch.zeros(640, 800, dtype=torch.uint8)
        mask[100:400, 200:500] = 1
        found = outlines.outlined(image, mask)
        assert found.image.shape == (3, 640, 800)
        assert found.image[:, 102, 300].tolist() == list(outlines.bright(1))
        assert found.image[:, 10, 10].tolist() == [90, 90, 90]
        assert found.image[:, 99, 300].tolist() < [90, 90, 90], "dark around the outline"
        inside = [round(90 + outlines.TINT * (part - 90)) for part in outlines.bright(1)]
        assert found.image[:, 250, 350].tolist() == inside
        assert found.centers == {1: (pytest.approx(350, abs=2), pytest.approx(250, abs=2))}

    def test_small_pictures_are_enlarged_and_large_ones_made_smaller(self) -> None:
        for size, expected in (((48, 48), (640, 640)), ((2000, 1000), (960, 480)), ((700, 700), (700, 700))):
            image = torch.zeros(3, *size, dtype=torch.uint8)
            found = outlines.outlined(image, torch.zeros(size, dtype=torch.uint8))
            assert tuple(found.image.shape[1:]) == expected
            assert found.centers == {}

    def test_void_is_a_veil_without_a_name(self) -> None:
        found = outlines.outlined(torch.zeros(3, 640, 640, dtype=torch.uint8), torch.full((640, 640), 255))
        assert found.centers == {}
        assert found.image[:, 5, 5].tolist() == [part // 2 for part in outlines.VOID_COLOR]

    def test_colors_of_all_classes_are_bright_and_differ(self) -> None:
        colors = [outlines.bright(value) for value in range(1, 81)]
        assert len(set(colors)) == 80
        assert all(max(color) == 255 for color in colors)
        for one, other in itertools.pairwise(colors):
            assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 150

    def test_names_stay_inside_and_apart(self) -> None:
        names = ["a", "traffic light", "a name that is longer than the picture is wide"]
        centers = {1: (0.0, 0.0), 2: (2.0, 3.0), 3: (399.0, 199.0), 9: (0.0, 199.0)}
        labels = outlines.place_names(centers, names, (200, 400))
        assert [label.name for label in labels] == [*names, "class 9"]
        for label in labels:
            assert 0 <= label.x <= label.x + label.width <= 400 + 1e-6
            assert 0 <= label.y <= label.y + label.height <= 200 + 1e-6
        for place, label in enumerate(labels):
            assert not any(label.overlaps(other) for other in labels[:place])

    def test_letters_can_be_read_on_their_ground(self) -> None:
        def light(color: tuple[int, ...]) -> float:
            linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in
                      (value / 255 for value in color)]  # fmt: skip
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        for value in range(1, 81):
            ratio = (light(outlines.bright(value)) + 0.05) / (light((16, 21, 28)) + 0.05)
            assert ratio > 4.5, value

    @pytest.mark.parametrize(
        ("image", "mask", "error", "message"),
        [
            (torch.zeros(3, 2, 2), torch.zeros(2, 2).long(), TypeError, "image must be uint8"),
            (torch.zeros(3, 2, 2).byte(), torch.zeros(2, 2), TypeError, "mask must hold integers, got torch.float32"),
            (torch.zeros(3, 2, 2).byte(), torch.zeros(2, 3).long(), ValueError, "mask must have shape"),
            (torch.zeros(3, 2, 2).byte(), torch.full((2, 2), -1), ValueError, "must hold 0..255, got -1 to -1"),
        ],
    )
    def test_errors(self, image: Tensor, mask: Tensor, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            outlines.outlined(image, mask)


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
        ({"truth": torch.zeros(12, 16).bool()}, TypeError, "mask must hold integers, got torch.bool"),
        ({"truth": torch.zeros(5, 5).long()}, ValueError, "mask must have shape"),
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
