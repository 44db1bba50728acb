"""Heat maps and masks laid over a picture, in torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from protoseg.data import voc_palette
from protoseg.utils import checks

# "inferno" of matplotlib at nine even steps: lightness rises evenly with the score, so equal steps look equal
# and a viewer who sees no colours still sees the order. A straight line between them is close enough.
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
    """The PASCAL VOC colours, ``[256, 3]`` uint8."""
    return torch.tensor(voc_palette(256), dtype=torch.uint8).view(256, 3)


def overlay(image: Tensor, layer: Tensor, *, strength: float = 0.65) -> Tensor:
    """Lay a heat map or a mask over a picture.

    A floating point layer is a heat map: the picture turns grey, and colours from black over red to yellow
    are mixed in. An integer layer is a mask: each class is mixed in with its PASCAL VOC colour, full at its
    edge, void is a pale veil, and background shows the picture as it is.

    Args:
        image: ``[3, H, W]`` uint8.
        layer: ``[H, W]``: floating point scores 0..1 (clamped, NaN as 0: a picture must not end a run),
            or a mask of integers 0..255 (0 = background, 255 = void).
        strength: Share of the layer's colours in the mixture, 0..1.

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
    checks.unit_interval("overlay", "strength", strength)
    if layer.dtype == torch.bool or layer.is_complex():
        raise TypeError(f"overlay: layer must hold floating point scores or an integer mask, got {layer.dtype}")
    picture, layer = image.detach().cpu().float(), layer.detach().cpu()
    mix = _heat if layer.is_floating_point() else _mask
    return mix(picture, layer, float(strength)).round().to(torch.uint8)


def _heat(picture: Tensor, score: Tensor, strength: float) -> Tensor:
    steps = torch.tensor(HEAT, dtype=torch.float32)
    position = score.float().nan_to_num(0, 1, 0).clamp(0, 1) * (len(HEAT) - 1)
    below = position.long().clamp(max=len(HEAT) - 2)
    colour = torch.lerp(steps[below], steps[below + 1], (position - below)[..., None]).movedim(-1, 0)
    grey = (picture * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    return torch.lerp(grey.expand_as(colour), colour, strength)


def _mask(picture: Tensor, mask: Tensor, strength: float) -> Tensor:
    mask = mask.long()
    if mask.numel() and not 0 <= int(mask.min()) <= int(mask.max()) <= 255:
        raise ValueError(f"overlay: a mask must hold 0..255, got {int(mask.min())} to {int(mask.max())}")
    edge = torch.zeros_like(mask, dtype=torch.bool)
    for axis in (0, 1):
        if mask.shape[axis] > 1:
            last = mask.shape[axis] - 1
            differs = mask.narrow(axis, 0, last) != mask.narrow(axis, 1, last)
            edge.narrow(axis, 0, last).logical_or_(differs)
            edge.narrow(axis, 1, last).logical_or_(differs)
    share = torch.where(edge, max(strength, 0.95), strength)
    share = share.masked_fill(mask == 0, 0.0).masked_fill(mask == 255, strength / 2)
    return torch.lerp(picture, palette()[mask].movedim(-1, 0).float(), share.expand_as(picture))
