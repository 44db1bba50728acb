"""Pictures from files that nobody has checked: few formats, limits, and a rule for every kind of pixel."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protoseg.data.sample import UnreadableFileError
from protoseg.utils.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ENDINGS",
    "LOSSLESS",
    "MAX_PIXELS",
    "Header",
    "decode",
    "is_picture",
    "orientation_of",
    "pillow",
    "read_header",
    "read_pixels",
    "to_rgb",
    "turned",
]

# What Pillow may take a file for, whatever its name says: for some other formats, such as PostScript, it starts another
# program. JPEG stands for MPO as well, which many telephones write into a .jpg.
_FORMATS = {
    "AVIF": (".avif",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "JPEG2000": (".jp2", ".j2k"),
    "PCX": (".pcx",),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
# A file of this format has no mark by which it could be told from others, so that its ending has to say it.
_BY_NAME = {".tga": "TGA"}

ENDINGS = (*(ending for endings in _FORMATS.values() for ending in endings), *_BY_NAME)
"""The endings of pictures, in lower case."""

LOSSLESS = ("BMP", "GIF", "PCX", "PNG", "PPM", "TGA", "TIFF")
"""Formats that keep the indices of a mask."""

MAX_PIXELS = 2**27
"""Most pixels of a picture: 134 million, which take 400 MB. A small file can claim to hold any number."""

_ORIENTATION = 0x0112  # the tag of EXIF
_SWAPPING = (5, 6, 7, 8)  # orientations that exchange height and width


class Header(NamedTuple):
    """What a picture's file says of itself before a pixel is decoded.

    Attributes:
        format: Pillow's name of it.
        mode: Pillow's name of its kind of pixels.
        size: Height and width as stored.
        orientation: EXIF's, 1..8; 1 is upright.
    """

    format: str
    mode: str
    size: tuple[int, int]
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width as a viewer shows it."""
        return self.size[::-1] if self.orientation in _SWAPPING else self.size


def pillow() -> Any:
    """Return ``PIL.Image``, or say how to install it."""
    return require("PIL.Image", "reading and writing pictures", "recipes")


def is_picture(name: str) -> bool:
    """Return whether a file has the ending of a picture, in any case."""
    return Path(name).suffix.lower() in ENDINGS


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of damaged metadata, which does no harm to the pixels, and of sizes that have a limit here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(source: Path | bytes, name: str) -> Image:
    """Open a picture of a listed format and of a size within the limit; nothing is decoded."""
    module = pillow()
    module.init()
    formats = [each for each in _FORMATS if each in module.OPEN]  # a build of Pillow may lack AVIF
    by_name = _BY_NAME.get(Path(name).suffix.lower())
    if by_name is not None:
        formats = [by_name]

    try:
        opened: Image = module.open(source if isinstance(source, Path) else io.BytesIO(source), formats=formats)
    except module.UnidentifiedImageError as error:  # whose message can hold an address in memory
        heic = " (HEIC has to be turned into JPEG first)" if Path(name).suffix.lower() in (".heic", ".heif") else ""
        raise UnreadableFileError(name, f"it is none of {', '.join(formats)}{heic}") from error

    width, height = opened.size
    if width * height > MAX_PIXELS:
        opened.close()
        raise UnreadableFileError(
            name, f"it has {width} x {height} pixels, and {MAX_PIXELS // 10**6} million are allowed; make it smaller"
        )
    return opened


def orientation_of(picture: Image) -> int:
    """EXIF's orientation of a picture, 1..8; 1 where it has none that can be read."""
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # any: damaged EXIF leads Pillow's reader into whatever it meets
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def decode(source: Path | bytes, name: str, *, max_side: int | None = None) -> tuple[Image, Header]:
    """Decode the first picture of a file.

    Args:
        source: The file or its content.
        name: What an error calls it.
        max_side: A JPEG may be decoded smaller, but to no less than this many pixels at its longer side.

    Returns:
        The picture in its own mode and as it is stored, and its header.

    Raises:
        UnreadableFileError: It is of no listed format, too large, truncated or damaged.
    """
    module = pillow()
    problem = "cannot be read ({}); fetch or write the file again"
    try:
        with _quiet(), _open(source, name) as picture:
            header = _header(picture)
            if max_side is not None and picture.format in ("JPEG", "MPO") and max(picture.size) > max_side:
                scale = max_side / max(picture.size)
                picture.draft(None, (math.ceil(picture.width * scale), math.ceil(picture.height * scale)))
            picture.load()
    except UnreadableFileError as error:
        raise UnreadableFileError(name, problem.format(str(error).removeprefix(f"{name}: "))) from error
    except FileNotFoundError as error:
        raise UnreadableFileError(name, "no such file; add it or take its name out of the split") from error
    except module.DecompressionBombError as error:
        raise UnreadableFileError(name, problem.format(error)) from error
    except Exception as error:  # any: Pillow's readers raise whatever damaged bytes lead them into
        raise UnreadableFileError(name, problem.format(str(error) or type(error).__name__)) from error
    return picture, header


def _header(picture: Image) -> Header:
    orientation = orientation_of(picture)
    height, width = picture.height, picture.width
    if picture.format == "TIFF" and orientation in _SWAPPING:  # Pillow gives the upright size, and turns it itself
        height, width = width, height
    return Header(picture.format or "", picture.mode, (height, width), orientation)


def read_header(path: Path) -> Header:
    """Read what a file says of its picture; no pixel is decoded.

    Raises:
        UnreadableFileError: It is missing, of no listed format, or too large.
    """
    try:
        with _quiet(), _open(path, str(path)) as picture:
            return _header(picture)
    except UnreadableFileError:
        raise
    except FileNotFoundError as error:
        raise UnreadableFileError(path, "no such file; add it or take its name out of the split") from error
    except Exception as error:  # any: Pillow's readers raise whatever damaged bytes lead them into
        raise UnreadableFileError(path, f"cannot be read ({error}); fetch or write the file again") from error


def read_pixels(
    source: Path | bytes, name: str | None = None, *, upright: bool = True, max_side: int | None = None
) -> tuple[NDArray[np.uint8], Header]:
    """Read a picture as ``[H, W, 3]`` RGB.

    Args:
        source: The file or its content.
        name: What an error calls it; the path where not given.
        upright: Turn it as EXIF says, as viewers do. A TIFF is always upright.
        max_side: Make it smaller where its longer side has more pixels.

    Returns:
        The pixels, and the header of the file.

    Raises:
        UnreadableFileError: It cannot be read, or its pixels are of a kind that has no rule.
    """
    name = str(source) if name is None else name
    picture, header = decode(source, name, max_side=max_side)
    pixels = to_rgb(picture, name)
    if max_side is not None and max(header.size) > max_side:
        pixels = _smaller(pixels, max_side)
    if upright and header.format != "TIFF":
        pixels = np.ascontiguousarray(turned(pixels, header.orientation))
    return pixels, header


def _smaller(pixels: NDArray[np.uint8], max_side: int) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return pixels
    module = pillow()
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.array(module.fromarray(pixels).resize(size, module.Resampling.BILINEAR), np.uint8)


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn and mirror ``[H, W, ...]`` as EXIF's orientation asks; a view.

    Example:
        >>> turned(np.array([[1, 2]]), 6).tolist()  # a quarter clockwise
        [[1], [2]]
    """
    if orientation in _SWAPPING:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def to_rgb(picture: Image, name: str) -> NDArray[np.uint8]:
    """Turn a decoded picture into ``[H, W, 3]`` RGB: 16 bits are scaled, and what is transparent shows white.

    Gray of 16 bits is scaled from 0..65535. Floating point is taken as 0..1 where all of it lies there, else as
    0..255. Other numbers have no rule.

    Raises:
        UnreadableFileError: There is no rule for its pixels.
    """
    if picture.mode.startswith("I") or picture.mode == "F":
        gray = _scaled(np.asarray(picture), picture.mode, name)
        return np.repeat(gray[:, :, None], 3, axis=2)

    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        module = pillow()
        layer = picture.convert("RGBA")
        picture = module.alpha_composite(module.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    try:
        return np.array(picture.convert("RGB"), np.uint8)
    except ValueError as error:
        raise UnreadableFileError(name, f"pixels of mode {picture.mode} have no rule; save it as 8-bit RGB") from error


def _scaled(values: NDArray[Any], mode: str, name: str) -> NDArray[np.uint8]:
    """Gray of more than 8 bits as 8."""
    low, high = float(values.min()), float(values.max())
    top = 65535.0
    if mode == "F":
        top = 1.0 if high <= 1 else 255.0
    if not (low >= 0 and high <= top):
        raise UnreadableFileError(
            name,
            f"pixels of mode {mode} run from {low:g} to {high:g}, expected whole numbers in 0..65535, or floating "
            "point in 0..1 or 0..255; scale it to 8 bits",
        )
    scaled: NDArray[np.uint8] = np.rint(values.astype(np.float32) * np.float32(255 / top)).astype(np.uint8)
    return scaled
