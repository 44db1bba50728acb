"""Pictures, masks, tags and lists on the disk; every fault names the file and what to do."""

from __future__ import annotations

import csv
import difflib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protoseg.data.sample import UnreadableFileError
from protoseg.utils.extras import require
from protoseg.utils.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "load_image",
    "load_mask",
    "pillow",
    "read_annotation",
    "read_classes",
    "read_mask",
    "read_picture",
    "read_pixels",
    "read_split",
    "read_table",
    "save_mask",
    "voc_palette",
]

_ENDINGS = (".jpg", ".jpeg", ".png")
# What Pillow may take a file for, whatever its name says: for some other formats, such as PostScript, it starts another
# program. JPEG stands for MPO as well, which many telephones write into a .jpg.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_LISTED = 5  # names shown in an error before "and n more"


def pillow() -> Any:
    """Return ``PIL.Image``, or say how to install it."""
    return require("PIL.Image", "reading and writing pictures", "recipes")


def _listed(names: list[str]) -> str:
    """Return the first few names and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more


def _lines(path: Path) -> list[str]:
    """Return the lines of a text file, without the spaces around them."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error}); save it as UTF-8") from error
    return [line.strip() for line in text.splitlines()]


def _names(path: Path) -> list[str]:
    """Return the names in a text file with one per line, empty lines left out; none may occur twice."""
    names = [line for line in _lines(path) if line]
    if doubles := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"{path}: every name may occur once, but there is more than one {_listed(doubles)}")
    return names


def read_split(root: Path, split: str) -> list[str]:
    """Return the names of a split, in order."""
    folder = root / "ImageSets" / "Segmentation"
    path = folder / f"{split}.txt"
    if not path.is_file():
        there = sorted(file.stem for file in folder.glob("*.txt")) if folder.is_dir() else []
        hint = f"the splits there are {', '.join(there)}" if there else f"{folder} holds no split at all"
        raise FileNotFoundError(f"{path}: no such split; {hint}")
    ids = _names(path)
    if not ids:
        raise ValueError(f"{path}: the split is empty; write one picture name per line, without ending")
    if wrong := [name for name in ids if len(name.split()) > 1 or "/" in name or "\\" in name]:
        raise ValueError(f"{path}: expected one picture name per line, without folder or ending, got {_listed(wrong)}")
    return ids


def read_classes(path: Path, default: tuple[str, ...]) -> tuple[str, ...]:
    """Return the foreground names from ``classes.txt``, or ``default`` where there is no such file."""
    if not path.is_file():
        return default
    names = _names(path)
    if not 2 <= len(names) <= 255:
        raise ValueError(f"{path}: expected the background and 1 to 254 classes, one per line, got {len(names)} lines")
    if wrong := [name for name in names if len(name.split()) > 1]:
        raise ValueError(f"{path}: class names may not hold spaces, got {_listed(wrong)}; use - or _")
    return tuple(names[1:])


def _position(name: str, classes: tuple[str, ...], where: str) -> int:
    if name not in classes:
        near = difflib.get_close_matches(name, classes, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"the classes are {', '.join(classes)}"
        raise ValueError(f"{where}: unknown class {name!r}; {hint}")
    return classes.index(name)


def read_table(path: Path, ids: list[str], classes: tuple[str, ...]) -> list[set[int]]:
    """Return the class positions of every picture in ``ids`` from ``labels.csv``; other rows may follow."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; write it with the header id,labels or choose other tags")
    present: dict[str, set[int]] = {}
    rows = csv.reader(_lines(path), strict=True)
    try:
        header = [cell.strip() for cell in next(rows, [])]
        if header != ["id", "labels"]:
            raise ValueError(f"{path}: the first line must be id,labels, got {','.join(header)!r}")
        for row in filter(None, rows):
            where = f"{path}, line {rows.line_num}"
            if len(row) != 2:
                raise ValueError(f"{where}: expected an id and class names with spaces between, got {row}")
            name = row[0].strip()
            if name in present:
                raise ValueError(f"{where}: {name!r} has a row already; every id may occur once")
            present[name] = {_position(tag, classes, where) for tag in row[1].split()}
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: broken CSV ({error}); write the file again") from error
    if missing := [name for name in ids if name not in present]:
        raise ValueError(f"{path}: no row for {_listed(missing)} of the split; add it (labels may be empty)")
    return [present[name] for name in ids]


def read_annotation(path: Path, classes: tuple[str, ...]) -> set[int]:
    """Return the class positions of the objects in a VOC XML file, difficult ones included."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; every picture of the split needs one with tags from XML")
    try:
        tree = ElementTree.parse(path)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: broken XML ({error}); write the file again") from error
    present = set()
    for thing in tree.iterfind("object"):
        name = (thing.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"{path}: an object has no name; give it one of the classes")
        present.add(_position(name, classes, str(path)))
    return present


def _open(path: Path) -> Image:
    """Return a picture with all of its pixels read."""
    module = pillow()
    try:
        with module.open(path, formats=_FORMATS) as picture:
            picture.load()
            loaded: Image = picture
    except FileNotFoundError as error:
        raise UnreadableFileError(path, "no such file; add it or take its name out of the split") from error
    except module.UnidentifiedImageError as error:
        problem = f"cannot be read (it is none of {', '.join(_FORMATS)}); fetch or write the file again"
        raise UnreadableFileError(path, problem) from error
    except (OSError, SyntaxError, ValueError, module.DecompressionBombError) as error:
        raise UnreadableFileError(path, f"cannot be read ({error}); fetch or write the file again") from error
    return loaded


def read_picture(folder: Path, name: str) -> NDArray[np.uint8]:
    """Return the picture ``name`` as ``[H, W, 3]`` RGB, in the orientation of its pixels."""
    paths = [folder / f"{name}{ending}" for ending in _ENDINGS]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise UnreadableFileError(paths[0], "no such file, nor .jpeg or .png; add it or take it out of the split")
    return read_pixels(path)


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """Return a picture as ``[H, W, 3]`` RGB, in the orientation of its pixels."""
    return np.array(_open(path).convert("RGB"), np.uint8)


def read_mask(path: Path, num_classes: int) -> NDArray[np.uint8]:
    """Return the indices ``[H, W]`` of a palette or gray mask."""
    picture = _open(path)
    if picture.mode not in ("P", "L"):
        raise UnreadableFileError(
            path,
            f"the mask has mode {picture.mode}, expected P (palette) or L (8-bit gray) with class indices; "
            "turn its colors into indices, for example with protoseg.data.save_mask",
        )
    mask = np.array(picture, np.uint8)
    wrong = np.unique(mask[(mask > num_classes) & (mask != 255)])
    if wrong.size:
        raise UnreadableFileError(
            path,
            f"index {', '.join(map(str, wrong[:5]))} stands for no class: 0 is the background, "
            f"1..{num_classes} are the classes, 255 is void; is classes.txt the right one?",
        )
    return mask


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
    """Read a picture, in the orientation of its pixels.

    Args:
        path: A file that Pillow can read.

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
    pixels = read_pixels(Path(path))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def load_mask(path: str | os.PathLike[str], num_classes: int) -> Tensor:
    """Read a mask of class indices.

    Args:
        path: An 8-bit palette or gray PNG.
        num_classes: ``C``; an index above it that is not 255 is an error.

    Returns:
        ``[H, W]`` uint8, 0 = background, 1..C = classes, 255 = void.

    Raises:
        UnreadableFileError: Missing, truncated, in color, or with an index that stands for no class.

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
