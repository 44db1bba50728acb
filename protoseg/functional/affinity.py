"""Refinement of maps by attention affinity, as in CLIP-ES (arXiv 2212.09506)."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from protoseg.utils import checks
from protoseg.utils.numeric import full_precision, no_autocast, unit

__all__ = ["attention_affinity", "feature_attention", "refine_by_affinity"]


def attention_affinity(attention: Tensor, rounds: int = 3, power: int = 2) -> Tensor:
    r"""Make a symmetric, nearly doubly stochastic affinity of an attention.

    Rows and columns are divided by their sums in turn (Sinkhorn), then
    :math:`A = \left( \tfrac{1}{2} (D + D^T) \right)^p`.

    Args:
        attention: ``[B, L, L]`` of at least 0, rows of sum 1.
        rounds: Of Sinkhorn, at least 0; 3 in CLIP-ES.
        power: :math:`p`, at least 1; 2 in CLIP-ES.

    Returns:
        ``[B, L, L]``.

    Raises:
        ValueError: Wrong shape or a number out of range.

    Example:
        >>> attention_affinity(torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])).tolist()
        [[[0.5, 0.5], [0.5, 0.5]]]
    """
    length = attention.shape[-1] if attention.dim() else "L"
    checks.shape("attention_affinity", "attention", attention, ("B", "L", length))
    checks.positive("attention_affinity", "power", power)
    matrix = full_precision(attention)
    for _ in range(rounds):
        matrix = matrix / matrix.sum(1, keepdim=True).clamp_min(1e-30)
        matrix = matrix / matrix.sum(2, keepdim=True).clamp_min(1e-30)
    matrix = (matrix + matrix.transpose(1, 2)) / 2
    with no_autocast(attention.device):
        result: Tensor = torch.linalg.matrix_power(matrix, power)
    return result


def refine_by_affinity(maps: Tensor, affinity: Tensor, box_threshold: float = 0.4) -> Tensor:
    r"""Spread each map along the affinity, from within the boxes around its strong parts.

    .. math:: M'_c = A \,(B_c \odot M_c)

    where :math:`B_c` is 1 in the bounding boxes of the connected parts with at least ``box_threshold`` of the map's
    maximum.

    Args:
        maps: ``[B, C, H, W]`` of at least 0.
        affinity: ``[B, H W, H W]``.
        box_threshold: In ``[0, 1]``; 0.4 in CLIP-ES.

    Returns:
        ``[B, C, H, W]``.

    Raises:
        ValueError: Wrong shape or a threshold out of range.

    Example:
        >>> refine_by_affinity(torch.tensor([[[[1.0, 0.0]]]]), torch.full((1, 2, 2), 0.5)).tolist()
        [[[[0.5, 0.5]]]]
    """
    checks.shape("refine_by_affinity", "maps", maps, ("B", "C", "H", "W"))
    batch, _, height, width = maps.shape
    pixels = height * width
    checks.shape("refine_by_affinity", "affinity", affinity, (batch, pixels, pixels), "one row per pixel of the maps")
    checks.unit_interval("refine_by_affinity", "box_threshold", box_threshold)
    kept = full_precision(maps) * _boxes(maps, box_threshold)
    with no_autocast(maps.device):
        spread = affinity.to(kept) @ rearrange(kept, "b c h w -> b (h w) c")
        return rearrange(spread, "b (h w) c -> b c h w", h=height)


def _boxes(maps: Tensor, threshold: float) -> Tensor:
    strong = (maps >= threshold * maps.amax((-2, -1), keepdim=True)) & (maps > 0)
    from scipy import ndimage

    boxes = np.zeros(maps.shape, bool)
    for place, each in zip(np.ndindex(*maps.shape[:2]), strong.flatten(0, 1).cpu().numpy(), strict=True):
        labeled, _ = ndimage.label(each, np.ones((3, 3)))
        for box in ndimage.find_objects(labeled):
            boxes[place][box] = True
    return torch.from_numpy(boxes).to(maps.device)


def feature_attention(features: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Stand in for the attention of a network whose places do not attend to each other.

    .. math:: D_{lm} = \mathrm{softmax}_m(\cos(f_l, f_m) / \tau)

    Not in CLIP-ES or VPL, which use vision transformers; the temperature is a guess.

    Args:
        features: ``[B, E, h, w]``.
        temperature: :math:`\tau` above 0.

    Returns:
        ``[B, h w, h w]``, rows of sum 1, for :func:`attention_affinity`.

    Raises:
        ValueError: Wrong shape or a temperature that is not above 0.

    Example:
        >>> feature_attention(torch.ones(1, 3, 1, 2)).tolist()
        [[[0.5, 0.5], [0.5, 0.5]]]
    """
    checks.shape("feature_attention", "features", features, ("B", "E", "h", "w"))
    checks.positive("feature_attention", "temperature", temperature)
    places = unit(rearrange(full_precision(features), "b e h w -> b (h w) e"))
    with no_autocast(features.device):
        return (places @ places.transpose(1, 2) / temperature).softmax(-1)
