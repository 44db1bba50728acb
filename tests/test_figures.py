"""The figures in the tables of README and docs/cpal.md are those of benchmarks/results, wherever a file there has them.

A new table has to be traced: no figure may stand in one that no file has.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = re.compile(r"[+-]?\d+\.\d+(?: ± \d+\.\d+)?")


class Table(NamedTuple):
    page: str
    head: list[str]
    rows: list[list[str]]

    @property
    def name(self) -> tuple[str, str]:
        return self.page, " | ".join(self.head)

    def column(self, number: int) -> dict[str, list[str]]:
        """The figures of a column, by the first cell of their row."""
        return {row[0]: FIGURE.findall(row[number]) for row in self.rows}


def raw_tables(page: str) -> list[list[list[str]]]:
    """The cells of a page's tables, by lines."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]


def tables(page: str) -> list[Table]:
    """The tables of a page that hold figures; what is code or a setting is none."""
    found = []
    for lines in raw_tables(page):
        table = Table(page, lines[0], lines[2:])
        settings = table.head[0] == "setting" or table.head[0] == "module"
        if not settings and any(FIGURE.search(cell) for row in table.rows for cell in row):
            found.append(table)
    return found


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"accuracy-{name}.json").read_text(encoding="utf-8"))
    return content


def mean_of(name: str, method: str, kind: str) -> list[str]:
    """Mean mIoU of a map, on training pictures and on unseen ones, as the pages write it."""
    maps = read(name)["maps"]
    return [f"{maps[f'{method}/{split}/{kind}']['miou']['mean']:.3f}" for split in ("train", "eval")]


def gain_of(name: str, split: str) -> str:
    """PACAM with the bank in the training over the CAM without it, in points, over seeds."""
    maps = read(name)["maps"]
    with_bank, without = (maps[f"{key}"]["miou"]["values"] for key in (f"cpal/{split}/pacam", f"none/{split}/cam"))
    gains = [100 * (mine - theirs) for mine, theirs in zip(with_bank, without, strict=True)]
    return f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains):.1f}"


def spread_of(name: str, method: str, kind: str, field: str = "miou") -> list[str]:
    """Mean and standard deviation of a map's mIoU, on training pictures and on unseen ones, as the pages write it."""
    maps = read(name)["maps"]
    found = [maps[f"{method}/{split}/{kind}"][field] for split in ("train", "eval")]
    return [f"{each['mean']:.3f} ± {each['sd']:.3f}" for each in found]


MAPS = {
    "CAM": ("none", "cam"),
    "one prototype a picture": ("none", "instance"),
    "PACAM, the bank filled after training": ("none", "pacam"),
    "PACAM after training, Otsu's threshold": ("none", "pacam", "miou_mask_free"),
    "CAM, trained with the loss": ("cpal", "cam"),
    "PACAM, trained with the loss": ("cpal", "pacam"),
}
TRIVIAL = {"a true tag everywhere", "a true tag in a centered ellipse", "**a true tag in a centered ellipse**"}


def real_pictures(table: Table) -> None:
    """All rows but those of maps that know nothing of the picture."""
    for column, name in {1: "voc20", 2: "msrc15-lite0"}.items():
        found = {row: figures for row, figures in table.column(column).items() if row not in TRIVIAL}
        assert found == {row: spread_of(name, *key) for row, key in MAPS.items()}


def readme(table: Table) -> None:
    """The same figures, of VOC's pictures alone."""
    rows = {
        "CAM": MAPS["CAM"],
        "one prototype per picture": MAPS["one prototype a picture"],
        "**PACAM: the bank filled after training**": MAPS["PACAM, the bank filled after training"],
    }
    expected = {row: spread_of("voc20", *key) for row, key in rows.items()}
    for column in (1, 2):
        found = {row: figures for row, figures in table.column(column).items() if row not in TRIVIAL}
        assert found == {row: [figures[column - 1]] for row, figures in expected.items()}


def small_networks(table: Table) -> None:
    """Columns of today's code, and beside each that of version 0.1.0."""
    rows = {row: MAPS[row] for row in MAPS if row in table.column(1)}
    for column, name in {1: "msrc15-scratch", 3: "scenes-whitened"}.items():
        assert table.column(column) == {row: spread_of(name, *key) for row, key in rows.items()}
    for column, name in {2: "msrc15", 4: "scenes"}.items():
        assert table.head[column] == "0.1.0"
        assert table.column(column) == {row: mean_of(name, *key) for row, key in rows.items()}


def heads(table: Table) -> None:
    """All columns but the last one, which is the paper's."""
    columns = {1: ("scenes", "train"), 2: ("scenes", "eval"), 3: ("msrc15", "train"), 4: ("msrc15", "eval")}
    for column, (data, split) in columns.items():
        expected = {"MCTformer (V2)": [gain_of(f"{data}-mct", split)], "AMN": [gain_of(f"{data}-amn", split)]}
        assert table.column(column) == expected


def spread(values: dict[str, Any]) -> str:
    return f"{values['mean']:.2f} ± {values['sd']:.2f}"


def wrong_sides(name: str) -> list[int]:
    """By seed, how many banks have more contrast than the CAM and a lower mIoU on unseen pictures, or the reverse."""
    content = read(name)
    cam = content["maps"]["cpal/eval/cam"]
    # "nothing" leaves nothing out: it is the default score, which has a row of its own.
    banks = [part["eval"] for part_name, part in content["parts"].items() if part_name != "nothing"]
    assert len(banks) == 21
    found = []
    for seed in range(len(content["seeds"])):
        contrast, miou = (cam[key]["values"][seed] for key in ("contrast", "miou"))
        sides = [(b["contrast"]["values"][seed] > contrast, b["miou"]["values"][seed] > miou) for b in banks]
        found.append(sum(by_contrast != by_miou for by_contrast, by_miou in sides))
    return found


def without_masks(table: Table) -> None:
    files = {
        "MSRC-15, Lite0 (49 pictures)": "msrc15-lite0",
        "MSRC-15 from nothing (49 pictures)": "msrc15-scratch",
    }
    assert {row[0] for row in table.rows} == set(files)
    for row in table.rows:
        rank = read(files[row[0]])["rank_correlation"]
        wrong = ", ".join(map(str, wrong_sides(files[row[0]])))
        assert row[1:] == [spread(rank["contrast"]), spread(rank["miou_train"]), f"{wrong} of 21"]


CHOICES = {
    'the defaults: `"diagonal"`, one context a class': "nothing",
    '`score="dot"`': "score: features less their mean (dot)",
    '`score="whitened"`': "score: the whole covariance (whitened)",
    '`score="cosine"`': "score: cosine, which drops the features' length",
    "without background": "background: none, the plain 1 - max",
    "one background prototype an image": "background contexts: one background prototype an image",
    "instances where the CAM is": "repeated estimate: instances where the CAM is",
    "3 contexts a class": "3 contexts a class",
    "10 contexts a class": "10 contexts a class",
    "10 contexts, all weigh the same": "10 contexts, all weigh the same",
    "0.1.0's defaults: cosine, 3 contexts, where the CAM is": "0.1.0: cosine, 3 contexts, where the CAM is",
    "the paper's words": "the paper's words (ContextPrototypeBank.paper)",
}


def choices(table: Table) -> None:
    parts = read("msrc15-lite0")["parts"]
    expected = []
    for row, name in CHOICES.items():
        found = [parts[name][split]["miou"] for split in ("train", "eval")]
        expected.append([row, *(f"{each['mean']:.3f} ± {each['sd']:.3f}" for each in found)])
    assert table.rows == expected


TRACED: dict[tuple[str, str], Callable[[Table], None]] = {
    ("README.md", "map | train | unseen"): readme,
    ("docs/cpal.md", " | VOC 2012, small | MSRC-15"): real_pictures,
    (
        "docs/cpal.md",
        " | contrast and mIoU, unseen | mIoU on train and mIoU, unseen | banks on the wrong side of the CAM",
    ): without_masks,
    ("docs/cpal.md", "choice | PACAM, train | PACAM, unseen"): choices,
    ("docs/cpal.md", " | MSRC-15 | 0.1.0 | scenes | 0.1.0"): small_networks,
    (
        "docs/cpal.md",
        " | scenes, train | scenes, unseen | MSRC-15, train | MSRC-15, unseen | the paper, VOC 2012 train",
    ): heads,
}


@pytest.mark.parametrize("page", ["README.md", "docs/cpal.md"])
def test_every_table_with_figures_is_traced(page: str) -> None:
    found = {table.name for table in tables(page)}
    assert found == {name for name in TRACED if name[0] == page}


def test_what_the_readme_says_of_sizes_is_measured() -> None:
    measured = json.loads((RESULTS / "install-size.json").read_text(encoding="utf-8"))["megabytes"]
    (table,) = (lines for lines in raw_tables("README.md") if lines[0][0] == "extra")
    assert re.findall(r"(\d+) MB", table[2][2]) == [
        f"{measured[name]:.0f}" for name in ("core", "of it for NVIDIA GPUs")
    ]
    told = {}
    for row in table[3:]:
        sizes = re.findall(r"(\d+) MB", row[2])
        told.update(zip(re.findall(r"`(\w+)`", row[0]), map(int, sizes), strict=True))
    assert told == {extra: round(measured[extra]) for extra in told}
    assert set(told) == set(measured) - {"core", "of it for NVIDIA GPUs"}


def test_what_the_readme_says_below_its_table_is_measured() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert len(read("voc20")["seeds"]) == 3
    assert "deviation are over three seeds" in text

    gain = re.search(r"the bank is worth (\d+) to (\d+) points here", text)
    assert gain is not None
    maps = read("voc20")["maps"]
    for split in ("train", "eval"):
        mine, theirs = (maps[f"none/{split}/{kind}"]["miou"]["mean"] for kind in ("pacam", "cam"))
        assert int(gain[1]) <= round(100 * (mine - theirs)) <= int(gain[2])

    otsu = re.search(r"Otsu's threshold needs no masks: with it, the last row becomes (0\.\d+) and (0\.\d+)\.", text)
    assert otsu is not None
    expected = [f"{maps[f'none/{split}/pacam']['miou_mask_free']['mean']:.3f}" for split in ("train", "eval")]
    assert list(otsu.groups()) == expected


@pytest.mark.parametrize("name", TRACED, ids=lambda name: name[1])
def test_figures_are_those_of_the_files(name: tuple[str, str]) -> None:
    (table,) = (table for table in tables(name[0]) if table.name == name)
    TRACED[name](table)


def test_the_index_of_results_has_every_file() -> None:
    """Its table names each page with the versions and the command of the file beside it."""
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    rows = {row[0]: row for row in re.findall(r"^\| \[([\w-]+)\]\(\1\.md\) \| ([^|]*) \| `([^`]*)` \|$", index, re.M)}
    assert (
        set(rows)
        == {file.stem for file in RESULTS.glob("*.json")}
        == {file.stem for file in RESULTS.glob("*.md")} - {"README"}
    )
    for name, (_, versions, command) in rows.items():
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        known = content.get("versions") or content.get("environment", {}).get("versions")
        noted = "not noted" if known is None else f"protoseg {known['protoseg']}, torch {known['torch']}"
        assert versions == noted, name
        assert command in (RESULTS / f"{name}.md").read_text(encoding="utf-8"), name
        assert command == content.get("command", command), name
