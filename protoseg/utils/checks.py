"""One way to say what is wrong with an input: what was expected, what came, what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def shape(where: str, name: str, value: Tensor, expected: Sequence[str | int], remedy: str = "") -> None:
    """Raise unless ``value`` has the rank of ``expected`` and every size that ``expected`` gives as a number.

    Args:
        where: The public name that the user called, for the message.
        name: The argument's name.
        value: The tensor to check.
        expected: One entry per axis: an ``int`` must match, a letter may be any size.
        remedy: What the user can do about it.

    Raises:
        TypeError: ``value`` is no tensor.
        ValueError: Rank or size differs.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(value).__name__}")
    fits = value.dim() == len(expected) and all(
        not isinstance(want, int) or want == have for want, have in zip(expected, value.shape, strict=True)
    )
    if not fits:
        want = "(" + ", ".join(str(axis) for axis in expected) + ")"
        raise ValueError(
            f"{where}: {name} must have shape {want}, got {tuple(value.shape)}" + (f"; {remedy}" if remedy else "")
        )


def floating(where: str, name: str, value: Tensor) -> None:
    """Raise ``TypeError`` unless ``value`` is a floating point tensor."""
    if not value.is_floating_point():
        raise TypeError(f"{where}: {name} must be floating point, got {value.dtype}; call {name}.float()")


def device(where: str, name: str, value: Tensor, expected: torch.device) -> None:
    """Raise ``ValueError`` unless ``value`` is where the module's state is."""
    if value.device != expected:
        raise ValueError(
            f"{where}: {name} must be on the module's device {expected}, got {value.device}; move the module or {name} "
            "with .to(device)"
        )


def finite(where: str, name: str, value: Tensor) -> None:
    """Raise ``ValueError`` when ``value`` holds NaN or infinity (one synchronization with the device)."""
    # Most often one pass will do: a sum is finite only where every value is. Finite values may overflow in it.
    if bool(value.sum().isfinite()):
        return
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise ValueError(
            f"{where}: {name} must be finite, got {bad} NaN or infinite of {value.numel()} values; "
            "look for an overflow in half precision or a learning rate that is too high"
        )


def within_unit_interval(where: str, name: str, value: Tensor, slack: float = 1e-3) -> None:
    """Raise ``ValueError`` unless all of ``value`` lies in 0..1, up to rounding (one synchronization)."""
    if value.numel() == 0:
        return
    low, high = float(value.detach().min()), float(value.detach().max())
    if not (low >= -slack and high <= 1 + slack):
        raise ValueError(
            f"{where}: {name} must lie between 0 and 1 without NaN, got values from {low:g} to {high:g}; "
            "normalize maps, and take the sigmoid of logits, first"
        )


def multi_hot(where: str, name: str, value: Tensor) -> None:
    """Raise ``ValueError`` unless ``value`` holds nothing but 0 and 1 (one synchronization with the device)."""
    if not bool(((value == 0) | (value == 1)).all()):
        raise ValueError(
            f"{where}: {name} must hold only 0 and 1 (1 = the class is in the image), "
            f"got values from {value.min().item():g} to {value.max().item():g}"
        )


def choice(where: str, name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{where}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def positive(where: str, name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is above zero."""
    if not value > 0:
        raise ValueError(f"{where}: {name} must be above 0, got {value}")


def between(
    where: str,
    name: str,
    value: float,
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise ``ValueError`` unless ``value`` lies between the two; not at an end that is open."""
    fits = (low < value if low_open else low <= value) and (value < high if high_open else value <= high)
    if fits:
        return
    wanted = f"above {low}" if low_open else f"at least {low}"
    if high < math.inf:
        wanted += f" and below {high}" if high_open else f" and at most {high}"
    raise ValueError(f"{where}: {name} must be {wanted}, got {value}")


def boolean(where: str, name: str, value: Tensor) -> None:
    """Raise ``TypeError`` unless ``value`` is a bool tensor."""
    if value.dtype != torch.bool:
        raise TypeError(f"{where}: {name} must be bool, got {value.dtype}; call {name}.bool()")


def same_aspect(where: str, name: str, value: Tensor, other: str, reference: Tensor) -> None:
    """Raise ``ValueError`` unless two maps ``[..., H, W]`` may be of one picture, up to a pixel of rounding."""
    (height, width), (rows, columns) = value.shape[-2:], reference.shape[-2:]
    # Both sides are scaled by one factor, and each is rounded.
    fits = (height - 1) * columns <= (width + 1) * rows and (width - 1) * rows <= (height + 1) * columns
    if not fits:
        raise ValueError(
            f"{where}: {name} and {other} must show the same picture, got maps of {(height, width)} and "
            f"{(rows, columns)} (H, W); are height and width exchanged?"
        )


def unit_interval(where: str, name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` lies between 0 and 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{where}: {name} must lie between 0 and 1, got {value}")


def not_empty(where: str, name: str, value: Tensor) -> None:
    """Raise ``ValueError`` when an axis of ``value`` has no entry."""
    if value.numel() == 0:
        raise ValueError(f"{where}: {name} must not be empty, got shape {tuple(value.shape)}")


def near_names(name: str, known: Iterable[str], count: int = 5, cutoff: float = 0.6) -> str:
    """The names that are most like ``name``, with commas between them; empty where none is alike."""
    return ", ".join(difflib.get_close_matches(name, list(known), count, cutoff))
