"""The image encoder of PGSeg (arXiv 2310.19001): a vision transformer that groups its tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from protoseg.models.backbones import TimmBackbone
from protoseg.models.pgseg.units import AttentionUnit, Grouping, SlotUnit, TokenMixer
from protoseg.modules import GMMPrototypeRegularizer, GroupPrototypes, PublishedPrototypeRegularizer
from protoseg.utils import checks
from protoseg.utils.colors import IMAGENET_MEAN, IMAGENET_STD, normalize
from protoseg.utils.extras import require

__all__ = ["PRESETS", "Encoded", "GroupingEncoder", "ImageConfig", "StageOutput"]

Block = require("timm.models.vision_transformer", "protoseg.models.pgseg", "timm").Block


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Sizes of the image encoder.

    Attributes:
        image_size: Side of the training pictures in pixels.
        patch_size: Side of a patch.
        stem: ``"patch"``, one convolution of the patch's size (the paper); ``"conv"``, steps of stride 2 with norm and
            activation, which learn from scratch on few pictures; ``"backbone"``, the last map of a trained network,
            whose tokens mean something from the start.
        backbone: timm's name of that network; ``patch_size`` is its stride.
        weights: Its weights, as :class:`protoseg.models.backbones.TimmBackbone` takes them; None for random ones.
        frozen: Whether the backbone stays as it is. Its statistics do so in any case.
        dim: Channels of a token.
        heads: Of each attention.
        depths: Transformer blocks before each unit, and behind the last.
        groups: Groups of each unit.
        unit: ``"attention"``, that of the paper, whose group tokens go through the blocks with the other tokens;
            ``"slots"``, :class:`protoseg.models.pgseg.units.SlotUnit`.
        drop_path: Largest rate of stochastic depth.
        reconstruct: Add the tokens' reconstruction from prototypes before grouping, through an MLP of 4096 channels.
            Not in the paper but in its published code and weights.
        npr: Options of the :class:`protoseg.GMMPrototypeRegularizer` of each stage, with ``published=True`` of
            :class:`protoseg.modules.PublishedPrototypeRegularizer`; None for none. There are as many
            prototypes as groups, unless ``num_prototypes`` is among them.
        npr_source: What prototypes are made of: ``"stage"``, the tokens that come into the stage (the published code);
            ``"unit"``, those that its blocks hand to the unit.
        npr_target: What prototypes are matched to: ``"queries"``, the group tokens that the assignment is made with
            (the published code); ``"groups"``, the groups that the unit makes; ``"means"``, the mean of what each group
            owns of the source, whose gradient reaches the assignment alone.
    """

    image_size: int = 224
    patch_size: int = 16
    stem: Literal["patch", "conv", "backbone"] = "patch"
    backbone: str = "tf_efficientnet_lite0"
    weights: str | None = "package:efficientnet-lite0"
    frozen: bool = True
    dim: int = 384
    heads: int = 6
    depths: tuple[int, ...] = (6, 3, 3)
    groups: tuple[int, ...] = (64, 8)
    unit: Literal["attention", "slots"] = "attention"
    drop_path: float = 0.1
    reconstruct: bool = False
    npr: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)
    npr_source: Literal["stage", "unit"] = "stage"
    npr_target: Literal["queries", "groups", "means"] = "queries"


PRESETS: dict[str, ImageConfig] = {
    "tiny": ImageConfig(
        image_size=64,
        patch_size=8,
        stem="conv",
        dim=96,
        heads=4,
        depths=(1, 0),
        groups=(8,),
        unit="slots",
        drop_path=0.0,
        npr={"bandwidth": 0.3},
    ),
    "lite0": ImageConfig(
        stem="backbone",
        dim=128,
        heads=4,
        depths=(1, 0),
        groups=(8,),
        unit="slots",
        drop_path=0.0,
    ),
    "vit-s": ImageConfig(),
}


class StageOutput(NamedTuple):
    """What one stage with a unit leaves.

    Attributes:
        sources: ``[B, L, D]``, the tokens that came into the stage; what prototypes are made of.
        group_tokens: ``[B, G, D]``, as they came out of the blocks, before the unit.
        grouping: What the unit returned.
        regularized: What the regularizer returned; None without one.
    """

    sources: Tensor
    group_tokens: Tensor
    grouping: Grouping
    regularized: GroupPrototypes | None


class Encoded(NamedTuple):
    """What :class:`GroupingEncoder` returns.

    Attributes:
        pooled: ``[B, D]``, the mean over the last groups.
        groups: ``[B, G, D]``, the last groups.
        stages: One entry per unit.
        grid: Height and width of the patches.
    """

    pooled: Tensor
    groups: Tensor
    stages: tuple[StageOutput, ...]
    grid: tuple[int, int]


class ProjectionMLP(nn.Sequential):
    """Two layers with batch normalization over pictures and tokens: ``[B, L, D]`` or ``[B, D]``."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 4096) -> None:
        super().__init__(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection."""
        flat = x.flatten(0, -2)
        for layer in self:
            flat = layer(flat)
        return flat.reshape(*x.shape[:-1], flat.shape[-1])


class Stage(nn.Module):
    """Transformer blocks and a grouping unit.

    Args:
        config: Sizes.
        index: Which stage.
        rates: Stochastic depth of each block.
    """

    def __init__(self, config: ImageConfig, index: int, rates: list[float]) -> None:
        super().__init__()
        dim, groups = config.dim, config.groups[index]

        self.sequence = config.unit == "attention"
        self.blocks = _blocks(config, rates)

        # Group tokens that only attend must differ from the start, or all of them see the same.
        self.tokens = nn.Parameter((0.02 if self.sequence else 1.0) * torch.randn(groups, dim))

        self.carry = TokenMixer(dim, config.groups[index - 1], groups) if index else None
        if self.carry is not None:
            nn.init.zeros_(self.tokens)

        self.unit = (
            AttentionUnit(dim, config.heads, groups, groups) if self.sequence else SlotUnit(dim, config.heads, groups)
        )

        self.npr_source, self.npr_target = config.npr_source, config.npr_target
        self.npr = None
        if config.npr is not None:
            options = {"num_prototypes": groups, **config.npr}
            published = options.pop("published", False)
            regularizer = PublishedPrototypeRegularizer if published else GMMPrototypeRegularizer
            self.npr = regularizer(dim, **options)

        self.reconstruct = ProjectionMLP(dim, dim) if config.reconstruct else None

    def forward(self, tokens: Tensor, previous: Tensor | None) -> StageOutput:
        """Group ``[B, L, D]``; ``previous`` are the group tokens of the stage before."""
        # 1. Group tokens: learnt, and carried on from the stage before.
        sources, count = tokens, len(self.tokens)
        group_tokens = self.tokens.expand(len(tokens), -1, -1)
        if self.carry is not None and previous is not None:
            group_tokens = group_tokens + self.carry(previous)

        # 2. Blocks, in which they are part of the sequence or only watch.
        if self.sequence:
            tokens = torch.cat([tokens, group_tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        if self.sequence:
            tokens, group_tokens = tokens[:, :-count], tokens[:, -count:]

        # 3. What the prototypes can say of the tokens is added to them.
        if self.reconstruct is not None and self.npr is not None:
            prototypes, shares = self.npr.estimate(sources)
            weights = shares / (1e-6 + shares.sum(1, keepdim=True))
            tokens = tokens + self.reconstruct((weights @ prototypes).to(tokens.dtype))

        # 4. Groups, and what pulls them to prototypes.
        grouping: Grouping = self.unit(tokens, group_tokens)
        regularized = None
        if self.npr is not None:
            source = sources if self.npr_source == "stage" else tokens
            if self.npr_target == "means":
                shares = grouping.shares / grouping.shares.sum(-1, keepdim=True).clamp_min(1e-6)
                target = shares.to(source.dtype) @ source.detach()
            else:
                target = grouping.queries if self.npr_target == "queries" else grouping.groups
            regularized = self.npr(source, target)
        return StageOutput(sources, group_tokens, grouping, regularized)


class GroupingEncoder(nn.Module):
    """Picture to groups: patches, stages of blocks with a grouping unit, blocks on the last groups.

    Args:
        config: Sizes.

    Shape:
        images ``[B, 3, H, W]``, normalized, sides multiples of the patch size, to :class:`Encoded`. Another size than
        that of training interpolates the position embedding, bicubically.

    Raises:
        ValueError: Sizes that do not fit one another or the patches.

    Example:
        >>> encoder = GroupingEncoder(PRESETS["tiny"]).eval()
        >>> out = encoder(torch.zeros(1, 3, 64, 96))
        >>> out.grid, out.pooled.shape, out.stages[0].grouping.soft.shape
        ((8, 12), torch.Size([1, 96]), torch.Size([1, 8, 96]))
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        if len(config.depths) != len(config.groups) + 1:
            raise ValueError(
                "GroupingEncoder: depths must have one entry more than groups, for the blocks behind the last unit; "
                f"got {config.depths} and {config.groups}"
            )
        if config.reconstruct and config.npr is None:
            raise ValueError("GroupingEncoder: reconstruct needs prototypes; set npr to a dict, {} for the defaults")

        self.config = config
        self.stem = STEMS[config.stem](config)
        self.norm_stem = nn.LayerNorm(config.dim)

        side = config.image_size // config.patch_size
        self.position = nn.Parameter(0.02 * torch.randn(1, config.dim, side, side))

        rates = torch.linspace(0, config.drop_path, sum(config.depths)).tolist()
        ends = torch.tensor(config.depths).cumsum(0).tolist()
        parts = [rates[end - depth : end] for end, depth in zip(ends, config.depths, strict=True)]
        self.stages = nn.ModuleList(Stage(config, index, part) for index, part in enumerate(parts[:-1]))
        self.blocks = _blocks(config, parts[-1])
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, images: Tensor) -> Encoded:
        """Encode pictures. See the class for shapes."""
        patch = self.config.patch_size
        checks.shape("GroupingEncoder", "images", images, ("B", 3, "H", "W"))
        if images.shape[-2] % patch or images.shape[-1] % patch:
            raise ValueError(
                f"GroupingEncoder: the sides of images must be multiples of {patch}, got {tuple(images.shape[-2:])}; "
                "resize or pad"
            )

        # 1. Patches with their positions.
        grid = self.stem(images)
        tokens = self.norm_stem(rearrange(grid, "b d h w -> b (h w) d"))
        tokens = tokens + rearrange(self._position(grid.shape[-2:]), "b d h w -> b (h w) d")

        # 2. Stages: tokens become groups.
        stages: list[StageOutput] = []
        for stage in self.stages:
            stages.append(stage(tokens, stages[-1].group_tokens if stages else None))
            tokens = stages[-1].grouping.groups

        # 3. Blocks on the last groups.
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return Encoded(tokens.mean(1), tokens, tuple(stages), (grid.shape[-2], grid.shape[-1]))

    def _position(self, size: torch.Size) -> Tensor:
        if self.position.shape[-2:] == size:
            return self.position
        return F.interpolate(self.position, size, mode="bicubic", align_corners=False)


def _blocks(config: ImageConfig, rates: list[float]) -> nn.ModuleList:
    return nn.ModuleList(
        Block(config.dim, config.heads, qkv_bias=True, drop_path=rate, norm_layer=nn.LayerNorm) for rate in rates
    )


def _patch_stem(config: ImageConfig) -> nn.Module:
    return nn.Conv2d(3, config.dim, config.patch_size, config.patch_size)


class BackboneStem(nn.Module):
    """The last map of a trained network, brought to the channels of the tokens.

    Args:
        config: Sizes.

    Shape:
        images ``[B, 3, H, W]``, normalized by ImageNet's colors as everywhere here, to ``[B, D, h, w]``.
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.backbone = TimmBackbone(config.backbone, weights=config.weights, stride=config.patch_size)
        self.backbone.eval().requires_grad_(not config.frozen)
        self.project = nn.Conv2d(self.backbone.channels, config.dim, 1)
        self.frozen = config.frozen

    def train(self, mode: bool = True) -> BackboneStem:
        """Keep the backbone in evaluation mode: a few pictures' statistics are worse than ImageNet's."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens as a map."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.see(images)
        projected: Tensor = self.project(maps)
        return projected

    def see(self, images: Tensor) -> Tensor:
        """Return the backbone's last map, after giving pictures the colors that it wants."""
        mean, std = (torch.tensor(each, device=images.device)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
        maps: Tensor = self.backbone(normalize(images * std + mean, self.backbone.mean, self.backbone.std))
        return maps


def _conv_stem(config: ImageConfig) -> nn.Module:
    """Convolutions of stride 2 down to the patch's size, each with twice the channels of the one before."""
    steps = int(math.log2(config.patch_size))
    if 2**steps != config.patch_size or steps < 1:
        raise ValueError(f"GroupingEncoder: the conv stem needs a patch_size of 2, 4, 8, ..., got {config.patch_size}")
    layers: list[nn.Module] = []
    channels = 3
    for step in reversed(range(steps)):
        wide = config.dim // 2**step
        layers += [nn.Conv2d(channels, wide, 3, 2, 1, bias=False), nn.GroupNorm(math.gcd(wide, 8), wide), nn.GELU()]
        channels = wide
    return nn.Sequential(*layers)


STEMS: dict[str, Callable[[ImageConfig], nn.Module]] = {
    "patch": _patch_stem,
    "conv": _conv_stem,
    "backbone": BackboneStem,
}
