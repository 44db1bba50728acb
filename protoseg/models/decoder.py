"""A light decoder on the frozen features of a vision transformer, and its losses (VPL, phase 2; WeCLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from protoseg.utils import checks
from protoseg.utils.extras import require
from protoseg.utils.numeric import full_precision

__all__ = ["Decoded", "FrozenDecoder", "affinity_loss", "balanced_cross_entropy"]

Block = require("timm.models.vision_transformer", "protoseg.models.decoder", "timm").Block
IGNORE = 255


class Decoded(NamedTuple):
    """What :class:`FrozenDecoder` returns.

    Attributes:
        logits: ``[B, 1 + C, h, w]``, background first.
        features: ``[B, E, h, w]``, the decoder's features in the space of the prototypes, for regional contrast.
        affinity: ``[B, h w, h w]``, logits of two patches being of the same class; symmetric.
    """

    logits: Tensor
    features: Tensor
    affinity: Tensor


class FrozenDecoder(nn.Module):
    """Fuses the features of several layers, mixes them in a few transformer blocks, and classifies patches.

    The paper states that there is a decoder on frozen features, not which; this follows WeCLIP's design.

    Args:
        widths: Channels of each layer's features.
        classes: ``C``, without background.
        embed_dim: ``E``, of the prototypes.
        dim: Channels inside.
        depth: Transformer blocks; 3 in WeCLIP.
        heads: Of each.

    Shape:
        A map ``[B, W, h, w]`` per layer to :class:`Decoded`, of the size of the first; the others are resized.

    Raises:
        ValueError: Another number of maps, or another number of channels.

    Example:
        >>> decoder = FrozenDecoder([64, 64], classes=3, embed_dim=32, dim=16, depth=1, heads=2)
        >>> out = decoder([torch.randn(1, 64, 4, 6), torch.randn(1, 64, 4, 6)])
        >>> out.logits.shape, out.features.shape, out.affinity.shape
        (torch.Size([1, 4, 4, 6]), torch.Size([1, 32, 4, 6]), torch.Size([1, 24, 24]))
    """

    def __init__(
        self, widths: Sequence[int], classes: int, embed_dim: int, *, dim: int = 256, depth: int = 3, heads: int = 8
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.enter = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim)) for width in widths)
        self.fuse = nn.Sequential(nn.Linear(len(self.widths) * dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.classify, self.project = nn.Linear(dim, 1 + classes), nn.Linear(dim, embed_dim)

    def forward(self, maps: Sequence[Tensor]) -> Decoded:
        """Decode. See the class for shapes and errors."""
        if len(maps) != len(self.enter):
            raise ValueError(f"FrozenDecoder: expected the features of {len(self.enter)} layers, got {len(maps)}")
        for place, each in enumerate(maps):
            checks.shape("FrozenDecoder", f"maps[{place}]", each, ("B", self.widths[place], "h", "w"))
        tokens = [rearrange(_resized(each, maps[0].shape[-2:]), "b d h w -> b (h w) d") for each in maps]
        fused = self.fuse(torch.cat([enter(each) for enter, each in zip(self.enter, tokens, strict=True)], -1))
        mixed = fused
        for block in self.blocks:
            mixed = block(mixed)
        mixed = self.norm(mixed)
        grid = maps[0].shape[-2:]

        def grown(value: Tensor) -> Tensor:
            return rearrange(value, "b (h w) d -> b d h w", h=grid[0], w=grid[1])

        affinity = fused @ fused.transpose(1, 2) * fused.shape[-1] ** -0.5
        return Decoded(grown(self.classify(mixed)), grown(self.project(mixed)), affinity)


def balanced_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of which pixels of background and pixels of classes are one half each.

    Args:
        logits: ``[B, 1 + C, H, W]``.
        target: ``[B, H, W]`` integers, 0 = background, 255 = does not count.

    Returns:
        ``[]``; zero and connected to the graph where no pixel counts.

    Raises:
        ValueError: Wrong shape.

    Example:
        >>> balanced_cross_entropy(torch.zeros(1, 2, 2, 2), torch.tensor([[[0, 0], [0, 1]]])).item()  # log 2
        0.6931471824645996
    """
    checks.shape("balanced_cross_entropy", "logits", logits, ("B", "C", "H", "W"))
    checks.shape("balanced_cross_entropy", "target", target, (len(logits), *logits.shape[-2:]))
    each = F.cross_entropy(full_precision(logits), target.long(), ignore_index=IGNORE, reduction="none")
    return _halves(each, target == 0, (target != 0) & (target != IGNORE))


def affinity_loss(affinity: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of two patches being of the same class, same and other ones one half each.

    Args:
        affinity: ``[B, L, L]`` logits.
        target: ``[B, L]`` or ``[B, h, w]`` integers, the patches' classes, 255 = does not count.

    Returns:
        ``[]``; zero and connected to the graph where no pair counts. A patch is no pair with itself.

    Raises:
        ValueError: Wrong shape.

    Example:
        >>> sure = torch.tensor([[[0.0, 9.0, -9.0], [9.0, 0.0, -9.0], [-9.0, -9.0, 0.0]]])
        >>> affinity_loss(sure, torch.tensor([[1, 1, 0]])).item() < 0.001
        True
    """
    checks.shape("affinity_loss", "affinity", affinity, ("B", "L", affinity.shape[-1] if affinity.dim() else "L"))
    target = target.flatten(1)
    checks.shape("affinity_loss", "target", target, affinity.shape[:2])
    known = target != IGNORE
    pairs = known.unsqueeze(1) & known.unsqueeze(2)
    pairs = pairs & ~torch.eye(target.shape[1], dtype=torch.bool, device=target.device)
    same = target.unsqueeze(1) == target.unsqueeze(2)
    affinity = full_precision(affinity)
    each = F.binary_cross_entropy_with_logits(affinity, same.to(affinity.dtype), reduction="none")
    return _halves(each, pairs & same, pairs & ~same)


def _resized(map_: Tensor, size: Sequence[int]) -> Tensor:
    same = tuple(map_.shape[-2:]) == tuple(size)
    return map_ if same else F.interpolate(map_, tuple(size), mode="bilinear", align_corners=False)


def _halves(values: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Mean of two means; of one where the other is of nothing."""
    zero = torch.zeros_like(values)
    means = [torch.where(part, values, zero).sum() / part.sum().clamp_min(1) for part in (first, second)]
    there = sum(part.any().to(values.dtype) for part in (first, second))
    return (means[0] + means[1]) / torch.as_tensor(there).clamp_min(1)
