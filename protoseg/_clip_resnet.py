"""What open_clip's ResNets do on the way to an embedding, step by step and for pictures of any size.

These are the functions of :mod:`protoseg._clip_vit`; in the place of tokens are maps, in that of patches the cells of
the last stage.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg._clip_vit import Grid, Hook, Watched, hooked, position


def knows(visual: Any) -> bool:
    """Whether the network is one of these, by its parts."""
    pool = getattr(visual, "attnpool", None)
    parts = (hasattr(visual, name) for name in ("stem", "layer1", "layer2", "layer3", "layer4"))
    return all(parts) and all(hasattr(pool, f"{name}_proj") for name in "qkvc")


def patch(visual: Any) -> int:
    """The pixels of a side of what one feature stands for: the stem divides sides by 4, three stages by 2 each."""
    return 32


def width(visual: Any) -> int:
    """The width of the space of the texts."""
    return int(visual.attnpool.c_proj.weight.shape[0])


def blocks(visual: Any) -> list[nn.Module]:
    """The parts whose output can be asked for: the four stages."""
    return [visual.layer1, visual.layer2, visual.layer3, visual.layer4]


def run(visual: Any, images: Tensor) -> Tensor:
    """Turn pictures into the last stage's map, ``[B, W, h, w]``."""
    maps: Tensor = visual.stem(images)
    for stage in blocks(visual):
        maps = stage(maps)
    return maps


def spatial(maps: Tensor, grid: Grid) -> Tensor:
    """Maps as they are."""
    return maps


def project(visual: Any, maps: Tensor) -> Tensor:
    """Bring each place of the last map by itself into the space of the texts, ``[B, E, h, w]``, as MaskCLIP does.

    This is what the attention pool would return, did it attend to that place alone and have no position embedding.
    """
    pool = visual.attnpool
    features: Tensor = pool.c_proj(pool.v_proj(maps.movedim(1, -1)))
    return features.movedim(-1, 1)


def pooled(visual: Any, maps: Tensor) -> Tensor:
    """The model's own embedding of the pictures, ``[B, E]``, of the last map: what the mean of it attends to."""
    pool = visual.attnpool
    side = math.isqrt(len(pool.positional_embedding) - 1)
    places = maps.flatten(2).transpose(1, 2)
    known = position(pool.positional_embedding, (side, side), (maps.shape[-2], maps.shape[-1]))
    tokens = torch.cat([places.mean(1, keepdim=True), places], 1) + known.to(maps.dtype)
    q, k, v = (
        each.unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        for each in (pool.q_proj(tokens[:, :1]), pool.k_proj(tokens), pool.v_proj(tokens))
    )
    whole: Tensor = pool.c_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))
    return whole


def watch(
    visual: Any, *, leaf: bool = False, attentions: int = 0, layers: Sequence[int] = ()
) -> AbstractContextManager[Watched]:
    """Catch the last stage's output, where the graph then begins, and what stages put out."""
    return watch_stages(visual, blocks(visual), leaf=leaf, attentions=attentions, layers=layers)


@contextlib.contextmanager
def watch_stages(
    visual: Any, stages: Sequence[nn.Module], *, leaf: bool, attentions: int, layers: Sequence[int]
) -> Iterator[Watched]:
    """Catch what stages put out; the hooks are gone when the context is left, also by an error."""
    if attentions:
        raise ValueError(
            f"FrozenCLIP.encode: attentions must be 0, got {attentions}: the places of a {type(visual).__name__} do "
            "not attend to each other; leave the affinity out"
        )
    watched = Watched()
    hooks: list[tuple[nn.Module, Hook]] = [(stages[number], watched.keep_layer(number)) for number in set(layers)]
    if leaf:
        hooks.append((stages[-1], watched.keep_leaf))
    with hooked(hooks):
        yield watched
