"""The tables of docs/vpl.md and docs/pgseg.md hold what the files of benchmarks/results hold."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.test_figures import FIGURE, Table, read, tables

CLEAN, PERMUTED = "as CLIP knows them", "colours permuted"  # under these names in the files


def text_of(values: dict[str, Any], digits: int = 3) -> str:
    return f"{values['mean']:.{digits}f} ± {values['sd']:.{digits}f}"


def change_of(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Mean and deviation of the change, seed by seed."""
    changes = [a - b for a, b in zip(mine, theirs, strict=True)]
    return f"{statistics.mean(changes):+.3f} ± {statistics.stdev(changes):.3f}"


def cells(table: Table) -> dict[str, list[str]]:
    """The figures of each row, by its first cell without bold type."""
    return {row[0].strip("*"): FIGURE.findall(" ".join(row[1:])) for row in table.rows}


def scenes(table: Table) -> None:
    maps = read("vpl-scenes")["maps"]
    kinds = ("text", "text_centred", "vision", "vision_affinity", "segmentation")
    for row, name in (("as CLIP knows them", CLEAN), ("colors permuted", PERMUTED)):
        assert cells(table)[row] == [text_of(maps[name][f"{kind} eval"]) for kind in kinds]


CONTRASTS = {
    "default": "default",
    "decoder twice as wide and deep": "twice as wide and deep a decoder",
    "noisy seeds: text, not refined": "noisy seeds (text, not refined)",
    "100 pictures": "100 pictures",
    "colors permuted": PERMUTED,
    "no suppression of absent classes": "no suppression of absent classes",
    "five times the weight": "five times the weight",
    "temperature 0.03": "temperature 0.03",
}


def contrast_on_scenes(table: Table) -> None:
    found = read("vpl-scenes")["contrast"]
    expected = {}
    for row, name in CONTRASTS.items():
        mine = found[f"{name}, with"]["segmentation eval"]
        plain = found.get(f"{name}, without", found["default, without"])["segmentation eval"]
        expected[row] = [text_of(mine), change_of(mine["values"], plain["values"])]
    assert cells(table) == expected


def small_clip(table: Table) -> None:
    content = read("vpl-msrc15")
    kinds = ("text", "text_centred", "vision", "vision_affinity")
    for row, split in (("train", "train"), ("unseen", "eval")):
        figures = cells(table)[row]
        entry = content["maps"][CLEAN]
        assert figures[:4] == [text_of(entry[f"{kind} {split}"]) for kind in kinds]
        assert figures[4] == f"{entry[f'segmentation {split}']['mean']:.3f}"
    assert cells(table)["unseen"][5:] == [f"{content['trivial'][key]:.3f}" for key in ("tag", "disc")]


KINDS = {
    "text": "text",
    "centered text": "text_centered",
    "mean feature of the tagged pictures": "mean",
    "vision": "vision",
}


def pocket(name: str) -> Callable[[Table], None]:
    def trace(table: Table) -> None:
        content = read(f"vpl-{name}-pocket")
        expected = {}
        for row, kind in KINDS.items():
            settings = [content["kinds"][kind], content["best"].get(kind, {})]
            expected[row] = [f"{each[split]:.3f}" for each in settings if each for split in ("train", "eval")]
        assert cells(table) == expected

    return trace


def zero_shot(table: Table) -> None:
    found = {}
    for row, name in (("MSRC v2, 15 classes", "msrc15"), ("VOC 2012, 20 classes, small pictures", "voc20")):
        right = read(f"vpl-{name}-pocket")["kinds"]["text"]["top1"]
        found[row] = [f"{right[split]:.3f}" for split in ("train", "eval")]
    assert {row[0]: row[1:] for row in table.rows} == found


GROUPS = ("mIoU", "group oracle", "redundancy", "compactness", "groups in use")


def groups_on_scenes(table: Table) -> None:
    variants = read("pgseg-scenes-npr-remedies")["variants"]
    names = {**{name: name for name in ("none", "image", "text", "both")}, "both, bandwidth 0.1": "bandwidth 0.1"}
    assert cells(table) == {
        row: [text_of(variants[name][key], 1 if key == "groups in use" else 3) for key in GROUPS]
        for row, name in names.items()
    }


PARTS = {
    "patches by one convolution": "patches by one convolution",
    "group tokens in the sequence, hard assignment with Gumbel noise": (
        "group tokens in the sequence, hard Gumbel assignment"
    ),
    "blocks behind the last unit": "a block behind the unit",
    "two units (16 and 8 groups)": "two units, 16 and 8 groups",
    "projections with a hidden layer": "projections with a hidden layer",
    "no loss on single nouns": "no contrast of nouns",
}


def parts(table: Table) -> None:
    variants = read("pgseg-scenes-parts")["variants"]
    plain = variants["none"]["mIoU"]
    expected = {"(all as in `tiny`)": [text_of(plain)]}
    for row, name in PARTS.items():
        mine = variants[name]["mIoU"]
        expected[row] = [text_of(mine), change_of(mine["values"], plain["values"])]
    assert cells(table) == expected


def groups_on_msrc(table: Table) -> None:
    variants = read("pgseg-msrc15-lite0-npr-bandwidth")["variants"]
    assert cells(table) == {
        row[0]: [text_of(variants[row[0]][key]) for key in GROUPS[:4]]
        + [text_of(variants[row[0]][key], 2) for key in ("prototype cosine",) if variants[row[0]][key]["values"]]
        for row in table.rows
    }
    assert {row[0] for row in table.rows} == set(variants)


def groups_on_voc(table: Table) -> None:
    content = read("pgseg-voc20-lite0-npr")
    there = content["judged"]["msrc15"]["variants"]
    assert cells(table) == {
        row: [text_of(content["variants"][row][key]) for key in GROUPS[:4]]
        + [text_of(there[row][key]) for key in ("mIoU", "group oracle")]
        for row in content["variants"]
    }


def decoders(table: Table) -> None:
    found = read("vpl-voc20-pocket-decoder")["decoders"]
    expected = {}
    for row, name in {"without regional contrast": "without", "with": "with"}.items():
        keys = ("unseen, without tags", "unseen, with tags", "train, with tags")
        expected[row] = [text_of(found[name][key]) for key in keys]
    assert cells(table) == expected


TRACED: dict[tuple[str, str], Callable[[Table], None]] = {
    (
        "docs/vpl.md",
        "unseen pictures | text | centered text | vision | vision, affinity | decoder, without tags",
    ): scenes,
    ("docs/vpl.md", "decoder | with | gain"): contrast_on_scenes,
    (
        "docs/vpl.md",
        "pictures | text | centered text | vision | vision, affinity | decoder | true tag everywhere | "
        "in a centered ellipse",
    ): small_clip,
    ("docs/vpl.md", "zero-shot, nearest class is one of the tags | train | unseen"): zero_shot,
    (
        "docs/vpl.md",
        "prototypes on MSRC | default, train | default, unseen | chosen, train | chosen, unseen",
    ): pocket("msrc15"),
    (
        "docs/vpl.md",
        "prototypes on VOC | default, train | default, unseen | chosen, train | chosen, unseen",
    ): pocket("voc20"),
    (
        "docs/vpl.md",
        "decoder on VOC | unseen, without tags | unseen, with tags | train, with tags",
    ): decoders,
    (
        "docs/pgseg.md",
        "`--npr`, MSRC-15 | mIoU | group oracle | redundancy | compactness | cosine of prototypes",
    ): groups_on_msrc,
    (
        "docs/pgseg.md",
        "`--npr`, VOC 2012 | mIoU | group oracle | redundancy | compactness | mIoU on MSRC-15 | "
        "group oracle on MSRC-15",
    ): groups_on_voc,
    (
        "docs/pgseg.md",
        "`--npr` | mIoU | group oracle | redundancy | compactness | groups in use",
    ): groups_on_scenes,
    ("docs/pgseg.md", "part of the paper | `tiny` | mIoU with the paper's part | change"): parts,
}
SETTINGS = {("docs/vpl.md", "open | here")}  # what was chosen, no result


@pytest.mark.parametrize("page", ["docs/vpl.md", "docs/pgseg.md"])
def test_every_table_with_figures_is_traced(page: str) -> None:
    found = {table.name for table in tables(page)}
    assert found == {name for name in {*TRACED, *SETTINGS} if name[0] == page}


@pytest.mark.parametrize("name", TRACED, ids=lambda name: name[1])
def test_figures_are_those_of_the_files(name: tuple[str, str]) -> None:
    (table,) = (table for table in tables(name[0]) if table.name == name)
    TRACED[name](table)
