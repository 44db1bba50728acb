"""What open_clip's convolutional timm towers, such as ConvNeXt's, do on the way to an embedding, step by step.

These are the functions of :mod:`protoseg._clip_vit`; in the place of tokens are maps, in that of patches the cells of
the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from protoseg._clip_resnet import spatial, watch_stages
from protoseg._clip_vit import Watched

__all__ = ["blocks", "knows", "patch", "pooled", "project", "run", "spatial", "watch", "width"]


def knows(visual: Any) -> bool:
    """Whether the network is one of these: stages, then a head that averages over places."""
    trunk = getattr(visual, "trunk", None)
    return all(hasattr(trunk, name) for name in ("stages", "forward_features", "forward_head", "feature_info"))


def patch(visual: Any) -> int:
    """The pixels of a side of what one feature stands for."""
    return int(visual.trunk.feature_info[-1]["reduction"])


def width(visual: Any) -> int:
    """The width of the space of the texts."""
    weight = next(visual.parameters())
    cell = torch.zeros(1, visual.trunk.num_features, 1, 1, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        return int(pooled(visual, cell).shape[-1])


def blocks(visual: Any) -> list[nn.Module]:
    """The parts whose output can be asked for: the stages."""
    return list(visual.trunk.stages)


def run(visual: Any, images: Tensor) -> Tensor:
    """Turn pictures into the last stage's map, ``[B, W, h, w]``."""
    maps: Tensor = visual.trunk.forward_features(images)
    return maps


def project(visual: Any, maps: Tensor) -> Tensor:
    """Bring each place of the last map by itself into the space of the texts, ``[B, E, h, w]``.

    This is the embedding of a picture that looks everywhere as it looks there.
    """
    batch, channels, height, across = maps.shape
    cells = maps.movedim(1, -1).reshape(-1, channels, 1, 1)
    return pooled(visual, cells).reshape(batch, height, across, -1).movedim(-1, 1)


def pooled(visual: Any, maps: Tensor) -> Tensor:
    """The model's own embedding of the pictures, ``[B, E]``, of the last map."""
    whole: Tensor = visual.head(visual.trunk.forward_head(maps))
    return whole


def watch(
    visual: Any, *, leaf: bool = False, attentions: int = 0, layers: Sequence[int] = ()
) -> AbstractContextManager[Watched]:
    """Catch the last stage's output, where the graph then begins, and what stages put out."""
    return watch_stages(visual, blocks(visual), leaf=leaf, attentions=attentions, layers=layers)
