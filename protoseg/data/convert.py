"""Turn the pickled tags of other projects (``cls_labels.npy``) into ``labels.csv``, without running anything in them.

python -m protoseg.data.convert cls_labels.npy labels.csv [--classes classes.txt]
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protoseg.data.files import read_classes
from protoseg.data.folders import VOC_CLASSES
from protoseg.utils.files import replacing

__all__ = ["read_label_file", "write_labels"]


class _Array:
    """Takes the place of an array while it is read; numpy sees its bytes only when they are known to be numbers."""

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def numbers(self) -> NDArray[Any]:
        """The array, of one axis."""
        if self.state is None or len(self.state) != 5:
            raise pickle.UnpicklingError("an array without content")
        _, shape, kind, _, content = self.state
        if not (
            isinstance(kind, _Kind) and isinstance(content, bytes) and isinstance(shape, tuple) and len(shape) == 1
        ):
            raise pickle.UnpicklingError(f"expected arrays of numbers with one axis, got shape {shape!r}")
        found = np.frombuffer(content, kind.numpy())
        if len(found) != shape[0]:
            raise pickle.UnpicklingError(f"an array of {shape[0]} numbers holds {len(found)}")
        return found


class _Kind:
    """Takes the place of a dtype."""

    def __init__(self, name: str = "", *_: object) -> None:
        self.name, self.order = name, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = str(state[1])

    def numpy(self) -> np.dtype[Any]:
        """The dtype, of plain numbers only."""
        if not (isinstance(self.name, str) and self.name[:1] in "biuf" and self.name[1:] in ("1", "2", "4", "8")):
            raise pickle.UnpicklingError(f"expected numbers, got the type {self.name!r}")
        return np.dtype((self.order if self.order in "<>=" else "=") + self.name)


class _Scalar:
    """Takes the place of a number of numpy's."""

    def __init__(self, kind: _Kind, content: bytes) -> None:
        if not (isinstance(kind, _Kind) and isinstance(content, bytes)):
            raise pickle.UnpicklingError("expected a number")
        self.value = np.frombuffer(content, kind.numpy())[0]

    def __hash__(self) -> int:
        return hash(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Scalar) and bool(self.value == other.value)


class _Bytes(bytes):
    """Bytes that a pickle of Python 2's kind holds as text."""

    def __new__(cls, text: str = "", encoding: str = "latin1") -> _Bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise pickle.UnpicklingError("expected bytes written as latin1")
        return super().__new__(cls, text.encode("latin1"))


_KNOWN = {
    ("_codecs", "encode"): _Bytes,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Kind,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only arrays and strings are read") from None


def read_label_file(path: str | os.PathLike[str]) -> dict[str, NDArray[np.bool_]]:
    """Read a pickled dict from picture names to multi-hot labels, as AMN, MCTformer, SIPE, IRN and others ship it.

    Loading such a file with numpy runs whatever its author wrote into it. Here nothing of it is called: arrays of
    numbers, numbers and strings are read, and anything else is an error. Names that are whole numbers of ten digits
    become VOC's, 2007000032 to ``2007_000032``.

    Args:
        path: The file.

    Returns:
        Labels ``[C]`` by name, in the order of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, it holds something else, or its labels are not 0 and 1 or of several lengths.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "cls_labels.npy"
        >>> np.save(path, {"2007_000032": np.array([1.0, 0.0, 1.0], np.float32)}, allow_pickle=True)
        >>> read_label_file(path)["2007_000032"].tolist()
        [True, False, True]
    """
    path = Path(path)
    content = io.BytesIO(path.read_bytes())
    try:
        version = np.lib.format.read_magic(content)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, kind = read_header[version](content)
        if shape != () or kind != np.dtype(object):
            raise ValueError(f"it holds an array of {kind} of shape {shape}")
        whole = _Unpickler(content).load()
        table = whole.state[4][0] if isinstance(whole, _Array) and whole.state else whole
        if not isinstance(table, dict):
            raise ValueError(f"it holds a {type(table).__name__}")
        found = {_name(key): _labels(key, value) for key, value in table.items()}
    except Exception as error:  # bytes that are no pickle can be read as anything, and fail in any way
        raise ValueError(
            f"{path}: expected a pickled dict from picture names to arrays of 0 and 1, as np.save writes it: {error}"
        ) from error
    if len({len(labels) for labels in found.values()}) > 1:
        raise ValueError(f"{path}: expected as many classes in every picture, got labels of several lengths")
    return found


def _name(key: object) -> str:
    number = key.value if isinstance(key, _Scalar) else key
    if isinstance(number, int | np.integer):
        digits = str(int(number))
        return f"{digits[:4]}_{digits[4:]}" if len(digits) == 10 else digits
    if isinstance(key, str):
        return key
    raise ValueError(f"a picture's name is a {type(key).__name__}")


def _labels(key: object, value: object) -> NDArray[np.bool_]:
    if not isinstance(value, _Array):
        raise ValueError(f"the labels of {_name(key)!r} are a {type(value).__name__}")
    numbers = value.numbers()
    if not np.isin(numbers, (0, 1)).all():
        raise ValueError(f"the labels of {_name(key)!r} are not all 0 or 1")
    return numbers.astype(bool)


def write_labels(
    path: str | os.PathLike[str], labels: Mapping[str, NDArray[np.bool_]], classes: Sequence[str] | None = None
) -> None:
    r"""Write ``labels.csv`` as :class:`protoseg.data.folders.VOCFolder` reads it, in one step.

    Args:
        path: The file; an older one is replaced.
        labels: Labels ``[C]`` by picture name.
        classes: Names of the ``C`` classes without spaces; by default those of PASCAL VOC.

    Raises:
        ValueError: The labels do not have as many classes as there are names.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels.csv"
        >>> write_labels(path, {"one": np.array([True, False])}, ["cat", "dog"])
        >>> path.read_text()
        'id,labels\none,cat\n'
    """
    names = VOC_CLASSES if classes is None else tuple(classes)
    for key, present in labels.items():
        if len(present) != len(names):
            raise ValueError(
                f"write_labels: the labels of {key!r} have {len(present)} classes and {len(names)} are named; name "
                "them with --classes, a file with one name a line, background first"
            )
    path = Path(path)
    with replacing(path) as whole, whole.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("id", "labels"))
        for key, present in labels.items():
            table.writerow((key, " ".join(name for name, here in zip(names, present, strict=True) if here)))


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, convert and say what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m protoseg.data.convert", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("pickled", type=Path, help="such as cls_labels.npy")
    parser.add_argument("csv", type=Path, help="such as labels.csv")
    parser.add_argument("--classes", type=Path, help="one name a line, background first (default: those of VOC)")
    args = parser.parse_args(argv)
    try:
        if args.classes is not None and not args.classes.is_file():
            raise FileNotFoundError(f"{args.classes}: no such file")
        labels = read_label_file(args.pickled)
        write_labels(args.csv, labels, None if args.classes is None else read_classes(args.classes)[0])
    except (OSError, ValueError) as error:
        raise SystemExit(f"convert: {error}") from error
    tags = sum(int(present.sum()) for present in labels.values())
    print(f"{args.csv}: {len(labels)} pictures, {tags} tags")


if __name__ == "__main__":
    main()
