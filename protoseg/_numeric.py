"""What the mathematics rests on: float32 inside, and means and directions that over nothing are 0, never NaN."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(value: Tensor) -> Tensor:
    """Return ``value`` in float32, or unchanged where it already is float32 or float64."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def unit(value: Tensor, dim: int = -1) -> Tensor:
    """Divide by the Euclidean length along ``dim``; a zero vector stays zero.

    Unlike that of :func:`torch.nn.functional.normalize`, the gradient at a zero vector is not multiplied by 1e12.
    """
    length = torch.linalg.vector_norm(value, dim=dim, keepdim=True)
    return value / torch.where(length > 1e-12, length, torch.ones_like(length))


def mean_of(points: Tensor, valid: Tensor) -> Tensor:
    """Average the valid points.

    Args:
        points: ``[..., N, D]``, finite, also where not valid.
        valid: ``[..., N]`` bool.

    Returns:
        ``[..., D]``; 0 where nothing is valid.
    """
    with torch.autocast(points.device.type, enabled=False):
        points = full_precision(points)
        weights = valid.to(points.dtype)
        return (weights.unsqueeze(-2) @ points).squeeze(-2) / weights.sum(-1, keepdim=True).clamp_min(1.0)
