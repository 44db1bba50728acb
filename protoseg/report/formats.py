"""Numbers and pictures as the text that a page holds."""

from __future__ import annotations

import base64
import io
import math
from typing import Any, NamedTuple

from einops import rearrange
from torch import Tensor

from protoseg.utils.extras import require

DASH = "\N{EN DASH}"
LONGEST_SIDE = 400  # pixels of a picture in the file; it is shown at about half of that


class Change(NamedTuple):
    """A difference in points with its sign, and its direction: ``up``, ``down`` or empty."""

    text: str
    direction: str


NO_CHANGE = Change(DASH, "")


def number(value: Any) -> float | None:
    """``value``, of any type that has a number, as a float; None when it is missing, NaN, infinite or no number."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None

    return found if math.isfinite(found) else None


def percent(value: object) -> str:
    """A share 0..1 as a percentage with one digit, a dash when there is none."""
    share = number(value)
    if share is None:
        return DASH

    return f"{100 * share:.1f}"


def fixed(value: object) -> str:
    """A number with three digits, a dash when there is none."""
    found = number(value)
    if found is None:
        return DASH

    return f"{found:.3f}"


def change(new: object, old: object) -> Change:
    """How far a share lies above another, in points; a dash when one of them is missing."""
    after = number(new)
    before = number(old)
    if after is None or before is None:
        return NO_CHANGE

    points = 100 * (after - before)
    text = f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")
    if text[1:] == "0.0":
        return Change(text, "")

    direction = "up" if points > 0 else "down"
    return Change(text, direction)


def duration(value: object) -> str:
    """Seconds as people say them, a dash when there are none."""
    seconds = number(value)
    if seconds is None:
        return DASH

    if seconds < 60:
        return f"{seconds:.1f} s"

    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"

    return f"{minutes // 60} h {minutes % 60} min"


def data_uri(image: Tensor, longest: int = LONGEST_SIDE) -> str:
    """``[3, H, W]`` uint8 as the address of a JPEG that the address itself holds.

    Args:
        image: The picture.
        longest: Pixels of its longer side; one with more is made smaller.

    Raises:
        ImportError: PIL is not installed.
    """
    pil = require("PIL.Image", "write_report", "recipes")

    pixels = rearrange(image.detach().cpu(), "c h w -> h w c").contiguous()
    picture = pil.fromarray(pixels.numpy())
    picture.thumbnail((longest, longest), pil.Resampling.LANCZOS)

    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
