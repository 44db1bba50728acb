"""How colors are shifted and scaled before a network sees them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Color", "normalize"]

Color = tuple[float, ...]

IMAGENET_MEAN: Color = (0.485, 0.456, 0.406)
IMAGENET_STD: Color = (0.229, 0.224, 0.225)


def normalize(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Subtract a mean from the colors and divide by a standard deviation.

    Args:
        images: ``[..., 3, H, W]`` in 0..1.
        mean: Of red, green and blue.
        std: Of red, green and blue.

    Returns:
        The same shape.
    """
    center, scale = (torch.tensor(each, dtype=torch.float32, device=images.device) for each in (mean, std))
    return (images - center[:, None, None]) / scale[:, None, None]
