"""What the bytes of a shard say: its samples, their pictures and captions, and a record of what is broken."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import torch
from torch import Tensor

from protoseg.data.images import pillow, read_pixels
from protoseg.data.sample import Pair, UnreadableFileError
from protoseg.utils import checks
from protoseg.utils.extras import require
from protoseg.utils.files import replacing

__all__ = [
    "Broken",
    "BrokenSampleError",
    "Raw",
    "Report",
    "decode",
    "decode_picture",
    "expand",
    "outside",
    "read_shard",
    "shuffled",
    "write_shard",
]

PICTURES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif")
MAX_MEMBER = 2**27
"""Most bytes of a file in a shard: a small compressed tar can claim to hold any number."""
_WANTED = tuple(f".{ending}" for ending in (*PICTURES, "txt", "json"))
_BLOCK = 512  # bytes; a tar consists of such blocks, and ends with blocks of zeros
_LISTED = 5  # names in an error before "and n more"

Reason = Literal[
    "damaged shard", "double name", "unsafe name", "no picture", "broken picture", "no caption", "caption not UTF-8"
]
Fault = Callable[[Reason, str, str, str], None]  # reason, shard, key, problem


class BrokenSampleError(ValueError):
    """A sample cannot be used."""

    def __init__(self, reason: Reason, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


class Raw(NamedTuple):
    """A sample as it lies in a shard: the content of its files by their ending."""

    shard: str
    key: str
    parts: dict[str, bytes]


class Broken(NamedTuple):
    """What was left out of shards, and why.

    Attributes:
        counts: How many by reason: ``"damaged shard"`` (cut off or damaged; its readable samples are used, how many
            are lost is unknown), ``"double name"``, ``"unsafe name"`` (it leads out of a folder), ``"no picture"``,
            ``"broken picture"``, ``"no caption"``, ``"caption not UTF-8"``.
        names: The first few by reason, as ``"SHARD: KEY"``.

    Example:
        >>> print(Broken({"no caption": 2}, {"no caption": ["a.tar: 0007", "b.tar: 0001"]}))
        2 broken: 2 no caption (a.tar: 0007, b.tar: 0001)
    """

    counts: dict[str, int]
    names: dict[str, list[str]]

    def __str__(self) -> str:
        groups = [f"{count} {reason} ({', '.join(self.names[reason])})" for reason, count in self.counts.items()]
        return f"{sum(self.counts.values())} broken" + (f": {'; '.join(groups)}" if groups else "")

    @classmethod
    def read(cls, folder: str | os.PathLike[str], *, most: int = 5) -> Broken:
        """Count what the workers of all ranks have reported so far; what several epochs met counts once.

        Args:
            folder: The ``report`` of `ShardPairs`.
            most: Names to give for a reason.

        Raises:
            FileNotFoundError: There is no such folder.
        """
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give the one that ShardPairs got as report")
        found: dict[tuple[str, str], None] = {}
        for path in sorted(Path(folder).glob("broken-*.jsonl")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                found[_entry(line, f"{path}: {number}")] = None
        counts = Counter(reason for reason, _ in found)
        names = {reason: [name for other, name in found if other == reason][:most] for reason in counts}
        return cls(dict(counts), names)


def _entry(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        return entry["reason"], f"{entry['shard']}: {entry['key']}"
    except ValueError:  # the worker was killed while it wrote
        return "torn line of the report", where


class Report:
    """Appends what is broken to a file, or raises where there is no folder for it.

    Files, and not objects that travel with the samples: they need no collate function that knows of them, work with
    every loader and number of processes, and outlive a run that is killed. One file for each worker of each rank, so
    that nobody writes into another one's line.
    """

    def __init__(self, folder: Path | None, rank: int, worker: int) -> None:
        self._path = None if folder is None else folder / f"broken-{rank}-{worker}.jsonl"

    def __call__(self, reason: Reason, shard: str, key: str, problem: str) -> None:
        """Note one fault."""
        if self._path is None:
            raise UnreadableFileError(
                shard, f"{key}: {reason} ({problem}); mend it, or give ShardPairs report=FOLDER to do without it"
            )
        line = json.dumps({"reason": reason, "shard": shard, "key": key, "problem": problem})
        # Opened for each line: faults are rare, and nothing is left in a buffer when the run is killed.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _webdataset() -> tuple[Any, Any]:
    webdataset = require("webdataset", "reading shards", "pairs")
    return webdataset.shardlists, webdataset.tariterators


def expand(shards: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the shards that paths and brace ranges stand for, all of which exist, in the order of their names."""
    shardlists, _ = _webdataset()
    texts = [os.fspath(each) for each in ([shards] if isinstance(shards, str | os.PathLike) else shards)]
    # Without braces there is nothing to expand, and a backslash is part of a path.
    paths = [Path(name) for text in texts for name in (shardlists.expand_urls(text) if "{" in text else [text])]
    if not paths:
        raise ValueError("ShardPairs: expected at least one shard, got none; does the pattern match any file?")
    if missing := [str(path) for path in paths if not path.is_file()]:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise FileNotFoundError(f"{', '.join(missing[:_LISTED])}{more}: no such shard; only local files are read")
    # Sorted, as folders list their files in an order that can differ from machine to machine.
    ordered = sorted(paths)
    if double := next((a for a, b in itertools.pairwise(ordered) if a == b), None):
        raise ValueError(f"ShardPairs: every shard may occur once, but there is more than one {double}")
    return ordered


class _Blocks:
    """Hands a tar over block by block, so that it is known how far it was read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        head = file.read(_BLOCK)
        file.seek(0)
        self._plain = head[257:262] == b"ustar"  # else compressed, where positions say nothing

    def __str__(self) -> str:
        return str(self._path)

    def read(self, size: int) -> bytes:
        """Return the next block, whatever is asked for: tarfile goes on until it has enough."""
        return self._file.read(_BLOCK)

    def ended(self) -> bool:
        """Return whether zeros follow from the last block that was read, as at the end of a whole tar.

        Python's tarfile takes a cut or a damaged header for the end of the tar and says nothing.
        """
        if not self._plain:
            return True
        self._file.seek(-_BLOCK, os.SEEK_CUR)
        return all(not any(part) for part in iter(lambda: self._file.read(1 << 16), b""))


def outside(name: str) -> bool:
    """Return whether a name would lead out of the folder that it is written or unpacked in."""
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in name


class _Oversized(bytes):
    """Stands for a file that is too large to be read."""

    size = 0


class _Entry(tarfile.TarInfo):
    """A tar's entry whose long name or extended header is not read into memory whatever its size."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        headers = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        names = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if self.type in (*headers, *names) and self.size > 2**20:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        following: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return following


def _members(blocks: _Blocks, fault: Fault) -> Iterator[tuple[str, bytes]]:
    """Give name and content of the files of a tar that can be a sample's."""
    with tarfile.open(fileobj=cast(Any, blocks), mode="r|*", tarinfo=_Entry) as archive:
        for entry in archive:
            archive.members = []  # type: ignore[attr-defined]  # which would grow with the shard
            name = entry.name
            if not entry.isreg() or name.startswith("__") or not name.lower().endswith(_WANTED):
                continue
            if outside(name):
                fault("unsafe name", str(blocks), name, "the name leads out of its folder")
                continue
            if entry.size > MAX_MEMBER:
                oversized = _Oversized()
                oversized.size = entry.size
                yield name, oversized
                continue
            content = archive.extractfile(entry)
            yield name, b"" if content is None else content.read()


def read_shard(path: Path, fault: Fault) -> Iterator[Raw]:
    """Give the samples of a shard, as far as it can be read; nothing in it is decoded.

    Each shard is read on its own: in one stream of many, webdataset joins what a cut shard has left of its last
    sample to a sample of the next shard with the same key.
    """
    _, tar = _webdataset()
    faults: list[str] = []
    last = ""

    def double(error: Exception) -> bool:
        fault("double name", str(path), last, "this name stands twice in a row; the first one is taken")
        return True

    def files() -> Iterator[dict[str, Any]]:
        nonlocal last
        try:
            for name, content in _members(blocks, fault):
                last = name
                yield {"fname": name, "data": content, "__url__": str(path)}
        except UnreadableFileError:  # of the fault's
            raise
        except Exception as error:  # any: what damaged bytes lead tarfile into
            faults.append(str(error) or type(error).__name__)
        if not faults and not blocks.ended():
            faults.append("the end is missing, or a header is damaged")
        yield {}  # the end of the shard

    try:
        opened = path.open("rb")
    except OSError as error:
        fault("damaged shard", str(path), "at the start", str(error))
        return
    with opened:
        blocks = _Blocks(path, opened)
        # Not webdataset's own opening of a path, which also starts commands and connections, and knows no limits.
        for sample in tar.group_by_keys(files(), handler=double):
            parts = {ending: content for ending, content in sample.items() if not ending.startswith("__")}
            if faults and not (parts.keys() & {*PICTURES} and parts.keys() & {"txt", "json"}):
                continue  # its other half went with the rest of the shard
            yield Raw(str(path), sample["__key__"], parts)
    if faults:
        fault("damaged shard", str(path), f"behind {last}" if last else "at the start", faults[0])


def decode(sample: Raw) -> Pair:
    """Turn bytes into a pair, the picture last, as it takes the most time."""
    content = _encoded(sample.parts)
    caption = _caption(sample.parts)
    return Pair(sample.key, decode_picture(content), caption)


def decode_picture(content: bytes) -> Tensor:
    """Decode a picture of a listed format to ``[3, H, W]`` uint8, RGB, upright."""
    try:
        pixels, _ = read_pixels(content, "it")
    except UnreadableFileError as error:
        raise BrokenSampleError("broken picture", str(error).removeprefix("it: ")) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _encoded(parts: dict[str, bytes]) -> bytes:
    for ending in PICTURES:
        content = parts.get(ending)
        if isinstance(content, _Oversized):
            raise BrokenSampleError(
                "broken picture", f"a file of {content.size} bytes; at most {MAX_MEMBER // 2**20} MiB are read"
            )
        if content is not None:
            return content
    raise BrokenSampleError("no picture", f"expected {' or '.join(PICTURES)}, got {', '.join(parts) or 'nothing'}")


def _caption(parts: dict[str, bytes]) -> str:
    try:
        text = _text(parts)
        text.encode()  # half a surrogate pair can stand in JSON, but in no text
    except UnicodeError as error:
        raise BrokenSampleError("caption not UTF-8", str(error)) from error
    if not text.strip():
        raise BrokenSampleError("no caption", "the caption is empty")
    return text.strip()


def _text(parts: dict[str, bytes]) -> str:
    if "txt" in parts:
        return parts["txt"].decode("utf-8-sig")
    if "json" not in parts:
        raise BrokenSampleError("no caption", f"expected txt or json, got {', '.join(parts) or 'nothing'}")
    content = parts["json"].decode("utf-8-sig")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BrokenSampleError("no caption", f"broken JSON ({error})") from error
    text = found.get("caption") if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise BrokenSampleError("no caption", "the JSON holds no field caption with a text")
    return text


def shuffled(samples: Iterator[Raw], size: int, drawing: random.Random) -> Iterator[Raw]:
    """Give all samples; each is drawn from the next ``size`` ones."""
    held: list[Raw] = []
    for sample in samples:
        if len(held) < size:
            held.append(sample)
        elif size:
            place = drawing.randrange(size)
            held[place], sample = sample, held[place]
            yield sample
        else:
            yield sample
    drawing.shuffle(held)
    yield from held


def write_shard(target: Path, pairs: Iterable[Pair], ending: str) -> None:
    """Write one shard, wholly or not at all."""
    keys: set[str] = set()
    with replacing(target) as file, tarfile.open(file, "w") as tar:
        for pair in pairs:
            _check(pair, keys)
            keys.add(pair.key)
            for suffix, content in ((ending, _encode(pair, ending)), ("txt", pair.caption.encode())):
                entry = tarfile.TarInfo(f"{pair.key}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def _check(pair: Pair, keys: set[str]) -> None:
    if not isinstance(pair, Pair):
        raise TypeError(f"write_shards: expected a Pair, got {type(pair).__name__}")
    if outside(pair.key):
        raise ValueError(f"write_shards: a key must not lead out of the folder it is unpacked in, got {pair.key!r}")
    last = pair.key.rpartition("/")[-1]
    if not last or "." in last or pair.key.startswith("__") or pair.key in keys:
        raise ValueError(f"write_shards: a key must be new in its shard, have no dot, no __ in front, got {pair.key!r}")
    if not pair.caption.strip():
        raise ValueError(f"write_shards: {pair.key} has no caption; leave the pair out")
    checks.shape("write_shards", f"the image of {pair.key}", pair.image, (3, "H", "W"))
    checks.not_empty("write_shards", f"the image of {pair.key}", pair.image)
    if pair.image.dtype != torch.uint8:
        raise TypeError(f"write_shards: the image of {pair.key} must be uint8, got {pair.image.dtype}")


def _encode(pair: Pair, ending: str) -> bytes:
    content = io.BytesIO()
    pixels = pair.image.permute(1, 2, 0).contiguous().cpu().numpy()
    pillow().fromarray(pixels).save(
        content, **({"format": "PNG"} if ending == "png" else {"format": "JPEG", "quality": 95})
    )
    return content.getvalue()
