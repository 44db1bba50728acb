"""What the mathematics rests on: float32 inside, and means and directions that over nothing are 0, never NaN."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a device computes in the precision of its tensors, whatever autocast says."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def summing_dtype(device: torch.device) -> torch.dtype:
    """The precision for long sums: float64, but float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def full_precision(value: Tensor) -> Tensor:
    """Return ``value`` in float32, or unchanged where it already is float32 or float64."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def unit(value: Tensor, dim: int = -1) -> Tensor:
    """Divide by the Euclidean length along ``dim``; a zero vector stays zero.

    Unlike that of :func:`torch.nn.functional.normalize`, the gradient at a zero vector is not multiplied by 1e12.
    """
    length = torch.linalg.vector_norm(value, dim=dim, keepdim=True)
    return value / torch.where(length > 1e-12, length, torch.ones_like(length))


def masked_mean(points: Tensor, valid: Tensor) -> Tensor:
    """Average the valid points.

    Args:
        points: ``[..., N, D]``, finite, also where not valid.
        valid: ``[..., N]`` bool.

    Returns:
        ``[..., D]``; 0 where nothing is valid.
    """
    with no_autocast(points.device):
        points = full_precision(points)
        weights = valid.to(points.dtype)
        return (weights.unsqueeze(-2) @ points).squeeze(-2) / weights.sum(-1, keepdim=True).clamp_min(1.0)


def block_size(device: torch.device) -> int:
    """How many numbers to work on at once: on the CPU what its cache can hold, elsewhere what bounds memory."""
    return 2**21 if device.type == "cpu" else 2**28


def pixel_length(features: Tensor, origin: Tensor | None = None) -> Tensor:
    """Euclidean length of every pixel's feature, seen from ``origin``, without a copy of the features.

    Args:
        features: ``[B, D, P]``.
        origin: ``[D]``.

    Returns:
        ``[B, 1, P]``; where it is 0 its gradient is 0.
    """
    origin = features.new_zeros(features.shape[1]) if origin is None else origin.to(features.dtype)
    lengths: Tensor = _PixelLength.apply(features, origin)
    return lengths


class _PixelLength(torch.autograd.Function):
    """Keeps its input only, where ``(features - origin).norm(dim=1)`` keeps the difference, and reads it but once."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, origin: Tensor) -> Tensor:
        channels = max(1, block_size(features.device) // 4 // features[:, 0].numel())
        squared = features.new_zeros(len(features), 1, features.shape[-1])
        for some, there in zip(torch.split(features, channels, 1), torch.split(origin, channels), strict=True):
            squared += (some - there.unsqueeze(-1)).square_().sum(1, keepdim=True)
        lengths = squared.sqrt_()
        ctx.save_for_backward(features, origin, lengths)
        return lengths

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        features, origin, lengths = ctx.saved_tensors
        scale = torch.where(lengths > 0, grad / lengths, torch.zeros_like(grad))
        result = (features - origin.unsqueeze(-1)) * scale
        return result, -result.sum((0, 2)) if ctx.needs_input_grad[1] else None
