"""Heat maps and masks laid over a picture, in torch alone."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from protoseg.data import voc_palette
from protoseg.utils import checks

__all__ = ["HEAT", "overlay", "palette"]

# "inferno" of matplotlib at nine even steps: lightness rises evenly with the score, so equal steps look equal
# and a viewer who sees no colors still sees the order. A straight line between them is close enough.
HEAT = (
    (0, 0, 4),
    (33, 12, 74),
    (87, 16, 110),
    (138, 34, 106),
    (188, 55, 84),
    (228, 90, 49),
    (249, 142, 9),
    (249, 203, 53),
    (252, 255, 164),
)


def palette() -> Tensor:
    """The PASCAL VOC colors, ``[256, 3]`` uint8."""
    return torch.tensor(voc_palette(256), dtype=torch.uint8).view(256, 3)


def overlay(image: Tensor, layer: Tensor, *, strength: float = 0.65) -> Tensor:
    """Lay a heat map or a mask over a picture.

    A floating point layer is a heat map: the picture turns gray, and colors from black over red to yellow
    are mixed in. An integer layer is a mask: each class is mixed in with its PASCAL VOC color, full at its
    edge, void is a pale veil, and background shows the picture as it is.

    Args:
        image: ``[3, H, W]`` uint8.
        layer: ``[H, W]``: floating point scores 0..1 (clamped, NaN as 0: a picture must not end a run),
            or a mask of integers 0..255 (0 = background, 255 = void).
        strength: Share of the layer's colors in the mixture, 0..1.

    Returns:
        ``[3, H, W]`` uint8 on the CPU.

    Raises:
        TypeError: ``image`` is not uint8, or ``layer`` is a boolean or complex tensor.
        ValueError: A shape or ``strength`` is wrong, or a mask holds a value outside 0..255.

    Example:
        >>> image = torch.full((3, 2, 2), 200, dtype=torch.uint8)
        >>> overlay(image, torch.tensor([[0, 0], [0, 1]]), strength=1)[:, 1, 1]  # class 1 is dark red
        tensor([128,   0,   0], dtype=torch.uint8)
        >>> overlay(image, torch.rand(2, 2)).shape
        torch.Size([3, 2, 2])
    """
    checks.shape("overlay", "image", image, (3, "H", "W"))
    if image.dtype != torch.uint8:
        raise TypeError(f"overlay: image must be uint8 with values 0..255, got {image.dtype}")

    checks.shape("overlay", "layer", layer, tuple(image.shape[1:]), "resize the layer to the image")
    if layer.dtype == torch.bool or layer.is_complex():
        raise TypeError(f"overlay: layer must hold floating point scores or an integer mask, got {layer.dtype}")

    checks.unit_interval("overlay", "strength", strength)

    picture = image.detach().cpu().float()
    layer = layer.detach().cpu()
    mix = _with_heat if layer.is_floating_point() else _with_mask
    return mix(picture, layer, float(strength)).round().to(torch.uint8)


def _with_heat(picture: Tensor, score: Tensor, strength: float) -> Tensor:
    steps = torch.tensor(HEAT, dtype=torch.float32)
    position = score.float().nan_to_num(0, 1, 0).clamp(0, 1) * (len(HEAT) - 1)
    below = position.long().clamp(max=len(HEAT) - 2)
    color = torch.lerp(steps[below], steps[below + 1], (position - below)[..., None])
    color = rearrange(color, "h w c -> c h w")

    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    gray = (picture * luma).sum(0)

    return torch.lerp(gray.expand_as(color), color, strength)


def _with_mask(picture: Tensor, mask: Tensor, strength: float) -> Tensor:
    mask = mask.long()
    if mask.numel() and not 0 <= int(mask.min()) <= int(mask.max()) <= 255:
        raise ValueError(f"overlay: a mask must hold 0..255, got {int(mask.min())} to {int(mask.max())}")

    share = torch.where(_edges(mask), max(strength, 0.95), strength)
    share = share.masked_fill(mask == 0, 0.0).masked_fill(mask == 255, strength / 2)

    color = rearrange(palette()[mask], "h w c -> c h w").float()
    return torch.lerp(picture, color, share.expand_as(picture))


def _edges(mask: Tensor) -> Tensor:
    """Which pixels have a neighbor of another class above, below, left or right, ``[H, W]`` bool."""
    edge = torch.zeros_like(mask, dtype=torch.bool)

    below = mask[1:] != mask[:-1]
    edge[1:] |= below
    edge[:-1] |= below

    beside = mask[:, 1:] != mask[:, :-1]
    edge[:, 1:] |= beside
    edge[:, :-1] |= beside

    return edge
