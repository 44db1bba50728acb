"""What open_clip's vision transformers do on the way to an embedding, step by step and for pictures of any size.

:mod:`protoseg._clip_resnet` has the same functions for its ResNets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]
Hook = Callable[[nn.Module, Any, Tensor], Tensor | None]


def knows(visual: Any) -> bool:
    """Whether the network is one of these.

    Raises:
        ValueError: It is, but with attentional pooling.
    """
    wanted = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post")
    if not all(hasattr(visual, name) for name in wanted):
        return False
    if getattr(visual, "attn_pool", None) is not None:
        raise ValueError("FrozenCLIP: a network with attentional pooling has no patch features in the joint space")
    return True


def patch(visual: Any) -> int:
    """The pixels of a side of what one feature stands for."""
    return int(visual.conv1.weight.shape[-1])


def width(visual: Any) -> int:
    """The width of the space of the texts."""
    return int(visual.ln_post.weight.shape[0] if visual.proj is None else visual.proj.shape[1])


def blocks(visual: Any) -> list[nn.Module]:
    """The parts whose output can be asked for."""
    return list(visual.transformer.resblocks)


def run(visual: Any, images: Tensor) -> Tensor:
    """Turn pictures into the last block's tokens, ``[B, 1 + L, W]``, the class token in front."""
    patches = visual.conv1(images)
    grid = (patches.shape[-2], patches.shape[-1])
    patches = patches.flatten(2).transpose(1, 2)
    token = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    known = position(visual.positional_embedding, visual.grid_size, grid)
    tokens = torch.cat([token, patches], 1) + known.to(patches.dtype)
    last: Tensor = visual.transformer(visual.ln_pre(visual.patch_dropout(tokens)))
    return last


def position(known: Tensor, trained: Sequence[int], grid: Grid) -> Tensor:
    """A position embedding for any number of patches, ``[1 + L, W]``, bicubic from that of the training."""
    if tuple(trained) == grid:
        return known
    map_ = known[1:].float().T.reshape(1, -1, *trained)
    scaled = F.interpolate(map_, grid, mode="bicubic", align_corners=False)
    return torch.cat([known[:1], scaled[0].flatten(1).T.to(known.dtype)])


def spatial(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens ``[B, 1 + L, W]`` as a map of the patches, ``[B, W, h, w]``."""
    return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, *grid)


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
        layers: ``[B, 1 + L, W]`` of each block that was asked for, by its number.
    """

    def __init__(self) -> None:
        self.leaf: Tensor | None = None
        self.attention: Tensor | None = None
        self.layers: dict[int, Tensor] = {}

    def keep_leaf(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        """Begin the graph here, as a hook."""
        self.leaf = out.detach().requires_grad_()
        return self.leaf

    def keep_layer(self, number: int) -> Hook:
        """Make the hook that keeps a block's output."""

        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            self.layers[number] = out.detach()

        return hook

    def add_attention(self, attend: nn.Module, share: float) -> Hook:
        """Make the hook, of the norm before it, that adds a share of an attention."""

        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            weights = attention(attend, out.detach()) * share
            self.attention = weights if self.attention is None else self.attention + weights

        return hook


@contextlib.contextmanager
def watch(visual: Any, *, leaf: bool = False, attentions: int = 0, layers: Sequence[int] = ()) -> Iterator[Watched]:
    """Catch the tokens before the last block's attention, the attention of the last blocks, and what blocks put out.

    The hooks are gone when the context is left, also by an error.
    """
    watched, every = Watched(), visual.transformer.resblocks
    if not 0 <= attentions <= len(every):
        raise ValueError(
            f"FrozenCLIP.encode: attentions must lie between 0 and the model's {len(every)} blocks, got {attentions}"
        )
    hooks: list[tuple[nn.Module, Hook]] = [(every[number], watched.keep_layer(number)) for number in set(layers)]
    last = every[len(every) - attentions :]
    hooks += [(block.ln_1, watched.add_attention(block.attn, 1 / attentions)) for block in last]
    if leaf:
        hooks.append((every[-1].ln_1, watched.keep_leaf))
    with hooked(hooks):
        yield watched


@contextlib.contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Have hooks on modules, on their way forward, until the context is left."""
    with contextlib.ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


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
