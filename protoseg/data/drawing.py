"""The few strokes that made pictures are drawn with: patterns, bodies, sceneries and light."""

from __future__ import annotations

import colorsys
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PATTERNS",
    "SCENERIES",
    "Canvas",
    "Form",
    "Look",
    "Pose",
    "Scenery",
    "hsv",
    "pattern",
    "rim",
    "silhouette",
]

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

PATTERNS = ("striped", "spotted", "plain", "checked", "ringed", "banded")
"""What a surface can be covered with; every name is also the adjective in the caption."""

_CELLS = 7  # control points per side of the smooth field: features of about a sixth of the picture


class Look(NamedTuple):
    """Two colors ``[3]`` in 0..1 and the pattern that mixes them; ``period`` in picture sides."""

    first: Floats
    second: Floats
    kind: str
    period: float


class Form(NamedTuple):
    """A body's outline: superellipse exponent, narrowing towards the tail, and length over width."""

    power: float
    taper: float
    aspect: float


class Pose(NamedTuple):
    """Where an object stands: center in 0..1, direction of its head in radians, share of the picture."""

    x: float
    y: float
    angle: float
    share: float


class Scenery(NamedTuple):
    """A background kind: its phrase in captions and its look; ``warp`` bends the pattern, in periods."""

    name: str
    phrase: str
    look: Look
    angle: float
    warp: float


def _color(red: float, green: float, blue: float) -> Floats:
    return np.array([red, green, blue], np.float32)


def hsv(hue: float, saturation: float, value: float) -> Floats:
    """Return the RGB color ``[3]`` in 0..1; ``hue`` wraps around at 1."""
    return _color(*colorsys.hsv_to_rgb(hue % 1.0, saturation, value))


# Muted colors and coarse or bent patterns, so that bodies and telling parts stand out from all of them.
SCENERIES = (
    Scenery(
        "meadow",
        "in a meadow",
        Look(_color(0.30, 0.45, 0.20), _color(0.45, 0.60, 0.28), "banded", 0.05),
        0.0,
        2.0,
    ),
    Scenery(
        "sea",
        "on the sea",
        Look(_color(0.20, 0.38, 0.55), _color(0.42, 0.60, 0.72), "striped", 0.14),
        1.57,
        0.8,
    ),
    Scenery(
        "desert",
        "in a desert",
        Look(_color(0.80, 0.68, 0.47), _color(0.68, 0.54, 0.36), "striped", 0.35),
        1.1,
        0.6,
    ),
    Scenery(
        "street",
        "on a street",
        Look(_color(0.42, 0.42, 0.44), _color(0.55, 0.54, 0.53), "checked", 0.25),
        0.0,
        0.0,
    ),
    Scenery(
        "snow",
        "in the snow",
        Look(_color(0.92, 0.94, 0.97), _color(0.80, 0.85, 0.92), "spotted", 0.45),
        0.5,
        1.0,
    ),
    Scenery(
        "forest",
        "in a forest",
        Look(_color(0.10, 0.22, 0.14), _color(0.27, 0.22, 0.15), "striped", 0.17),
        0.0,
        0.25,
    ),
    Scenery(
        "room",
        "in a room",
        Look(_color(0.62, 0.44, 0.34), _color(0.54, 0.36, 0.28), "checked", 0.5),
        0.8,
        0.0,
    ),
    Scenery(
        "cave",
        "in a cave",
        Look(_color(0.24, 0.20, 0.30), _color(0.38, 0.33, 0.42), "ringed", 0.2),
        0.0,
        1.5,
    ),
)
"""The background kinds, in the order in which they are given to worlds with few classes."""


def pattern(kind: str, u: Floats, v: Floats, period: float, phase: float | Floats = 0.0) -> Floats:
    """Return how much of the second color lies at each place.

    Args:
        kind: One of `PATTERNS`.
        u: Coordinate along the object, any shape.
        v: Coordinate across it, of the same shape.
        period: Length after which the pattern repeats, in the unit of the coordinates, above 0.
        phase: Shift in periods; a field bends the pattern.

    Returns:
        Values in 0..1 of the shape of ``u``; edges are a little soft, so that small pictures do not flicker.
    """
    turn = np.float32(2 * math.pi)
    a, b = turn * (u / period + phase), turn * (v / period + phase)
    if kind == "plain":
        return np.zeros_like(u)

    if kind == "striped":
        wave = np.sin(a)
    elif kind == "banded":
        wave = np.sin(b)
    elif kind == "ringed":
        wave = np.sin(turn * (np.hypot(u, v) / period + phase))
    else:
        wave = np.sin(a) * np.sin(b)
        if kind == "spotted":
            wave = np.abs(wave) - np.float32(0.35)

    mix: Floats = np.clip(wave * 3 + 0.5, 0, 1).astype(np.float32, copy=False)
    return mix


def silhouette(x: Floats, y: Floats, pose: Pose, form: Form, telling: float) -> tuple[Bools, Bools, Floats, Floats]:
    """Return the object's area, its telling part and its own coordinates.

    Args:
        x: Column coordinate in 0..1, ``[1, S]``.
        y: Row coordinate in 0..1, ``[S, 1]``.
        pose: Place, direction and size.
        form: Outline of the body.
        telling: Share of the object's area which its telling part takes.

    Returns:
        ``whole`` and ``head``, both ``[S, S]`` bool with ``head`` inside ``whole``; ``u`` and ``v``, both
        ``[S, S]``, the coordinates along and across the body, from its middle, in picture sides.
    """
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    dx, dy = x - np.float32(pose.x), y - np.float32(pose.y)
    u, v = dx * cos + dy * sin, dy * cos - dx * sin

    # The head sits on the end of the body and hides about 0.4 of its own area of it.
    body_area = pose.share * (1 - 0.6 * telling)
    unit = 4 * math.gamma(1 + 1 / form.power) ** 2 / math.gamma(1 + 2 / form.power)
    half_width = math.sqrt(body_area / (unit * form.aspect))
    half_length = half_width * form.aspect
    width = half_width * (1 + form.taper * np.clip(u / half_length, -1, 1))
    body = np.abs(u / half_length) ** form.power + np.abs(v / width) ** form.power < 1

    radius = math.sqrt(pose.share * telling / math.pi)
    head = (u - half_length) ** 2 + v**2 < radius**2
    return body | head, head, u, v


def rim(mask: NDArray[np.uint8], width: int) -> NDArray[np.bool_]:
    """Return where ``mask`` changes within ``width`` pixels (at least 1), along rows or columns."""
    edge = np.zeros(mask.shape, np.bool_)

    across, down = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down

    for _ in range(width - 1):
        grown = edge.copy()
        grown[:, 1:] |= edge[:, :-1]
        grown[:, :-1] |= edge[:, 1:]
        grown[1:] |= edge[:-1]
        grown[:-1] |= edge[1:]
        edge = grown
    return edge


class Canvas:
    """Draws square pictures of one size; the coordinates are made once.

    Args:
        size: Side in pixels.

    Attributes:
        x: Column coordinate of the pixel centers in 0..1, ``[1, size]``.
        y: Row coordinate, ``[size, 1]``.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.x: Floats = ((np.arange(size, dtype=np.float32) + 0.5) / size).astype(np.float32)[None]
        self.y: Floats = self.x.T.copy()
        at = self.x[0] * (_CELLS - 1)
        away = np.abs(at[:, None] - np.arange(_CELLS, dtype=np.float32))
        self._blend: Floats = np.maximum(1 - away, 0).astype(np.float32)

    def smooth(self, rng: np.random.Generator) -> Floats:
        """Return a smooth random field ``[size, size]`` in -1..1."""
        knots = rng.uniform(-1, 1, (_CELLS, _CELLS)).astype(np.float32)
        field: Floats = (self._blend @ knots @ self._blend.T).astype(np.float32, copy=False)
        return field

    def backdrop(self, scenery: Scenery, rng: np.random.Generator) -> Floats:
        """Return a picture ``[3, size, size]`` in 0..1 of nothing but the scenery."""
        look, field = scenery.look, self.smooth(rng)
        angle = scenery.angle + rng.uniform(-0.15, 0.15)
        cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        u, v = self.x * cos + self.y * sin, self.y * cos - self.x * sin
        phase = np.float32(rng.uniform()) + np.float32(scenery.warp) * field
        period = look.period * rng.uniform(0.8, 1.25)
        mix = pattern(look.kind, u, v, period, phase) + np.float32(0.5) * self.smooth(rng)
        return look.first[:, None, None] + (look.second - look.first)[:, None, None] * mix

    def surface(self, look: Look, u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
        """Return the colors ``[3, P]`` of ``P`` places with own coordinates ``u`` and ``v`` ``[P]``."""
        period = look.period * rng.uniform(0.85, 1.15)
        mix = pattern(look.kind, u, v, period, rng.uniform())
        return look.first[:, None] + (look.second - look.first)[:, None] * mix

    def develop(self, image: Floats, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Put light and noise on a picture ``[3, size, size]`` in 0..1 and return it as uint8."""
        slope_x, slope_y = rng.uniform(-0.3, 0.3, 2)
        light = np.float32(rng.uniform(0.8, 1.15)) * (1 + slope_x * (self.x - 0.5) + slope_y * (self.y - 0.5))
        tint = rng.uniform(0.94, 1.06, (3, 1, 1)).astype(np.float32)
        grain = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0.01, 0.04))
        lit = image * (light.astype(np.float32) * tint) + grain
        pixels: NDArray[np.uint8] = (np.clip(lit, 0, 1) * 255).astype(np.uint8)
        return pixels
