"""What open_clip's vision transformers do on the way to an embedding, step by step and for pictures of any size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]


def check(visual: Any) -> None:
    """Raise unless the network is a vision transformer that this module knows."""
    wanted = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post")
    if missing := [name for name in wanted if not hasattr(visual, name)]:
        raise ValueError(
            f"FrozenCLIP: only open_clip's own vision transformers are known, such as ViT-B-16; this network "
            f"({type(visual).__name__}) has no {missing[0]}"
        )
    if getattr(visual, "attn_pool", None) is not None:
        raise ValueError("FrozenCLIP: a network with attentional pooling has no patch features in the joint space")


def embed(visual: Any, images: Tensor) -> tuple[Tensor, Grid]:
    """Turn pictures into tokens with position: ``[B, 1 + L, W]``, the class token in front."""
    patches = visual.conv1(images)
    grid = (patches.shape[-2], patches.shape[-1])
    patches = patches.flatten(2).transpose(1, 2)
    token = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    tokens = torch.cat([token, patches], 1) + position(visual, grid).to(patches.dtype)
    return visual.ln_pre(visual.patch_dropout(tokens)), grid


def position(visual: Any, grid: Grid) -> Tensor:
    """The position embedding for any number of patches, ``[1 + L, W]``, bicubic from that of the training."""
    known: Tensor = visual.positional_embedding
    if tuple(visual.grid_size) == grid:
        return known
    map_ = known[1:].float().T.reshape(1, -1, *visual.grid_size)
    scaled = F.interpolate(map_, grid, mode="bicubic", align_corners=False)
    return torch.cat([known[:1], scaled[0].flatten(1).T.to(known.dtype)])


def project(visual: Any, tokens: Tensor) -> Tensor:
    """Bring the last tokens ``[B, 1 + L, W]`` into the space of the texts: ``[B, 1 + L, E]``."""
    tokens = visual.ln_post(tokens)
    return tokens if visual.proj is None else tokens @ visual.proj


def pooled(visual: Any, tokens: Tensor) -> Tensor:
    """The model's own embedding of the pictures, ``[B, E]``, of the last tokens."""
    average = visual.pool_type == "avg"
    if not visual.final_ln_after_pool:
        tokens = visual.ln_post(tokens)
    whole = tokens[:, 1:].mean(1) if average else tokens[:, 0]
    if visual.final_ln_after_pool:
        whole = visual.ln_post(whole)
    return whole if visual.proj is None else whole @ visual.proj


class Watched:
    """What was caught of one forward pass.

    Attributes:
        leaf: ``[B, 1 + L, W]``, the output of the last block's first norm, where the graph begins; None without one.
        attention: ``[B, 1 + L, 1 + L]``, mean over heads and blocks; None where it was not asked for.
    """

    def __init__(self) -> None:
        self.leaf: Tensor | None = None
        self.attention: Tensor | None = None


@contextlib.contextmanager
def watch(visual: Any, *, leaf: bool, attentions: int) -> Iterator[Watched]:
    """Catch the tokens before the last block's attention, and the attention of the last blocks.

    The hooks are gone when the context is left, also by an error.
    """
    watched, blocks = Watched(), list(visual.transformer.resblocks)

    def keep_leaf(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        watched.leaf = out.detach().requires_grad_()
        return watched.leaf

    def add_attention(block: Any) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            weights = attention(block.attn, out.detach()) / attentions
            watched.attention = weights if watched.attention is None else watched.attention + weights

        return hook

    handles: list[Any] = []
    try:
        last = blocks[len(blocks) - attentions :]
        handles += [block.ln_1.register_forward_hook(add_attention(block)) for block in last]
        if leaf:
            handles.append(blocks[-1].ln_1.register_forward_hook(keep_leaf))
        yield watched
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention(module: nn.Module, tokens: Tensor) -> Tensor:
    """Mean over the heads of a self-attention's weights, ``[B, L, L]``, computed from its input in float32."""
    if not isinstance(module, nn.MultiheadAttention) or module.in_proj_weight is None:
        raise ValueError(f"FrozenCLIP: the weights of a {type(module).__name__} are not known; leave the affinity out")
    dim, heads = module.embed_dim, module.num_heads
    weight, bias = module.in_proj_weight[: 2 * dim], module.in_proj_bias[: 2 * dim]
    q, k = F.linear(tokens, weight, bias).float().chunk(2, -1)
    q, k = (each.reshape(*each.shape[:2], heads, -1).transpose(1, 2) for each in (q, k))
    total = tokens.new_zeros(len(tokens), tokens.shape[1], tokens.shape[1], dtype=torch.float32)
    for head in range(heads):  # one at a time: all of them at 512 px are a gigabyte
        total += (q[:, head] @ k[:, head].transpose(1, 2) * (dim // heads) ** -0.5).softmax(-1)
    return total.div_(heads)
