"""Pairs that a CSV lists, and those of made scenes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from protoseg.data import Broken, CsvPairs, ScenePairs, Scenes, UnreadableFileError
from tests.test_pairs import png


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.png").write_bytes(png(1))
    (tmp_path / "two.jpg").write_bytes(png(2))
    path = tmp_path / "pairs.csv"
    path.write_text('\ufeffcaption,path,more\n"a cat, asleep",in/one.png,1\ntwo,two.jpg,\n', encoding="utf-8")
    return path


def test_csv(table: Path) -> None:
    pairs = CsvPairs(table)
    assert [(pair.key, pair.caption, int(pair.image[0, 0, 0])) for pair in (pairs[0], pairs[-1])] == [
        ("in/one", "a cat, asleep", 1),
        ("two", "two", 2),
    ]
    assert len(pairs) == len(list(pairs)) == 2
    assert CsvPairs(table, transform=lambda pair: pair.caption)[1] == "two"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"file,caption\na.png,b\n", r"pairs\.csv: expected the columns path and caption, no 'path' in"),
        (b"path\none.png\n", r"no 'caption' in \['path'\]"),
        (b"", r"no 'path' in \[\]"),
        (b"path,caption\n", r"pairs\.csv: no rows"),
        (b"path,caption\ntwo.jpg\n", r"line 2: expected a path and a caption, got 'two\.jpg' and ''"),
        (b"path,caption\ntwo.jpg,b\nthree.jpg,c\n", r"line 3: no such picture: \S+three\.jpg"),
        (b"path,caption\ntwo.jpg,caf\xe9\n", r"pairs\.csv: not a UTF-8 text file"),
        (b'path,caption\ntwo.jpg,"b\n', r"pairs\.csv, behind row 0: broken CSV"),
    ],
)
def test_faults_of_a_csv_are_named_at_construction(table: Path, text: bytes, message: str) -> None:
    table.write_bytes(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CsvPairs(table)


def test_other_faults_of_a_csv(table: Path) -> None:
    pairs = CsvPairs(table)
    (table.parent / "two.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(UnreadableFileError, match=r"two\.jpg: cannot be read \(.*\); fetch or write"):
        pairs[1]
    with pytest.raises(IndexError, match=r"index must be in -2\.\.1, got 2"):
        pairs[2]
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file; write it"):
        CsvPairs(table.parent / "none.csv")


def test_broken_rows_are_left_out_counted_and_named(table: Path) -> None:
    folder = table.parent
    (folder / "cut.jpg").write_bytes(b"\xff\xd8")
    (folder / "three.png").write_bytes(png(3))
    rows = ["path,caption", "in/one.png,one", "cut.jpg,cut", "three.png,three", "none.png,none", ",no path", "two.jpg,"]
    table.write_text("\n".join(rows) + "\n", encoding="utf-8")
    pairs = CsvPairs(table, report=folder / "report")
    assert len(pairs) == 3
    loader = DataLoader(pairs, 3, num_workers=2, collate_fn=list)
    for _ in range(2):  # what is met twice counts once
        assert [pair.caption for batch in loader for pair in batch] == ["one", "three", "three"]
    assert pairs[-2].caption == "three"
    broken = Broken.read(folder / "report")
    assert broken.counts == {"no picture": 2, "no caption": 1, "broken picture": 1}
    assert broken.names["broken picture"] == [f"{table}: cut.jpg"]
    assert broken.names["no picture"] == [f"{table}: line 5", f"{table}: line 6"]
    for name in ("in/one.png", "three.png"):
        (folder / name).write_bytes(b"")
    with pytest.raises(UnreadableFileError, match="cannot be read"):
        pairs[0]
    table.write_text("path,caption\nnone.png,none\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no rows that can be used"):
        CsvPairs(table, report=folder / "report")


def test_palettes_with_transparency_become_rgb_in_silence(table: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    image.save(table.parent / "two.jpg", "PNG", transparency=b"\x00\xff")
    assert CsvPairs(table)[1].image[:, 0, 0].tolist() == [9, 8, 7]


def test_scenes() -> None:
    scenes = Scenes(3, size=32)
    pairs = ScenePairs(scenes)
    assert len(pairs) == len(list(pairs)) == 3
    assert (pairs[2].key, pairs[2].caption) == (scenes.ids[2], scenes[2].caption)
    assert torch.equal(pairs[2].image, scenes[2].image)
    assert ScenePairs(scenes, transform=lambda pair: pair.key)[0] == scenes.ids[0]
