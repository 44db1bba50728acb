"""What open_clip's vision networks do on the way to an embedding, step by step and for pictures of any size.

One class per kind of network. In the place of a transformer's tokens a convolutional network has maps, in that of its
patches the cells of its last stage.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = [
    "ClassifierTower",
    "ConvNeXtTower",
    "Grid",
    "ResNetTower",
    "Tower",
    "TransformerTower",
    "Watched",
    "tower_of",
]

Grid = tuple[int, int]
Hook = Callable[[nn.Module, Any, Tensor], Tensor | None]


class Watched:
    """What was caught of one forward pass.

    Attributes:
        leaf: Where the graph begins: ``[B, 1 + L, W]``, the output of the last block's first norm, or ``[B, W, h, w]``,
            that of the last stage; None where it was not asked for.
        attention: ``[B, 1 + L, 1 + L]``, mean over heads and blocks; None where it was not asked for.
        layers: What each block that was asked for puts out, by its number.
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


class Tower(ABC):
    """A vision network, asked step by step.

    Args:
        visual: The network, of the kind that the class knows.

    Attributes:
        visual: As given.
        attends: Whether patches attend to each other.
        linear: Whether the mean of the patches' features is the whole picture's, and nothing comes after.
    """

    attends: ClassVar[bool] = False
    linear: ClassVar[bool] = False

    def __init__(self, visual: Any) -> None:
        self.visual = visual

    @staticmethod
    @abstractmethod
    def knows(visual: Any) -> bool:
        """Whether a network is of this kind, by its parts."""

    @property
    @abstractmethod
    def patch(self) -> int:
        """The pixels of a side of what one feature stands for."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The width of the space of the texts."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The parts whose output can be asked for."""

    @abstractmethod
    def run(self, images: Tensor) -> Tensor:
        """Turn pictures into what the last block puts out."""

    @abstractmethod
    def spatial(self, caught: Tensor, grid: Grid) -> Tensor:
        """Turn what a block puts out into a map of the patches, ``[B, W, h, w]``."""

    @abstractmethod
    def project(self, last: Tensor) -> Tensor:
        """Bring each place of the last output by itself into the space of the texts."""

    @abstractmethod
    def pooled(self, last: Tensor) -> Tensor:
        """Embed the pictures as the model itself does, ``[B, E]``, from the last output."""

    @abstractmethod
    def watch(
        self, *, leaf: bool = False, attentions: int = 0, layers: Sequence[int] = ()
    ) -> AbstractContextManager[Watched]:
        """Catch where Grad-CAM's graph begins, the attention of the last blocks, and what blocks put out.

        The hooks are gone when the context is left, also by an error.
        """


class TransformerTower(Tower):
    """One of open_clip's own vision transformers; its outputs are tokens ``[B, 1 + L, W]``, the class token in front.

    Raises:
        ValueError: It has attentional pooling.
    """

    attends = True

    @staticmethod
    def knows(visual: Any) -> bool:
        """See :class:`Tower`."""
        wanted = ("conv1", "class_embedding", "positional_embedding", "ln_pre", "transformer", "ln_post")
        if not all(hasattr(visual, name) for name in wanted):
            return False
        if getattr(visual, "attn_pool", None) is not None:
            raise ValueError("FrozenCLIP: a network with attentional pooling has no patch features in the joint space")
        return True

    @property
    def patch(self) -> int:
        """See :class:`Tower`."""
        return int(self.visual.conv1.weight.shape[-1])

    @property
    def width(self) -> int:
        """See :class:`Tower`."""
        if self.visual.proj is None:
            return int(self.visual.ln_post.weight.shape[0])
        return int(self.visual.proj.shape[1])

    @property
    def blocks(self) -> list[nn.Module]:
        """See :class:`Tower`."""
        return list(self.visual.transformer.resblocks)

    def run(self, images: Tensor) -> Tensor:
        """See :class:`Tower`."""
        visual = self.visual
        patches = visual.conv1(images)
        grid = (patches.shape[-2], patches.shape[-1])
        patches = rearrange(patches, "b w y x -> b (y x) w")

        token = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        known = position(visual.positional_embedding, visual.grid_size, grid)
        tokens = torch.cat([token, patches], 1) + known.to(patches.dtype)
        last: Tensor = visual.transformer(visual.ln_pre(visual.patch_dropout(tokens)))
        return last

    def spatial(self, caught: Tensor, grid: Grid) -> Tensor:
        """See :class:`Tower`."""
        return rearrange(caught[:, 1:], "b (y x) w -> b w y x", y=grid[0], x=grid[1])

    def project(self, last: Tensor) -> Tensor:
        """See :class:`Tower`; ``[B, 1 + L, E]``."""
        tokens: Tensor = self.visual.ln_post(last)
        return tokens if self.visual.proj is None else tokens @ self.visual.proj

    def pooled(self, last: Tensor) -> Tensor:
        """See :class:`Tower`."""
        visual = self.visual
        tokens = last if visual.final_ln_after_pool else visual.ln_post(last)
        whole = tokens[:, 1:].mean(1) if visual.pool_type == "avg" else tokens[:, 0]
        if visual.final_ln_after_pool:
            whole = visual.ln_post(whole)
        return whole if visual.proj is None else whole @ visual.proj

    @contextlib.contextmanager
    def watch(self, *, leaf: bool = False, attentions: int = 0, layers: Sequence[int] = ()) -> Iterator[Watched]:
        """See :class:`Tower`; the graph begins at the tokens before the last block's attention."""
        watched, blocks = Watched(), self.visual.transformer.resblocks
        if not 0 <= attentions <= len(blocks):
            raise ValueError(
                f"FrozenCLIP.encode: attentions must lie between 0 and the model's {len(blocks)} blocks, got "
                f"{attentions}"
            )
        hooks: list[tuple[nn.Module, Hook]] = [(blocks[number], watched.keep_layer(number)) for number in set(layers)]
        last = blocks[len(blocks) - attentions :]
        hooks += [(block.ln_1, watched.add_attention(block.attn, 1 / attentions)) for block in last]
        if leaf:
            hooks.append((blocks[-1].ln_1, watched.keep_leaf))
        with hooked(hooks):
            yield watched


class StageTower(Tower):
    """A convolutional network; its outputs are maps ``[B, W, h, w]``, and its blocks are stages."""

    def spatial(self, caught: Tensor, grid: Grid) -> Tensor:
        """See :class:`Tower`; maps stay as they are."""
        return caught

    @contextlib.contextmanager
    def watch(self, *, leaf: bool = False, attentions: int = 0, layers: Sequence[int] = ()) -> Iterator[Watched]:
        """See :class:`Tower`; the graph begins at the last stage's output."""
        if attentions:
            raise ValueError(
                f"FrozenCLIP.encode: attentions must be 0, got {attentions}: the places of a "
                f"{type(self.visual).__name__} do not attend to each other; leave the affinity out"
            )
        watched, stages = Watched(), self.blocks
        hooks: list[tuple[nn.Module, Hook]] = [(stages[number], watched.keep_layer(number)) for number in set(layers)]
        if leaf:
            hooks.append((stages[-1], watched.keep_leaf))
        with hooked(hooks):
            yield watched


class ResNetTower(StageTower):
    """One of open_clip's ResNets, with four stages and an attention pool."""

    @staticmethod
    def knows(visual: Any) -> bool:
        """See :class:`Tower`."""
        pool = getattr(visual, "attnpool", None)
        parts = (hasattr(visual, name) for name in ("stem", "layer1", "layer2", "layer3", "layer4"))
        return all(parts) and all(hasattr(pool, f"{name}_proj") for name in "qkvc")

    @property
    def patch(self) -> int:
        """See :class:`Tower`: the stem divides sides by 4, three stages by 2 each."""
        return 32

    @property
    def width(self) -> int:
        """See :class:`Tower`."""
        return int(self.visual.attnpool.c_proj.weight.shape[0])

    @property
    def blocks(self) -> list[nn.Module]:
        """See :class:`Tower`."""
        return [self.visual.layer1, self.visual.layer2, self.visual.layer3, self.visual.layer4]

    def run(self, images: Tensor) -> Tensor:
        """See :class:`Tower`."""
        maps: Tensor = self.visual.stem(images)
        for stage in self.blocks:
            maps = stage(maps)
        return maps

    def project(self, last: Tensor) -> Tensor:
        """See :class:`Tower`; ``[B, E, h, w]``, as MaskCLIP does it.

        This is what the attention pool would return, did it attend to that place alone and have no position embedding.
        """
        pool = self.visual.attnpool
        features: Tensor = pool.c_proj(pool.v_proj(rearrange(last, "b w y x -> b y x w")))
        return rearrange(features, "b y x e -> b e y x")

    def pooled(self, last: Tensor) -> Tensor:
        """See :class:`Tower`: what the mean of the last map attends to."""
        pool = self.visual.attnpool
        side = math.isqrt(len(pool.positional_embedding) - 1)
        places = rearrange(last, "b w y x -> b (y x) w")
        known = position(pool.positional_embedding, (side, side), (last.shape[-2], last.shape[-1]))
        tokens = torch.cat([places.mean(1, keepdim=True), places], 1) + known.to(last.dtype)

        q, k, v = (
            rearrange(each, "b l (heads d) -> b heads l d", heads=pool.num_heads)
            for each in (pool.q_proj(tokens[:, :1]), pool.k_proj(tokens), pool.v_proj(tokens))
        )
        whole: Tensor = pool.c_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))
        return whole


class ConvNeXtTower(StageTower):
    """One of open_clip's convolutional timm networks, such as ConvNeXt: stages, then a head that averages places."""

    @staticmethod
    def knows(visual: Any) -> bool:
        """See :class:`Tower`."""
        trunk = getattr(visual, "trunk", None)
        return all(hasattr(trunk, name) for name in ("stages", "forward_features", "forward_head", "feature_info"))

    @property
    def patch(self) -> int:
        """See :class:`Tower`."""
        return int(self.visual.trunk.feature_info[-1]["reduction"])

    @property
    def width(self) -> int:
        """See :class:`Tower`."""
        weight = next(self.visual.parameters())
        cell = torch.zeros(1, self.visual.trunk.num_features, 1, 1, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            return int(self.pooled(cell).shape[-1])

    @property
    def blocks(self) -> list[nn.Module]:
        """See :class:`Tower`."""
        return list(self.visual.trunk.stages)

    def run(self, images: Tensor) -> Tensor:
        """See :class:`Tower`."""
        maps: Tensor = self.visual.trunk.forward_features(images)
        return maps

    def project(self, last: Tensor) -> Tensor:
        """See :class:`Tower`; ``[B, E, h, w]``.

        This is the embedding of a picture that looks everywhere as it looks there.
        """
        batch, _, height, _ = last.shape
        cells = rearrange(last, "b w y x -> (b y x) w 1 1")
        return rearrange(self.pooled(cells), "(b y x) e -> b e y x", b=batch, y=height)

    def pooled(self, last: Tensor) -> Tensor:
        """See :class:`Tower`."""
        whole: Tensor = self.visual.head(self.visual.trunk.forward_head(last))
        return whole


class ClassifierTower(StageTower):
    """A classifier whose head is linear, as of :mod:`protoseg.clip.pocket`; its last map is in the joint space."""

    linear = True

    @staticmethod
    def knows(visual: Any) -> bool:
        """See :class:`Tower`."""
        return all(hasattr(visual, name) for name in ("network", "stages", "last", "reduction"))

    @property
    def patch(self) -> int:
        """See :class:`Tower`."""
        return int(self.visual.reduction)

    @property
    def width(self) -> int:
        """See :class:`Tower`."""
        return int(self.visual.rows.shape[1])

    @property
    def blocks(self) -> list[nn.Module]:
        """See :class:`Tower`."""
        return list(self.visual.stages)

    def run(self, images: Tensor) -> Tensor:
        """See :class:`Tower`."""
        maps: Tensor = self.visual(images)
        return maps

    def project(self, last: Tensor) -> Tensor:
        """See :class:`Tower`."""
        return last

    def pooled(self, last: Tensor) -> Tensor:
        """See :class:`Tower`."""
        return last.mean((-2, -1))


def tower_of(visual: Any) -> Tower:
    """Find the tower that knows a network.

    Raises:
        ValueError: None does.
    """
    towers: tuple[type[Tower], ...] = (TransformerTower, ResNetTower, ClassifierTower, ConvNeXtTower)
    for tower in towers:
        if tower.knows(visual):
            return tower(visual)
    raise ValueError(
        "FrozenCLIP: only open_clip's vision transformers, ResNets and ConvNeXts are known, such as ViT-B-16, RN50 and "
        f"convnext_base; this network is a {type(visual).__name__}"
    )


def position(known: Tensor, trained: Sequence[int], grid: Grid) -> Tensor:
    """A position embedding for any number of patches, ``[1 + L, W]``, bicubic from that of the training."""
    if tuple(trained) == grid:
        return known
    map_ = known[1:].float().T.reshape(1, -1, *trained)
    scaled = F.interpolate(map_, grid, mode="bicubic", align_corners=False)
    return torch.cat([known[:1], scaled[0].flatten(1).T.to(known.dtype)])


@torch.no_grad()
def attention(module: nn.Module, tokens: Tensor) -> Tensor:
    """Mean over the heads of a self-attention's weights, ``[B, L, L]``, computed from its input in float32."""
    if not isinstance(module, nn.MultiheadAttention) or module.in_proj_weight is None:
        raise ValueError(f"FrozenCLIP: the weights of a {type(module).__name__} are not known; leave the affinity out")
    dim, heads = module.embed_dim, module.num_heads
    weight, bias = module.in_proj_weight[: 2 * dim], module.in_proj_bias[: 2 * dim]
    q, k = F.linear(tokens, weight, bias).float().chunk(2, -1)
    q, k = (rearrange(each, "b l (heads d) -> b heads l d", heads=heads) for each in (q, k))

    total = tokens.new_zeros(len(tokens), tokens.shape[1], tokens.shape[1], dtype=torch.float32)
    for head in range(heads):  # one at a time: all of them at 512 px are a gigabyte
        total += (q[:, head] @ k[:, head].transpose(1, 2) * (dim // heads) ** -0.5).softmax(-1)
    return total.div_(heads)


@contextlib.contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Have hooks on modules, on their way forward, until the context is left."""
    with contextlib.ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield
