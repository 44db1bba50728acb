"""Masks, tags and lists on the disk; every fault names the file and what to do."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protoseg.data.annotations import parse_xml
from protoseg.data.images import LOSSLESS, decode, pillow, read_pixels
from protoseg.data.names import PictureIndex, plain_name, without_ending
from protoseg.data.sample import UnreadableFileError
from protoseg.data.shards import outside
from protoseg.data.tables import listed, read_text
from protoseg.utils.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "class_position",
    "load_image",
    "load_mask",
    "read_annotation",
    "read_classes",
    "read_colors",
    "read_mask",
    "read_split",
    "save_mask",
    "voc_palette",
]

# The first line of classes.txt may be one of these, which is no class; LabelMe writes some of them.
_NO_CLASS = {"background", "_background_", "__background__", "bg", "__ignore__", "hintergrund"}


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty, without the spaces around them."""
    text, _ = read_text(path)
    return [line.strip() for line in text.splitlines() if line.strip()]


def _once(path: Path, names: list[str]) -> None:
    if doubles := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"{path}: every name may occur once, but there is more than one {listed(doubles)}")


def read_split(root: Path, split: str, pictures: PictureIndex) -> list[str]:
    """Return the names of a split, in order; folders, endings and a mask's path behind them may stand there."""
    folder = root / "ImageSets" / "Segmentation"
    path = folder / f"{split}.txt"
    if not path.is_file():
        there = sorted(file.stem for file in folder.glob("*.txt")) if folder.is_dir() else []
        hint = f"the splits there are {', '.join(there)}" if there else f"{folder} holds no split at all"
        raise FileNotFoundError(f"{path}: no such split; {hint}")
    lines = _lines(path)
    if not lines:
        raise ValueError(f"{path}: the split is empty; write one picture name per line, without ending")

    numbered = [line for line in lines if re.search(r"\s-?[01]$", line) and not pictures.knows(line)]
    if len(numbered) == len(lines):
        raise ValueError(
            f"{path}: expected one picture name per line, and every line ends in a number, as {listed(numbered)}: "
            "is this the list of one class?"
        )
    # As in AffinityNet's lists: the picture's path, and its mask's.
    names = [re.sub(r"\s+/?\S*\.png$", "", line) if re.search(r"\.\w+\s+\S", line) else line for line in lines]
    ids = [without_ending(plain_name(name)).removeprefix("JPEGImages/") for name in names]
    if wrong := [name for name in ids if outside(name)]:
        raise ValueError(f"{path}: expected names of pictures in JPEGImages, got {listed(wrong)}")
    _once(path, ids)
    return ids


def read_classes(path: Path) -> tuple[tuple[str, ...], str]:
    """Return the foreground names of a file with one a line, and a note where no line was the background's."""
    names = _lines(path)
    foreground = list(names)
    while foreground and foreground[0].casefold() in _NO_CLASS:
        foreground.pop(0)
    if not 1 <= len(foreground) <= 254:
        raise ValueError(f"{path}: expected the background and 1 to 254 classes, one per line, got {len(names)} lines")
    _once(path, names)
    if wrong := [name for name in foreground if name.casefold() in _NO_CLASS]:
        raise ValueError(f"{path}: {wrong[0]!r} must be the first line, as the index 0 of masks is the background's")
    note = ""
    if foreground == names:
        note = (
            f"{path.name}: no line 'background' in front, so that all {len(names)} lines are classes, from 1 in masks"
        )
    return tuple(foreground), note


def class_position(name: str, classes: tuple[str, ...], where: str) -> int:
    """Place of a class, or an error that names near ones."""
    if name in classes:
        return classes.index(name)
    near = difflib.get_close_matches(name, classes, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"the classes are {', '.join(classes)}"
    raise ValueError(f"{where}: unknown class {name!r}; {hint}")


def read_annotation(path: Path) -> tuple[str, ...]:
    """Return the names of the objects in a VOC XML file, difficult ones included."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; every picture of the split needs one with tags from XML")
    names = [(thing.findtext("name") or "").strip() for thing in parse_xml(path).iterfind("object")]
    if not all(names):
        raise ValueError(f"{path}: an object has no name; give it one of the classes")
    return tuple(dict.fromkeys(names))


def read_colors(path: Path, classes: Sequence[str]) -> dict[tuple[int, int, int], int]:
    """Read the color of each class in masks: lines ``name r g b``, with commas, or CVAT's ``name:r,g,b::``.

    Raises:
        ValueError: A line is of another form or names no class.
    """
    colors: dict[tuple[int, int, int], int] = {}
    for line in _lines(path):
        matched = re.fullmatch(r"(.+?)[\s,;:]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})(?:[:;,\s].*)?", line)
        if matched is None:
            if not colors or line.startswith("#"):  # a header
                continue
            raise ValueError(f"{path}: expected a name and three numbers, got {line!r}")
        name = matched[1].strip()
        index = 255 if name.casefold() in ("void", "ignore", "unlabeled") else 0
        if index == 0 and name.casefold() not in _NO_CLASS:
            index = class_position(name, tuple(classes), str(path)) + 1
        colors[int(matched[2]), int(matched[3]), int(matched[4])] = index
    return colors


def read_mask(
    path: Path, num_classes: int, colors: Mapping[tuple[int, int, int], int] | None = None
) -> NDArray[np.uint8]:
    """Return the indices ``[H, W]`` of a mask: palette or gray of 1 to 16 bits, or colors by a table, VOC's if none."""
    picture, header = decode(path, str(path))
    if header.format not in LOSSLESS:
        raise UnreadableFileError(
            path,
            f"a mask of format {header.format}, which changes indices; write it as PNG from what it was made of",
        )

    if picture.mode in ("RGB", "RGBA"):
        mask = _indices(np.array(picture.convert("RGB"), np.uint8), path, num_classes, colors)
    elif picture.mode in ("P", "L", "1") or picture.mode.startswith("I"):
        wide = np.array(picture).astype(np.int64) // _stretch(path, picture, header.format)
        if wide.max() > 255:
            raise UnreadableFileError(path, f"index {wide.max()} stands for no class; 255 is the highest")
        mask = wide.astype(np.uint8)
    else:
        raise UnreadableFileError(
            path,
            f"the mask has mode {picture.mode}, expected P (palette) or L (8-bit gray) with class indices; "
            "turn it into indices, for example with protoseg.data.save_mask",
        )

    wrong = np.unique(mask[(mask > num_classes) & (mask != 255)])
    if wrong.size:
        raise UnreadableFileError(
            path,
            f"index {', '.join(map(str, wrong[:5]))} stands for no class: 0 is the background, "
            f"1..{num_classes} are the classes, 255 is void; is classes.txt the right one?",
        )
    return mask


def _stretch(path: Path, picture: Image, kind: str) -> int:
    """What Pillow multiplies gray of 2 or 4 bits by, to fill 0..255."""
    bits: Any = 8
    if picture.mode == "L" and kind == "PNG":
        bits = path.read_bytes()[24]
    elif picture.mode == "L" and kind == "TIFF":
        bits = getattr(picture, "tag_v2", {}).get(258, (8,))[0]
    return {2: 85, 4: 17}.get(bits, 1)


def _indices(
    pixels: NDArray[np.uint8], path: Path, num_classes: int, colors: Mapping[tuple[int, int, int], int] | None
) -> NDArray[np.uint8]:
    """Colors as indices."""
    if colors is None:
        triples = np.array(voc_palette(), np.uint8).reshape(-1, 3).tolist()
        known = [*range(num_classes + 1), 255]
        colors = {tuple(triples[index]): index for index in known}
    codes = pixels.astype(np.int64) @ np.array([65536, 256, 1])
    found, place = np.unique(codes, return_inverse=True)
    table = {65536 * r + 256 * g + b: index for (r, g, b), index in colors.items()}
    if unknown := [int(code) for code in found if int(code) not in table]:
        shown = ", ".join(str((code >> 16, code >> 8 & 255, code & 255)) for code in unknown[:5])
        raise UnreadableFileError(
            path,
            f"{len(unknown)} colors of the mask stand for no class, such as {shown}; write colors.txt beside "
            "classes.txt, with a line NAME R G B for each class, or turn the mask into indices",
        )
    indices: NDArray[np.uint8] = np.array([table[int(code)] for code in found], np.uint8)[place.reshape(codes.shape)]
    return indices


def voc_palette(n: int = 256) -> list[int]:
    """Return the first ``n`` colors of VOC's palette as ``[r, g, b, r, g, b, ...]`` in 0..255.

    Args:
        n: Number of colors, 1..256.

    Raises:
        ValueError: ``n`` is out of range.

    Example:
        >>> voc_palette(3)
        [0, 0, 0, 128, 0, 0, 0, 128, 0]
    """
    if not 1 <= n <= 256:
        raise ValueError(f"voc_palette: n must be in 1..256, got {n}")
    # The bits of the index go to red, green and blue in turn, and fill each color from its highest bit.
    return [
        sum((index >> (3 * step + channel) & 1) << (7 - step) for step in range(8))
        for index in range(n)
        for channel in range(3)
    ]


def load_image(path: str | os.PathLike[str]) -> Tensor:
    """Read a picture, upright as a viewer shows it.

    Args:
        path: A picture of any usual format.

    Returns:
        ``[3, H, W]`` uint8, RGB.

    Raises:
        UnreadableFileError: Missing, truncated, or no picture.
        ImportError: Pillow is not installed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "one.png"
        >>> save_mask(path, [[0, 2], [1, 255]])
        >>> load_image(path).shape
        torch.Size([3, 2, 2])
    """
    pixels, _ = read_pixels(Path(path))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def load_mask(path: str | os.PathLike[str], num_classes: int) -> Tensor:
    """Read a mask of class indices.

    Args:
        path: A palette or gray PNG, or another lossless format; colors are read as those of VOC's palette.
        num_classes: ``C``; an index above it that is not 255 is an error.

    Returns:
        ``[H, W]`` uint8, 0 = background, 1..C = classes, 255 = void.

    Raises:
        UnreadableFileError: Missing, truncated, lossy, or with an index or color that stands for no class.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "one.png"
        >>> save_mask(path, [[0, 2], [1, 255]])
        >>> load_mask(path, num_classes=2).tolist()
        [[0, 2], [1, 255]]
    """
    return torch.from_numpy(read_mask(Path(path), num_classes))


def save_mask(path: str | os.PathLike[str], mask: Tensor | NDArray[np.uint8] | Sequence[Sequence[int]]) -> None:
    """Write a mask as an 8-bit PNG in VOC's palette, wholly or not at all.

    The file is written under another name in the same folder and then renamed, so that a run that is stopped
    leaves no truncated mask behind.

    Args:
        path: File to write, ending in ``.png``; an older one is replaced.
        mask: ``[H, W]`` whole numbers in 0..255.

    Raises:
        ValueError: ``path`` has another ending, or ``mask`` is not of this form.
        FileNotFoundError: The folder does not exist.
        ImportError: Pillow is not installed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "one.png"
        >>> save_mask(path, torch.tensor([[0, 1], [20, 255]]))
        >>> path.exists()
        True
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"save_mask: path must end in .png (other formats change the indices), got {target}")
    array = np.asarray(mask.detach().cpu().numpy() if isinstance(mask, Tensor) else mask)
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "iub":
        raise ValueError(f"save_mask: mask must be (H, W) of whole numbers, got {array.shape} of {array.dtype}")
    if array.min() < 0 or array.max() > 255:
        raise ValueError(f"save_mask: mask must lie in 0..255, got values from {array.min()} to {array.max()}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder; create it before saving masks")
    picture = pillow().fromarray(array.astype(np.uint8))
    picture.putpalette(voc_palette())
    with replacing(target) as temporary:
        picture.save(temporary, format="PNG")
