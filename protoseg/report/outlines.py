"""A mask drawn on its picture so that it can be seen from afar: bright outlines, and the classes' names inside."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.utils import checks

__all__ = ["VOID_COLOR", "Label", "Outlined", "Rgb", "bright", "outlined", "place_names"]

Rgb = tuple[int, int, int]

VOID = 255
VOID_COLOR: Rgb = (214, 218, 224)
TINT = 0.28  # share of the class's color inside its outline: what is below has to stay visible
GOLDEN = 0.618034  # of a turn: neighbors in the list of classes lie far apart on the circle of hues
LIGHT = 130  # least luma of a class's color, 0..255
LETTER = 0.62  # width of a letter, in units of the font's size


class Label(NamedTuple):
    """A name on a picture, in pixels of the picture.

    Attributes:
        name: What it says.
        color: Of its ground.
        x: Left end.
        y: Upper end.
        width: Of its ground.
        height: Likewise.
        size: Of the font.
    """

    name: str
    color: Rgb
    x: float
    y: float
    width: float
    height: float
    size: float

    def overlaps(self, other: Label) -> bool:
        """Whether two names would cover each other."""
        beside = self.x + self.width <= other.x or other.x + other.width <= self.x
        above = self.y + self.height <= other.y or other.y + other.height <= self.y
        return not (beside or above)


class Outlined(NamedTuple):
    """What :func:`outlined` returns.

    Attributes:
        image: ``[3, h, w]`` uint8.
        centers: By index in the mask, largest first: the point (x, y) that lies deepest inside, in pixels.
    """

    image: Tensor
    centers: dict[int, tuple[float, float]]


def bright(value: int) -> Rgb:
    """The color of an index in a mask: all are bright, and those of classes that follow each other differ most."""
    if value == VOID:
        return VOID_COLOR

    # After each five hues the next ones are paler, so that many classes are told apart.
    saturation = (0.92, 0.55, 0.75)[(value - 1) // 5 % 3]
    color = colorsys.hsv_to_rgb((0.02 + GOLDEN * (value - 1)) % 1, saturation, 1.0)
    red, green, blue = (round(255 * part) for part in color)
    # Blue is dark, however bright it is: white makes it as light as dark letters on it need.
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    white = max(0.0, (LIGHT - luma) / (255 - luma))
    return _whiter(red, white), _whiter(green, white), _whiter(blue, white)


def _whiter(part: int, share: float) -> int:
    return round(part + share * (255 - part))


def outlined(image: Tensor, mask: Tensor, *, shortest: int = 640, longest: int = 960) -> Outlined:
    """Draw the outline of each class of a mask on its picture, and a tint inside.

    Args:
        image: ``[3, H, W]`` uint8.
        mask: ``[H, W]`` integers, 0 = background, 1.. = classes, 255 = void, which is a pale veil.
        shortest: A picture whose longer side is shorter is enlarged to it, so that the outlines are fine.
        longest: A picture whose longer side is longer is made smaller.

    Raises:
        TypeError: ``image`` is not uint8, or ``mask`` holds no integers.
        ValueError: A shape is wrong, or the mask holds a value outside 0..255.
    """
    checks.shape("outlined", "image", image, (3, "H", "W"))
    checks.shape("outlined", "mask", mask, tuple(image.shape[1:]), "resize the mask to the image")
    if image.dtype != torch.uint8:
        raise TypeError(f"outlined: image must be uint8 with values 0..255, got {image.dtype}")
    if mask.dtype == torch.bool or mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"outlined: mask must hold integers, got {mask.dtype}")
    if mask.numel() and not 0 <= int(mask.min()) <= int(mask.max()) <= VOID:
        raise ValueError(f"outlined: a mask must hold 0..255, got {int(mask.min())} to {int(mask.max())}")

    picture, indices = _resized(image.detach().cpu(), mask.detach().cpu(), shortest, longest)
    reach = max(1, round(max(indices.shape) / 170))

    # Small classes last, so that no outline of a large one covers them.
    counts = indices.flatten().long().bincount(minlength=1).tolist()
    sizes = {value: count for value, count in enumerate(counts) if value != 0 and count}
    order = sorted(sizes, key=lambda value: -sizes[value])
    centers = {}
    for value in order:
        inside = indices == value
        if value == VOID:
            picture = torch.where(inside, torch.lerp(picture, _column(VOID_COLOR), 0.5), picture)
            continue

        line = inside & ~_shrunk(inside, reach)
        casing = ~inside & _grown(inside, max(1, reach // 2))
        picture = torch.where(inside, torch.lerp(picture, _column(bright(value)), TINT), picture)
        picture = torch.where(casing, 0.35 * picture, picture)
        picture = torch.where(line, _column(bright(value)), picture)
        centers[value] = _deepest(inside)

    return Outlined(picture.round().to(torch.uint8), centers)


def _resized(image: Tensor, mask: Tensor, shortest: int, longest: int) -> tuple[Tensor, Tensor]:
    side = max(image.shape[1:])
    scale = min(max(side, shortest), longest) / side
    size = [max(1, round(scale * edge)) for edge in image.shape[1:]]

    picture = F.interpolate(image[None].float(), size, mode="bicubic", antialias=scale < 1)[0].clamp(0, 255)
    # Nearest neighbors make no new indices.
    indices = F.interpolate(mask[None, None].to(torch.uint8), size, mode="nearest-exact")[0, 0]
    return picture, indices


def _column(color: Rgb) -> Tensor:
    return torch.tensor(color, dtype=torch.float32)[:, None, None]


def _grown(inside: Tensor, reach: int) -> Tensor:
    """Also the pixels that lie at most ``reach`` away."""
    window = 2 * reach + 1
    return F.max_pool2d(inside[None, None].float(), window, 1, reach)[0, 0] > 0


def _shrunk(inside: Tensor, reach: int) -> Tensor:
    """Only the pixels further inside; the border of the picture is none of the class's."""
    return ~_grown(~inside, reach)


def _deepest(inside: Tensor) -> tuple[float, float]:
    """The pixel (x, y) that lies furthest from the outline and from the border of the picture."""
    from scipy import ndimage  # slow to import, and a report alone needs it

    framed = np.pad(inside.numpy(), 1)
    depth = ndimage.distance_transform_edt(framed)[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return float(column), float(row)


def place_names(centers: dict[int, tuple[float, float]], classes: Sequence[str], size: tuple[int, int]) -> list[Label]:
    """Where the names of classes stand on a picture: on their regions, inside the picture, and beside each other.

    Args:
        centers: Of :class:`Outlined`.
        classes: Names of the indices 1, 2, ...
        size: Height and width of the picture in pixels.
    """
    height, width = size
    font = max(0.035 * max(size), 0.05 * min(size))

    labels: list[Label] = []
    for value, (x, y) in centers.items():
        name = classes[value - 1] if value <= len(classes) else f"class {value}"
        # A name longer than the picture is wide is written smaller.
        letters = LETTER * len(name) + 0.8
        letter = min(font, width / letters)
        wide, high = letters * letter, 1.5 * letter
        left = min(max(x - wide / 2, 0), width - wide)
        top = min(max(y - high / 2, 0), max(height - high, 0))
        labels.append(_beside(Label(name, bright(value), left, top, wide, high, letter), labels, height))
    return labels


def _beside(label: Label, others: Sequence[Label], height: int) -> Label:
    """The place nearest above or below where a name covers no other; where it is, if there is none."""
    steps = (0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0)
    for step in steps:
        moved = label._replace(y=label.y + 1.1 * step * label.height)
        fits = 0 <= moved.y <= max(height - label.height, 0)
        if fits and not any(moved.overlaps(other) for other in others):
            return moved
    return label
