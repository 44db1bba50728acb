"""Pictures with sentences that a CSV lists."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import cast

import torch.distributed as dist
from torch.utils.data import Dataset, get_worker_info

from protoseg.data import UnreadableFileError, _shards
from protoseg.data._pair import Pair, T

__all__ = ["CsvPairs"]


class CsvPairs(Dataset[T]):
    r"""Pairs that a CSV lists.

    All rows are read at construction, pictures at access.

    Args:
        path: UTF-8 file whose first line names the columns ``path`` (of a JPEG or PNG, from the CSV's folder on) and
            ``caption``; others are passed over.
        transform: What is made of a pair; ``None`` gives the pair.
        report: Folder for the names of broken rows, which `Broken.read` counts: rows without a path, a picture or a
            caption are left out, and in the place of a picture that turns out to be unreadable comes the next one of
            the list that is whole, as a place in a list cannot be left out. ``None``: a broken row is an error.

    Raises:
        FileNotFoundError: The file, or without ``report`` a picture that it lists, does not exist.
        ValueError: A column is missing, no row is left, the file is no UTF-8 or no CSV; without ``report`` also: a cell
            is missing. The message names the line.
        UnreadableFileError: At access: the picture, or with ``report`` every one, is truncated or of another format.
        IndexError: At access, outside ``-N..N-1``.
        ImportError: Pillow is not installed.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 6)).save(folder / "one.png")
        >>> _ = (folder / "pairs.csv").write_text("path,caption\none.png,\"a night, moonless\"\n")
        >>> pair = CsvPairs(folder / "pairs.csv")[0]
        >>> pair.key, pair.image.shape, pair.caption
        ('one', torch.Size([3, 6, 8]), 'a night, moonless')
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        transform: Callable[[Pair], T] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.transform = transform
        self.report = None if report is None else Path(report)
        if self.report is not None:
            self.report.mkdir(parents=True, exist_ok=True)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file; write it with the header path,caption")
        self._rows: list[tuple[str, str]] = []
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                self._read(csv.DictReader(file, strict=True))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not a UTF-8 text file ({error}); save it as UTF-8") from error
        except csv.Error as error:
            raise ValueError(f"{self.path}, behind row {len(self._rows)}: broken CSV ({error}); mend it") from error
        if not self._rows:
            raise ValueError(f"{self.path}: no rows that can be used; write one for each picture behind the header")

    def _read(self, table: csv.DictReader[str]) -> None:
        columns = list(table.fieldnames or [])
        if missing := [name for name in ("path", "caption") if name not in columns]:
            raise ValueError(f"{self.path}: expected the columns path and caption, no {missing[0]!r} in {columns}")
        for row in table:
            where = f"{self.path}, line {table.line_num}"
            name, caption = (row["path"] or "").strip(), (row["caption"] or "").strip()
            if not name or not caption:
                problem = f"expected a path and a caption, got {name!r} and {caption!r}"
                if self.report is None:
                    raise ValueError(f"{where}: {problem}")
                self._tell("no caption" if name else "no picture", f"line {table.line_num}", problem)
            elif not (self.path.parent / name).is_file():
                problem = f"no such picture: {self.path.parent / name}"
                if self.report is None:
                    raise FileNotFoundError(f"{where}: {problem}; add it or drop the line")
                self._tell("no picture", f"line {table.line_num}", problem)
            else:
                self._rows.append((name, caption))

    def _tell(self, reason: _shards.Reason, key: str, problem: str) -> None:
        info = get_worker_info()
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        # A row is told of by whoever meets it; `Broken.read` counts it once.
        _shards.Report(self.report, rank, 0 if info is None else info.id)(reason, str(self.path), key, problem)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> T:
        if not -len(self) <= index < len(self):
            raise IndexError(f"CsvPairs: index must be in {-len(self)}..{len(self) - 1}, got {index}")
        for place in range(index, index + len(self)):
            name, caption = self._rows[place % len(self)]
            path = self.path.parent / name
            try:
                image = _shards.picture(path.read_bytes())
            except (OSError, _shards.BrokenSampleError) as error:
                if self.report is None or place == index + len(self) - 1:
                    raise UnreadableFileError(
                        path, f"cannot be read ({error}); fetch or write the file again"
                    ) from error
                self._tell("broken picture", name, str(error))
                continue
            break
        pair = Pair(PurePath(name).with_suffix("").as_posix(), image, caption)
        return cast(T, pair) if self.transform is None else self.transform(pair)
