"""Pickled tags of other projects become labels.csv, and nothing in them is run."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protoseg.data import VOC_CLASSES, convert
from protoseg.data.convert import read_label_file

TAGS = {
    "2007_000032": np.eye(20, dtype=np.float32)[0] + np.eye(20, dtype=np.float32)[14],
    "2010_005582": np.zeros(20, np.float32),
}


def save(path: Path, content: Any, protocol: int | None = None) -> Path:
    """As ``np.save`` does, in any protocol."""
    if protocol is None:
        np.save(path, content, allow_pickle=True)
        return path
    whole = np.empty((), object)
    whole[()] = content
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(whole, file, protocol=protocol)
    return path


@pytest.mark.parametrize("protocol", [None, 0, 1, 2, 3, 4])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.uint8, np.int64, np.bool_, ">f4"])
def test_every_kind_of_file(tmp_path: Path, protocol: int | None, kind: Any) -> None:
    tags = {name: labels.astype(kind) for name, labels in TAGS.items()}
    found = read_label_file(save(tmp_path / "cls_labels.npy", tags, protocol))
    assert list(found) == list(TAGS)
    for name, labels in TAGS.items():
        assert found[name].tolist() == labels.astype(bool).tolist()


def test_amns_numbers_become_names(tmp_path: Path) -> None:
    tags = {np.int32(2007000032): TAGS["2007_000032"], np.int64(2011003256): TAGS["2010_005582"], 9: np.ones(20)}
    for protocol in (2, 4):
        found = read_label_file(save(tmp_path / "cls_labels.npy", tags, protocol))
        assert list(found) == ["2007_000032", "2011_003256", "9"]


def test_command_line(tmp_path: Path) -> None:
    pickled, written = save(tmp_path / "cls_labels.npy", TAGS), tmp_path / "labels.csv"
    command = [sys.executable, "-m", "protoseg.data.convert", str(pickled), str(written)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.strip().endswith("2 pictures, 2 tags")
    assert written.read_text() == "id,labels\n2007_000032,aeroplane person\n2010_005582,\n"
    assert not list(tmp_path.glob(".*"))


def test_classes_of_other_data(tmp_path: Path) -> None:
    pickled = save(tmp_path / "cls_labels.npy", {"one": np.array([0.0, 1.0])})
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\n")
    convert.main([str(pickled), str(tmp_path / "labels.csv"), "--classes", str(tmp_path / "classes.txt")])
    assert (tmp_path / "labels.csv").read_text() == "id,labels\none,dog\n"
    with pytest.raises(SystemExit, match="have 2 classes and 20 are named; name them with --classes"):
        convert.main([str(pickled), str(tmp_path / "other.csv")])
    assert not (tmp_path / "other.csv").exists()
    with pytest.raises(SystemExit, match=r"nothing\.txt: no such file"):
        convert.main([str(pickled), str(tmp_path / "other.csv"), "--classes", str(tmp_path / "nothing.txt")])


class Evil:
    """Creates a file where a pickle is loaded without care."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


class Setting:
    """Sets attributes of what the file is read with."""

    def __reduce__(self) -> Any:
        return np.ndarray, ((1,),), {"numbers": 1}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["value", "key", "whole"])
def test_nothing_is_run(tmp_path: Path, protocol: int, place: str) -> None:
    trap = tmp_path / "trap"
    evil = Evil(str(trap))
    content: Any = {"value": {"one": evil}, "key": {"one": TAGS["2007_000032"], evil: 1}, "whole": evil}[place]
    path = save(tmp_path / "cls_labels.npy", content, protocol)
    with pytest.raises(ValueError, match=r"it asks for (io|_io|builtins|__builtin__)\.open; only arrays and strings"):
        read_label_file(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"one": Setting()}, "expected a pickled dict"),
        ({"one": [1.0, 0.0]}, "the labels of 'one' are a list"),
        ({"one": np.array([0.5, 1.0])}, "not all 0 or 1"),
        ({"one": np.array([np.nan])}, "not all 0 or 1"),
        ({"one": np.array(["a"])}, "expected numbers, got the type 'U1'"),
        ({"one": np.eye(2)}, r"one axis, got shape \(2, 2\)"),
        ({"one": np.array([{}])}, "one axis, got shape"),
        ({None: np.ones(2)}, "a picture's name is a NoneType"),
        (["one"], "it holds a list"),
        ({"one": np.ones(2), "two": np.ones(3)}, "labels of several lengths"),
    ],
)
def test_what_is_no_label_file(tmp_path: Path, content: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_label_file(save(tmp_path / "cls_labels.npy", content, 4))


def test_other_and_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "cls_labels.npy"
    with pytest.raises(FileNotFoundError):
        read_label_file(path)
    np.save(path, np.eye(3))
    with pytest.raises(ValueError, match="it holds an array of float64"):
        read_label_file(path)
    whole = save(path, TAGS).read_bytes()
    for length in (0, 5, 60, 200, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cls_labels\.npy: expected a pickled dict"):
            read_label_file(path)


def test_voc_has_the_twenty_classes_that_these_files_count() -> None:
    assert len(VOC_CLASSES) == len(TAGS["2007_000032"])
