"""Everything that is wrong with a data set, in one list, before anything is trained."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protoseg.data.folders import TaggedPictures
from protoseg.data.images import Header, decode, read_header, to_rgb
from protoseg.data.plain import PictureFolder
from protoseg.data.sample import UnreadableFileError
from protoseg.data.tables import listed

__all__ = ["Fault", "Survey", "survey"]

DECODED = 5000  # pictures of a split up to which all pixels are read; of more pictures the headers and the ends


class Fault(NamedTuple):
    """Something that has to be mended, or left out.

    Attributes:
        where: The split and what it is about.
        problem: What is wrong, and what to do.
    """

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


class Survey(NamedTuple):
    """What was found.

    Attributes:
        facts: What was read, a sentence each.
        faults: What is wrong.
        broken: By split: the pictures that cannot be used, with the reason.
    """

    facts: list[str]
    faults: list[Fault]
    broken: dict[str, dict[str, str]]

    def __str__(self) -> str:
        lines = list(self.facts)
        if self.faults:
            lines += [
                "",
                f"{len(self.faults)} faults:",
                *(f"  {number}. {each}" for number, each in enumerate(self.faults, 1)),
            ]
        else:
            lines += ["", "no faults"]
        return "\n".join(lines)


class _File(NamedTuple):
    split: str
    name: str
    path: Path


class _Seen(NamedTuple):
    """What is known of the pictures of a split after they were looked at."""

    headers: dict[int, Header]
    broken: dict[str, str]
    masked: int
    occurring: np.ndarray[tuple[int], np.dtype[np.int64]]  # pictures with a mask in which a class occurs
    tagged: np.ndarray[tuple[int], np.dtype[np.int64]]  # pictures with a mask that have the tag
    contrary: list[str]  # whose masks lack a tag
    extra: list[str]  # whose masks have a class without its tag
    values: set[int]


def survey(splits: Mapping[str, TaggedPictures]) -> Survey:
    """Look at all pictures, masks and tags.

    Args:
        splits: Data sets by name, of the same classes.

    Returns:
        Facts, faults, and which pictures cannot be used.
    """
    facts: list[str] = []
    faults: list[Fault] = []
    broken: dict[str, dict[str, str]] = {}
    looks = {split: _look(pictures) for split, pictures in splits.items()}
    contents = _contents(splits, looks)
    for split, pictures in splits.items():
        seen = looks[split]
        facts += [*pictures.notes, *_told(split, pictures, seen), *_doubles(split, pictures, contents[split])]
        faults += [*_of_tags(split, pictures), *_of_files(split, seen), *_of_masks(split, pictures, seen)]
        broken[split] = seen.broken
    faults += _overlaps(splits, contents)
    return Survey(list(dict.fromkeys(facts)), faults, broken)


def _look(pictures: TaggedPictures) -> _Seen:
    """Open every picture and mask once."""
    count = len(pictures.classes)
    seen = _Seen({}, {}, 0, np.zeros(count, np.int64), np.zeros(count, np.int64), [], [], set())
    masked = 0
    whole = len(pictures) <= DECODED
    for index, name in enumerate(pictures.ids):
        try:
            path = pictures.picture_path(index)
            header = _open(path, whole)
            seen.headers[index] = header
            mask = pictures.mask(index, header)
        except (UnreadableFileError, ValueError) as error:
            seen.broken[name] = str(error)
            continue
        if mask is None:
            continue
        masked += 1
        values = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
        seen.values.update(values.tolist())
        inside = np.zeros(count, bool)
        inside[[value - 1 for value in values.tolist() if value not in (0, 255)]] = True
        tags = pictures.labels[index].numpy() > 0
        seen.occurring[inside] += 1
        seen.tagged[tags] += 1
        if (tags & ~inside).any():
            seen.contrary.append(name)
        if (inside & ~tags).any():
            seen.extra.append(name)
    return seen._replace(masked=masked)


def _open(path: Path, whole: bool) -> Header:
    """Read a picture as far as it takes to know that it can be read."""
    if not whole:
        header = read_header(path)
        _ended(path, header)
        return header
    # A JPEG is read to its end also where it is decoded small.
    picture, header = decode(path, str(path), max_side=64)
    if picture.mode.startswith("I") or picture.mode in ("F", "LAB"):
        to_rgb(picture, str(path))
    return header


def _ended(path: Path, header: Header) -> None:
    """Stop at a file that lacks its end."""
    marks = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}
    mark = marks.get(header.format)
    if mark is None:
        return
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 65536))  # some cameras write more behind the end
        if mark not in file.read():
            raise UnreadableFileError(path, "it is truncated; fetch or write the file again")


def _told(split: str, pictures: TaggedPictures, seen: _Seen) -> list[str]:
    """What there is."""
    counts = pictures.labels.sum(0).long().tolist()
    by_class = ", ".join(f"{name} {number}" for name, number in zip(pictures.classes, counts, strict=True))
    facts = [f"{split}: {len(pictures)} pictures, {len(pictures.classes)} classes: {by_class}"]
    if never := [name for name, number in zip(pictures.classes, counts, strict=True) if not number]:
        facts.append(f"{split}: classes of no picture: {listed(never)}")
    bare = [name for name, row in zip(pictures.ids, pictures.labels, strict=True) if not row.any()]
    if bare:
        facts.append(f"{split}: {len(bare)} pictures without a class, of background only: {listed(bare)}")

    headers = list(seen.headers.values())
    if headers:
        sides = sorted(headers, key=lambda each: each.size[0] * each.size[1])
        low, high = sides[0].upright, sides[-1].upright
        facts.append(f"{split}: sizes from {low[1]} x {low[0]} to {high[1]} x {high[0]} (width x height)")
        kinds = Counter(f"{each.format} {each.mode}" for each in headers)
        facts.append(f"{split}: " + ", ".join(f"{number} {kind}" for kind, number in kinds.most_common()))
    orientations = Counter(each.orientation for each in headers if each.orientation != 1)
    if orientations:
        done = "made upright, masks alike" if pictures.upright else "left as they are"
        facts.append(f"{split}: {sum(orientations.values())} pictures that EXIF says to turn, {done}")
    if pictures.max_side is not None:
        large = sum(max(each.size) > pictures.max_side for each in headers)
        if large:
            facts.append(
                f"{split}: {large} pictures are read with their longer side reduced to {pictures.max_side} pixels"
            )
    facts.append(f"{split}: masks to score against of {seen.masked} of {len(pictures)} pictures")
    if seen.contrary:
        facts.append(f"{split}: a tag is not in the mask of {len(seen.contrary)} pictures: {listed(seen.contrary)}")
    if seen.extra:
        facts.append(f"{split}: a class of the mask is no tag of {len(seen.extra)} pictures: {listed(seen.extra)}")
    return facts


def _of_tags(split: str, pictures: TaggedPictures) -> list[Fault]:
    """Where tags and pictures do not meet."""
    faults = []
    if pictures.lost:
        faults.append(
            Fault(
                f"{split}, tags without a picture",
                f"{len(pictures.lost)}: {listed(pictures.lost)}; add the pictures or take the rows out",
            )
        )
    if isinstance(pictures, PictureFolder):
        if pictures.untagged:
            faults.append(
                Fault(
                    f"{split}, pictures without a row of tags",
                    f"{len(pictures.untagged)}: {listed(pictures.untagged)}; add rows (empty ones for pictures of "
                    "background only), or leave the pictures out",
                )
            )
        faults += [Fault(f"{split}, a name of several pictures", each) for each in pictures.ambiguous.values()]
        faults += [Fault(f"{split}, annotations", each) for each in pictures.broken]
        for name, near in pictures.unknown.items():
            hint = f"did you mean {near}?" if near else f"the classes are {listed(pictures.classes)}"
            faults.append(Fault(f"{split}, a tag that is no class", f"{name!r}; {hint}"))
    return faults


def _of_files(split: str, seen: _Seen) -> list[Fault]:
    """What cannot be read or does not fit."""
    return [Fault(f"{split}, {name}", problem) for name, problem in seen.broken.items()]


def _of_masks(split: str, pictures: TaggedPictures, seen: _Seen) -> list[Fault]:
    """Classes whose masks are others."""
    never = [
        name
        for name, tagged, occurring in zip(pictures.classes, seen.tagged, seen.occurring, strict=True)
        if tagged and not occurring
    ]
    if not never:
        return []
    hint = "is classes.txt in the order of the masks?"
    if seen.values <= {0, 255}:
        hint = "their only values are 0 and 255, which is void; write the class as 1"
    return [Fault(f"{split}, tags that never occur in a mask", f"{listed(never)} in {seen.masked} masks; {hint}")]


def _contents(splits: Mapping[str, TaggedPictures], looks: Mapping[str, _Seen]) -> dict[str, dict[str, list[str]]]:
    """By split: names of the pictures by what their files hold; those whose size no other has are left out."""
    files = [
        _File(split, name, pictures.picture_path(index))
        for split, pictures in splits.items()
        for index, name in enumerate(pictures.ids)
        if index in looks[split].headers
    ]
    # What is read grows from step to step, and what is alone is left out before each.
    keys = [str(file.path.stat().st_size) for file in files]
    for most in (1 << 14, -1):
        times = Counter(keys)
        shared = [(file, key) for file, key in zip(files, keys, strict=True) if times[key] > 1]
        files = [file for file, _ in shared]
        keys = [f"{key} {_digest(file.path, most)}" for file, key in shared]

    found: dict[str, dict[str, list[str]]] = {split: defaultdict(list) for split in splits}
    for file, key in zip(files, keys, strict=True):
        found[file.split][key].append(file.name)
    return found


def _digest(path: Path, most: int) -> str:
    with path.open("rb") as file:
        if most > 0:
            file.seek(path.stat().st_size // 3)  # pictures of one camera begin and end alike
        return hashlib.blake2b(file.read(most), digest_size=16).hexdigest()


def _doubles(split: str, pictures: TaggedPictures, contents: Mapping[str, Sequence[str]]) -> list[str]:
    groups = [names for names in contents.values() if len(names) > 1]
    if not groups:
        return []
    place = {name: index for index, name in enumerate(pictures.ids)}
    contrary = [names for names in groups if len({tuple(pictures.labels[place[name]].tolist()) for name in names}) > 1]
    shown = [" = ".join(names) for names in groups]
    facts = [f"{split}: {len(groups)} pictures are there more than once: {listed(shown)}"]
    if contrary:
        shown = [" = ".join(names) for names in contrary]
        facts.append(f"{split}: {len(contrary)} of them with other tags each time: {listed(shown)}")
    return facts


def _overlaps(splits: Mapping[str, TaggedPictures], contents: Mapping[str, Mapping[str, Sequence[str]]]) -> list[Fault]:
    """Pictures that are in two splits, so that scores would be of pictures that were trained on."""
    faults = []
    names = list(splits)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            if splits[first].picture_files() == splits[second].picture_files():
                continue  # one set under two names, on purpose
            both = sorted(
                name for digest, found in contents[first].items() if digest in contents[second] for name in found
            )
            if both:
                faults.append(
                    Fault(
                        f"{first} and {second}", f"{len(both)} pictures are in both: {listed(both)}; keep each in one"
                    )
                )
    return faults
