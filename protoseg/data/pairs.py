"""Pictures with a sentence each, for contrastive training: webdataset shards, a CSV, made scenes."""

from __future__ import annotations

import csv
import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from protoseg.data.sample import Pair, T, UnreadableFileError
from protoseg.data.scenes import Scenes
from protoseg.data.shards import (
    Broken,
    BrokenSampleError,
    Raw,
    Reason,
    Report,
    decode,
    decode_picture,
    expand,
    outside,
    read_shard,
    shuffled,
    write_shard,
)
from protoseg.utils import checks

__all__ = ["Broken", "CsvPairs", "Pair", "ScenePairs", "ShardPairs", "write_shards"]

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class ShardPairs(IterableDataset[T]):
    r"""A stream of pairs from webdataset shards.

    A shard is a tar with ``KEY.jpg`` (or ``.jpeg``, ``.png``) and, next to it, ``KEY.txt`` with the caption or
    ``KEY.json`` with a field ``caption``; a text goes before JSON, and other files are passed over. ``KEY`` ends at the
    first dot of the file's name. Nothing is unpickled.

    What is guaranteed, with the same shards, arguments, number of ranks and number of workers:

    - *One exact epoch* (the default): each shard is read by one worker of one rank, so each sample is seen exactly once
      per epoch over all of them; which shards a worker reads, and in which order, depends on ``(seed, epoch)``.
      Ranks get different numbers of samples, so in a training step that all ranks take part in one of them waits
      for ever at the end of the epoch: use ``resampled``, or stop together. With fewer shards than workers some
      workers have nothing to do. The loader must keep ``drop_last=False``.
    - *Resampled*: each worker draws shards with replacement, from ``(seed, epoch, rank, worker)``. On each rank an
      epoch is exactly ``length`` pairs, shared out over its workers as evenly as can be; with a ``length`` that is a
      multiple of batch size times workers all batches are full.
    - *Order*: a worker gives the same pairs in the same order each time.
    - *Going on*: with ``epoch`` and ``start``, each worker gives exactly the rest of its own stream: nothing twice,
      nothing left out. Pairs that the loader had fetched but not handed over do not count as seen. The samples before
      ``start`` are read and decoded again, but not transformed, as only that tells which of them are broken. Batches
      of different workers may take turns in another order than in a run that was not stopped.

    The stream shares itself out over ranks: the loader must not do it again, as accelerate's ``prepare`` would.

    Args:
        shards: Local path, brace range (``"pairs-{000000..000019}.tar"``), or several of these.
        transform: What is made of a pair in the worker; its errors are not caught. ``None`` gives the pair.
        report: Folder for the names of broken samples, which are skipped; `Broken.read` counts them. ``None``: a broken
            sample is an error. A damaged shard counts as broken, and what is readable of it is used.
        resampled: Whether shards are drawn with replacement.
        length: Pairs per epoch and rank, at least 1, only with ``resampled``; ``None`` is a stream without end.
        shuffle: Size of the buffer from which samples are drawn at random, at least 0, in samples of each worker; it
            holds files, not pixels. 0: samples, and in an exact epoch shards too, come in their own order.
        seed: Which order, at least 0.
        epoch: Number of the first epoch, at least 0; `set_epoch` sets the next ones.
        start: Pairs of this rank to pass over in the first epoch, at least 0: the largest ``Pair.place`` number that
            the training has got from each worker, one entry per worker (one if there are none), or one for all.
        rank: This process's number; ``None`` asks torch.distributed when the iteration starts.
        world: Number of processes, given with ``rank``.

    Raises:
        FileNotFoundError: At construction: a shard does not exist.
        ValueError: An argument is out of its range; when the iteration starts: ``start`` has not one entry per worker.
        UnreadableFileError: When a broken sample comes and ``report`` is ``None``.
        RuntimeError: ``resampled`` finds nothing to give.
        ImportError: webdataset or Pillow is not installed.

    Example:
        >>> import tempfile
        >>> pairs = [Pair(f"{n:04d}", torch.full((3, 8, 8), n, dtype=torch.uint8), f"number {n}") for n in range(6)]
        >>> shards = write_shards(pairs, tempfile.mkdtemp(), 2)
        >>> stream = ShardPairs(shards, seed=1, transform=lambda pair: (pair.caption, pair.place))
        >>> seen = list(stream)
        >>> sorted(text for text, _ in seen)
        ['number 0', 'number 1', 'number 2', 'number 3', 'number 4', 'number 5']
        >>> worker, number = seen[3][1]  # the run stops here, and goes on
        >>> list(ShardPairs(shards, seed=1, transform=stream.transform, start=[number])) == seen[4:]
        True
    """

    def __init__(
        self,
        shards: Paths,
        *,
        transform: Callable[[Pair], T] | None = None,
        report: str | os.PathLike[str] | None = None,
        resampled: bool = False,
        length: int | None = None,
        shuffle: int = 1000,
        seed: int = 0,
        epoch: int = 0,
        start: int | Sequence[int] = 0,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        self.shards = expand(shards)
        self.start = start if isinstance(start, int) else tuple(start)
        starts = (self.start,) if isinstance(self.start, int) else self.start
        for name, number in (("shuffle", shuffle), ("seed", seed), ("epoch", epoch), *(("start", n) for n in starts)):
            _at_least("ShardPairs", name, number, 0)
        if length is not None:
            _at_least("ShardPairs", "length", length, 1)
            if not resampled:
                raise ValueError(f"ShardPairs: length={length} needs resampled=True; an exact epoch has its own length")
        self._place: tuple[int, int] | None = None
        if rank is not None or world is not None:
            if rank is None or world is None or not 0 <= rank < world:
                raise ValueError(f"ShardPairs: rank must be in 0..world-1, both or neither, got {rank} and {world}")
            self._place = rank, world
        self._inherited = (0, 1)
        self.transform = transform
        self.report = None if report is None else Path(report)
        if self.report is not None:
            self.report.mkdir(parents=True, exist_ok=True)
        self.resampled, self.length, self.shuffle, self.seed = resampled, length, shuffle, seed
        self._first = epoch
        # In shared memory, so that set_epoch also reaches workers that a loader keeps from epoch to epoch.
        self._epoch = torch.tensor(epoch).share_memory_()  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not a fork gets this copy, and has no process group to ask.
        return {**self.__dict__, "_inherited": self._where()}

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("ShardPairs: nobody knows the length before all shards are read; set resampled and length")
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration, also in workers that run already; ``start`` is for the first only.

        Args:
            epoch: At least 0.
        """
        _at_least("ShardPairs.set_epoch", "epoch", epoch, 0)
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[T]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch = int(self._epoch)
        skip = self.start if isinstance(self.start, int) else self._own(self.start, worker, workers)
        skip = skip if epoch == self._first else 0
        end = None if self.length is None else self.length // workers + (worker < self.length % workers)
        pairs = self._pairs(epoch, worker, workers)
        for number, pair in enumerate(itertools.islice(pairs, end), start=1):
            if number > skip:
                pair = pair._replace(place=(worker, number))
                yield cast(T, pair) if self.transform is None else self.transform(pair)

    @staticmethod
    def _own(start: tuple[int, ...], worker: int, workers: int) -> int:
        if len(start) != workers:
            raise ValueError(
                f"ShardPairs: start has {len(start)} entries, but the loader has {workers} workers; "
                "go on with as many as the stopped run had"
            )
        return start[worker]

    def _where(self) -> tuple[int, int]:
        if self._place is not None:
            return self._place
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return self._inherited

    def _pairs(self, epoch: int, worker: int, workers: int) -> Iterator[Pair]:
        """Give this worker's whole pairs, in their order."""
        rank, world = self._where()
        report = Report(self.report, rank, worker)
        # A text as seed is hashed in the same way on every machine, and no two of these are the same.
        drawing = random.Random(f"drawn {self.seed} {epoch} {rank} {worker}")
        opened = 0  # shards since the last pair

        def raw() -> Iterator[Raw]:
            nonlocal opened
            for shard in (
                self._drawn(drawing) if self.resampled else self._own_shards(epoch, rank, world)[worker::workers]
            ):
                # The buffer can take its size in shards of one sample each before anything comes out.
                if self.resampled and opened > 10 * (self.shuffle + len(self.shards)):
                    raise RuntimeError(
                        f"ShardPairs: {opened} shards held nothing whole; what is in {shard}, or in report?"
                    )
                opened += 1
                yield from read_shard(shard, report)

        # The buffer holds undecoded samples: they are smaller, and the order does not depend on which are broken.
        for sample in shuffled(raw(), self.shuffle, random.Random(f"buffer {self.seed} {epoch} {rank} {worker}")):
            try:
                pair = decode(sample)
            except BrokenSampleError as error:
                report(error.reason, sample.shard, sample.key, str(error))
                continue
            opened = 0
            yield pair

    def _drawn(self, drawing: random.Random) -> Iterator[Path]:
        while True:
            yield drawing.choice(self.shards)

    def _own_shards(self, epoch: int, rank: int, world: int) -> list[Path]:
        order = list(self.shards)
        if self.shuffle:
            random.Random(f"shards {self.seed} {epoch}").shuffle(order)
        return order[rank::world]


class CsvPairs(Dataset[T]):
    r"""Pairs that a CSV lists.

    All rows are read at construction, pictures at access. A path that leads out of the CSV's folder is refused.

    Args:
        path: UTF-8 file whose first line names the columns ``path`` (of a picture, from the CSV's folder on) and
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
            elif outside(name):
                problem = f"the path leads out of the CSV's folder: {name}"
                if self.report is None:
                    raise ValueError(f"{where}: {problem}; move the picture or the CSV")
                self._tell("unsafe name", f"line {table.line_num}", problem)
            elif not (self.path.parent / name).is_file():
                problem = f"no such picture: {self.path.parent / name}"
                if self.report is None:
                    raise FileNotFoundError(f"{where}: {problem}; add it or drop the line")
                self._tell("no picture", f"line {table.line_num}", problem)
            else:
                self._rows.append((name, caption))

    def _tell(self, reason: Reason, key: str, problem: str) -> None:
        info = get_worker_info()
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        # A row is told of by whoever meets it; `Broken.read` counts it once.
        Report(self.report, rank, 0 if info is None else info.id)(reason, str(self.path), key, problem)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> T:
        if not -len(self) <= index < len(self):
            raise IndexError(f"CsvPairs: index must be in {-len(self)}..{len(self) - 1}, got {index}")
        for place in range(index, index + len(self)):
            name, caption = self._rows[place % len(self)]
            path = self.path.parent / name
            try:
                image = decode_picture(path.read_bytes())
            except (OSError, BrokenSampleError) as error:
                if self.report is None or place == index + len(self) - 1:
                    raise UnreadableFileError(
                        path, f"cannot be read ({error}); fetch or write the file again"
                    ) from error
                self._tell("broken picture", name, str(error))
                continue
            break
        pair = Pair(PurePath(name).with_suffix("").as_posix(), image, caption)
        return cast(T, pair) if self.transform is None else self.transform(pair)


class ScenePairs(Dataset[T]):
    """Pairs from made scenes.

    Args:
        scenes: Where picture and caption come from; masks and tags stay there.
        transform: What is made of a pair; ``None`` gives the pair.

    Raises:
        IndexError: At access, outside ``-N..N-1``.

    Example:
        >>> pair = ScenePairs(Scenes(10, size=32))[3]
        >>> pair.key, pair.image.shape, pair.caption.startswith("a photo of a ")
        ('scene-0-000003', torch.Size([3, 32, 32]), True)
    """

    def __init__(self, scenes: Scenes, *, transform: Callable[[Pair], T] | None = None) -> None:
        self.scenes = scenes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> T:
        sample = self.scenes[index]
        pair = Pair(sample.id, sample.image, sample.caption or "")
        return cast(T, pair) if self.transform is None else self.transform(pair)


def write_shards(
    pairs: Iterable[Pair],
    folder: str | os.PathLike[str],
    shard_size: int = 1000,
    *,
    name: str = "pairs",
    ending: Literal["png", "jpg"] = "png",
) -> list[Path]:
    """Write pairs as shards ``NAME-000000.tar``, ..., each of them wholly or not at all.

    A shard is written under another name and then renamed, so that a run that is stopped leaves whole shards only.

    Args:
        pairs: What to write; `CsvPairs` and `ScenePairs` will do. Only one pair is held at a time.
        folder: Where to; it is made if need be, and holds no shards of this name yet.
        shard_size: Pairs in a shard, at least 1.
        name: How the shards' names begin.
        ending: ``"png"`` keeps every pixel, ``"jpg"`` (quality 95) is smaller.

    Returns:
        The shards, in order.

    Raises:
        FileExistsError: The folder holds shards of this name, with which the new ones would be mixed.
        TypeError: An entry is not a `Pair`, or its picture not a uint8 tensor.
        ValueError: An argument is out of its range, or a key, picture or caption is one that `ShardPairs` cannot read.
        ImportError: Pillow is not installed.

    Example:
        >>> import tempfile
        >>> shards = write_shards(ScenePairs(Scenes(5, size=32)), tempfile.mkdtemp(), 2)
        >>> [path.name for path in shards]
        ['pairs-000000.tar', 'pairs-000001.tar', 'pairs-000002.tar']
    """
    _at_least("write_shards", "shard_size", shard_size, 1)
    checks.choice("write_shards", "ending", ending, ("png", "jpg"))
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    if older := sorted(root.glob(f"{name}-*.tar")):
        raise FileExistsError(f"{older[0]}: a shard of this name exists; remove it or choose another folder or name")
    written: list[Path] = []
    for number, group in itertools.groupby(enumerate(pairs), key=lambda entry: entry[0] // shard_size):
        written.append(root / f"{name}-{number:06d}.tar")
        write_shard(written[-1], (pair for _, pair in group), ending)
    return written


def _at_least(where: str, name: str, number: int, low: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{where}: {name} must be an int, got {type(number).__name__}")
    if number < low:
        raise ValueError(f"{where}: {name} must be at least {low}, got {number}")
