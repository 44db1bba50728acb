"""Pictures by what people call them: with folders or without, Windows paths, endings, other forms of an umlaut."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from protoseg.data.images import ENDINGS

__all__ = ["AmbiguousNameError", "PictureIndex", "list_files", "plain_name", "without_ending"]

_SKIPPED = {"__MACOSX", "Thumbs.db"}  # what archives and systems leave between the pictures


class AmbiguousNameError(ValueError):
    """A name stands for more than one picture."""


def list_files(root: Path, endings: Sequence[str]) -> list[str]:
    """Paths of the files below a folder with one of the endings, in any case, from the folder on, in order."""
    found = []
    for folder, folders, names in os.walk(root):
        # Hidden folders hold thumbnails and the like; links to folders are not followed, as they may go round.
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("."))
        below = Path(folder).relative_to(root)
        found += [
            (below / name).as_posix()
            for name in names
            if name.lower().endswith(tuple(endings)) and name not in _SKIPPED and not name.startswith(".")
        ]
    return sorted(found)


def plain_name(text: str) -> str:
    """A path as it may stand in a table, with slashes, without a drive or ``./``, composed (NFC)."""
    name = unicodedata.normalize("NFC", text.strip().strip("\"'")).replace("\\", "/")
    name = name.removeprefix("file://")
    if name[1:2] == ":":  # a drive
        name = name[2:]
    while name.startswith("./"):
        name = name[2:]
    return name.strip("/")


def without_ending(name: str) -> str:
    """A name without the ending of a picture; other dots are part of it."""
    stem, dot, ending = name.rpartition(".")
    return stem if dot and stem and f".{ending.lower()}" in ENDINGS else name


class PictureIndex:
    r"""Finds pictures by names as they stand in tables and annotations.

    In this order: the whole path, the path's end as far as it is known, the same without ending, the same in another
    case, and the number where a name is one (spreadsheets drop leading zeros).

    Args:
        paths: Of the pictures, with ``/`` between folders.

    Attributes:
        paths: As given.
        names: One for each picture: its path without the ending, with it where another picture has the same.

    Example:
        >>> index = PictureIndex(["dogs/IMG 1.JPG", "0007.png"])
        >>> index.find(r"C:\photos\\dogs\\img 1.jpg"), index.find("IMG 1"), index.find("7"), index.find("cat")
        (0, 0, 1, None)
        >>> index.names
        ['dogs/IMG 1', '0007']
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        times = Counter(without_ending(path) for path in self.paths)
        self.names = [path if times[without_ending(path)] > 1 else without_ending(path) for path in self.paths]
        self._exact: dict[str, list[int]] = {}
        self._folded: dict[str, list[int]] = {}
        self._numbers: dict[int, list[int]] = {}
        for index, path in enumerate(self.paths):
            plain = plain_name(path)
            for key in {*_ends(plain), *_ends(without_ending(plain))}:
                self._exact.setdefault(key, []).append(index)
                self._folded.setdefault(key.casefold(), []).append(index)
            last = without_ending(PurePosixPath(plain).name)
            if last.isascii() and last.isdigit():
                self._numbers.setdefault(int(last), []).append(index)

    def __len__(self) -> int:
        return len(self.paths)

    def find(self, text: str) -> int | None:
        """The picture's place, or ``None`` where there is none.

        Raises:
            AmbiguousNameError: The name stands for more than one picture.
        """
        name = plain_name(text)
        if not name:
            return None
        double: list[int] = []
        for table, key in ((self._exact, name), (self._folded, name.casefold())):
            for form in (key, without_ending(key)):
                for end in _ends(form):
                    found: list[int] = sorted({*table.get(end, [])})
                    if len(found) == 1:
                        return found[0]
                    double = double or found
        numbered: list[int] = []
        if name.isascii() and name.isdigit():
            numbered = self._numbers.get(int(name), [])
        if len(numbered) == 1:
            return numbered[0]
        if double:
            raise AmbiguousNameError(
                f"{text!r} stands for more than one picture: {', '.join(self.paths[place] for place in double[:3])}; "
                "write the folder too"
            )
        return None

    def knows(self, text: str) -> bool:
        """Whether a name stands for a picture, or for several."""
        try:
            return self.find(text) is not None
        except AmbiguousNameError:
            return True

    def known(self, texts: Iterable[str]) -> int:
        """How many of the names stand for a picture."""
        return sum(self.knows(text) for text in texts)


def _ends(path: str) -> list[str]:
    """A path and its ends, the longest first."""
    parts = path.split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]
