"""The head of MCTformer: a transformer with one token for each class (Xu et al., CVPR 2022)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from protoseg.models.backbones import Backbone, BankFeatures
from protoseg.models.weights import fit_weights, read_file
from protoseg.utils import checks
from protoseg.utils.extras import require, timm_with

__all__ = [
    "Hybrid",
    "MCTNetwork",
    "MCTOutput",
    "TimmTransformer",
    "class_token_contrast",
    "is_plain_transformer",
]

Fusion = Literal["v2", "plus"]


class MCTOutput(NamedTuple):
    """What :class:`MCTNetwork` returns; everything is connected to the graph.

    Attributes:
        logits: ``[B, C]`` of the patches, for a multi-label loss.
        features: ``[B, D, h, w]``, what a prototype bank compares: the patches behind the last block, or the last but
            one map of a hybrid's convolutions, of as many channels as that has.
        cam: ``[B, C, h, w]``, at least 0: the maps below fused.
        token_logits: ``[B, C]`` of the class tokens, for a second multi-label loss.
        patch_cam: ``[B, C, h, w]`` raw scores of the convolution.
        attention: ``[B, C, h, w]``, from class tokens to patches, mean over heads and the last blocks.
        affinity: ``[B, h*w, h*w]``, from patches to patches, mean over heads and all blocks.
        tokens: ``[blocks, B, C, D]``, the class tokens behind each block, for :func:`class_token_contrast`.
    """

    logits: Tensor
    features: Tensor
    cam: Tensor
    token_logits: Tensor
    patch_cam: Tensor
    attention: Tensor
    affinity: Tensor
    tokens: Tensor

    def refined(self) -> Tensor:
        """Spread the CAM over the patches that attend to each other: ``[B, C, h, w]``."""
        return (self.cam.flatten(2) @ self.affinity.transpose(1, 2)).view_as(self.cam)


class TimmTransformer(nn.Module):
    """Patches and blocks of a plain vision transformer of timm.

    Args:
        name: A timm model name, such as ``"deit_small_patch16_224"``.
        weights: ``"timm"`` for timm's, which needs a network connection or a filled cache; the path of a file, of timm
            or of a run of the trainer; ``None`` for random ones.

    Attributes:
        channels: ``D``.
        blocks: The blocks.
        multiple: What the sides of pictures must be multiples of, a patch.
        mean: What the network wants subtracted from colors in 0..1.
        std: What it wants them divided by then.
        name: As given.

    Raises:
        FileNotFoundError: There is no such file of weights.
        ImportError: timm is not installed.
        ValueError: timm knows no such network, it is no plain vision transformer, or the weights are of another one.
    """

    def __init__(self, name: str, *, weights: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        timm: Any = timm_with(name, "TimmTransformer")
        network: Any = timm.create_model(name, pretrained=weights == "timm", num_classes=0)
        if problem := _no_plain(network, timm.models.vision_transformer):
            raise ValueError(
                f"TimmTransformer: {name} is no plain vision transformer: {problem}; take deit_small_patch16_224"
            )
        self.name = name
        self.mean: tuple[float, float, float] = tuple(network.pretrained_cfg["mean"])
        self.std: tuple[float, float, float] = tuple(network.pretrained_cfg["std"])
        self.multiple: int = network.patch_embed.patch_size[0]

        self.project: nn.Module = network.patch_embed.proj
        self.grid: tuple[int, int] = tuple(network.patch_embed.grid_size)
        # Those of the tokens that are no patches come first, where there are any.
        self.position = nn.Parameter(network.pos_embed.detach()[:, -self.grid[0] * self.grid[1] :].clone())
        self.prefix = int(network.num_prefix_tokens)
        self.blocks: nn.ModuleList = nn.ModuleList(network.blocks)
        self.channels = int(network.embed_dim)
        if weights is not None and weights != "timm":
            self.load_weights(weights)

    def load_weights(self, weights: str | os.PathLike[str]) -> None:
        """Load ``"timm"`` or a file, as the constructor does, which also says what can be wrong with them."""
        if weights == "timm":
            self.load_state_dict(TimmTransformer(self.name, weights="timm").state_dict())
            return

        state: dict[str, Tensor] = {}
        for name, value in read_file(Path(weights)).items():
            ours = name.replace("patch_embed.proj.", "project.").replace("pos_embed", "position")
            patches = self.position.shape[1]
            if ours.endswith("position") and value.dim() == 3 and value.shape[1] == patches + self.prefix:
                value = value[:, self.prefix :]
            state[ours] = value
        fit_weights(self, self.name, state, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Return the patches ``[B, D, h, w]`` with their positions, as the first block wants them."""
        checks.shape("TimmTransformer", "images", images, ("B", 3, "H", "W"))
        if images.shape[-2] % self.multiple or images.shape[-1] % self.multiple:
            raise ValueError(
                f"TimmTransformer: the sides of images must be multiples of {self.multiple}, got "
                f"{tuple(images.shape[-2:])}; resize or pad"
            )
        patches: Tensor = self.project(images)
        position = self.position.transpose(1, 2).reshape(1, -1, *self.grid)
        if patches.shape[-2:] != position.shape[-2:]:
            position = F.interpolate(position, patches.shape[-2:], mode="bicubic", align_corners=False)
        return patches + position


def _no_plain(network: Any, kinds: Any) -> str:
    """What of a timm network :class:`TimmTransformer` would leave out, and so get wrong; empty where nothing."""
    if not isinstance(network, kinds.VisionTransformer):
        return f"it is a {type(network).__name__}"
    if getattr(network, "pos_embed", None) is None or getattr(network, "rope", None) is not None:
        return "its positions are no embedding that is added"
    if not isinstance(network.norm_pre, nn.Identity) or not isinstance(network.patch_embed.norm, nn.Identity):
        return "it has a norm in front of its blocks"
    if getattr(network, "reg_token", None) is not None:
        return "its patches rely on registers"
    if not all(hasattr(getattr(block, "attn", None), "qkv") for block in network.blocks):
        return "its blocks have another attention"
    return ""


class Hybrid(nn.Module):
    """A backbone of convolutions whose features are the patches of a few transformer blocks.

    Its convolutions see the borders of the picture, and so need no position embedding.

    Args:
        backbone: The convolutions, with weights or without.
        dim: ``D``; a 1x1 convolution takes the features to it. ``None`` for the features as they are.
        depth: Blocks, at least 1.
        heads: Of each block's attention.

    Attributes:
        channels: ``D``.
        network: The backbone.
        blocks: The blocks.
        multiple: The backbone's, as are ``mean`` and ``std``.

    Raises:
        ImportError: timm, whose blocks these are, is not installed.
        ValueError: ``dim`` or ``depth`` below 1, or ``D`` is no multiple of ``heads``.

    Example:
        >>> from protoseg.models.backbones import SmallResNet
        >>> Hybrid(SmallResNet(8), dim=16, depth=2)(torch.zeros(1, 3, 32, 48)).shape
        torch.Size([1, 16, 4, 6])
    """

    def __init__(self, backbone: Backbone, dim: int | None = None, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        Block = require("timm.models.vision_transformer", "Hybrid", "timm").Block
        checks.positive("Hybrid", "depth", depth)
        checks.positive("Hybrid", "heads", heads)
        self.channels = backbone.channels if dim is None else dim
        checks.positive("Hybrid", "dim", self.channels)
        if self.channels % heads:
            raise ValueError(f"Hybrid: {self.channels} channels must be a multiple of heads, got {heads}")

        self.network = backbone
        self.mean = backbone.mean
        self.std = backbone.std
        self.multiple = backbone.multiple
        self.project = nn.Identity() if dim is None else nn.Conv2d(backbone.channels, dim, 1)
        self.blocks = nn.ModuleList(Block(self.channels, heads, qkv_bias=True) for _ in range(depth))

    def forward(self, images: Tensor) -> Tensor:
        """Return the patches ``[B, D, h, w]``."""
        return self.last_two(images)[1]

    def last_two(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the backbone's last but one map, and the patches.

        Args:
            images: ``[B, 3, H, W]``.

        Returns:
            ``[B, network.penultimate_channels, h, w]`` and ``[B, D, h, w]``.
        """
        penultimate, last = self.network.last_two(images)
        patches: Tensor = self.project(last)
        return penultimate, patches


def is_plain_transformer(name: str) -> bool:
    """Whether a timm name is that of a network for :class:`TimmTransformer`; else it may be one for :class:`Hybrid`.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm knows no such network.

    Example:
        >>> is_plain_transformer("deit_small_patch16_224"), is_plain_transformer("resnet50")
        (True, False)
    """
    timm: Any = timm_with(name, "is_plain_transformer")
    return bool(timm.models.is_model_in_modules(name.partition(".")[0], ("vision_transformer", "deit")))


class MCTNetwork(nn.Module):
    r"""A transformer with one token for each class, whose attention to the patches is that class's map.

    .. math::
        M^{v2}_c = \bar A_c \odot \mathrm{ReLU}(P_c), \qquad M^{plus}_c = \sqrt{\bar A_c \odot \mathrm{ReLU}(P_c)}

    with :math:`\bar A_c` the attention from the token of class :math:`c` to the patches, as a mean over heads and the
    last blocks, and :math:`P` a 3x3 convolution of the patches. The mean over a class token's channels is a logit, that
    over a class's map :math:`P_c` another one; ``"plus"`` weighs the scores of the map by their rank, from the highest
    on, with :math:`0.996^r`. After Xu et al., "Multi-class Token Transformer for Weakly Supervised Semantic
    Segmentation" (V2; CVPR 2022, arXiv 2203.02891) and "MCTformer+" (arXiv 2308.03005); as there, no norm follows the
    last block. There the maps are detached; here a loss on ``cam`` reaches both factors, and 6e-5 is added under the
    root, which has no slope at 0.

    Args:
        backbone: Patches and blocks, see :class:`TimmTransformer` and :class:`Hybrid`.
        num_classes: ``C``.
        fusion: ``"v2"`` or ``"plus"``.
        attentions: Last blocks whose attention makes the map; all of them where there are fewer.
        bank_features: The map that a prototype bank is given: ``"last"``, the patches behind the last block, or
            ``"penultimate"``, the input of the last block of a hybrid's convolutions.

    Attributes:
        channels: Channels of those features.
        bank_features: As given.

    Shape:
        ``[B, 3, H, W]`` to :class:`MCTOutput`; ``h`` and ``w`` are ``H`` and ``W`` in patches.

    Raises:
        ValueError: ``num_classes`` or ``attentions`` below 1, another fusion, or features that the backbone has not.

    Example:
        >>> from protoseg.models.backbones import SmallResNet
        >>> out = MCTNetwork(Hybrid(SmallResNet(8), depth=2), num_classes=5)(torch.zeros(2, 3, 32, 48))
        >>> out.logits.shape, out.cam.shape
        (torch.Size([2, 5]), torch.Size([2, 5, 4, 6]))
    """

    def __init__(
        self,
        backbone: TimmTransformer | Hybrid,
        num_classes: int,
        *,
        fusion: Fusion = "v2",
        attentions: int = 3,
        bank_features: BankFeatures = "last",
    ) -> None:
        super().__init__()
        checks.positive("MCTNetwork", "num_classes", num_classes)
        checks.positive("MCTNetwork", "attentions", attentions)
        checks.choice("MCTNetwork", "fusion", fusion, get_args(Fusion))
        checks.choice("MCTNetwork", "bank_features", bank_features, get_args(BankFeatures))

        self.channels = backbone.channels
        if bank_features == "penultimate":
            if isinstance(backbone, TimmTransformer):
                raise ValueError(
                    f"MCTNetwork: bank_features must be 'last' for the transformer {backbone.name}, which has no "
                    "convolutions, got 'penultimate'; take a Hybrid, or 'last'"
                )
            self.channels = backbone.network.penultimate_channels

        self.backbone = backbone
        self.bank_features: BankFeatures = bank_features
        self.fusion: Fusion = fusion
        self.attentions = attentions

        self.class_tokens = nn.Parameter(torch.empty(num_classes, backbone.channels))
        nn.init.trunc_normal_(self.class_tokens, std=0.02)
        self.head = nn.Conv2d(backbone.channels, num_classes, 3, padding=1)

    def forward(self, images: Tensor) -> MCTOutput:
        """Return logits, features and maps. See the class."""
        # 1. Patches of the picture.
        penultimate: Tensor | None = None
        if isinstance(self.backbone, Hybrid):
            penultimate, patches = self.backbone.last_two(images)
        else:
            patches = self.backbone(images)

        # 2. A token of each class goes with them through all blocks.
        classes = len(self.class_tokens)
        own = self.class_tokens.to(patches.dtype).expand(len(patches), -1, -1)
        tokens = torch.cat([own, rearrange(patches, "b d h w -> b (h w) d")], 1)
        attentions, behind = [], []
        for block in self.backbone.blocks:
            attentions.append(_attention(block, tokens))
            tokens = block(tokens)
            behind.append(tokens[:, :classes])

        # 3. The CAM: the classifier on the patches, times the attention of the class on them.
        last = rearrange(tokens[:, classes:], "b (h w) d -> b d h w", h=patches.shape[-2])
        patch_cam = self.head(last)
        attention = torch.stack([each[:, :classes, classes:] for each in attentions[-self.attentions :]]).mean(0)
        attention = attention.reshape_as(patch_cam).to(patch_cam.dtype)
        cam = attention * patch_cam.relu()
        if self.fusion == "plus":
            cam = (cam + torch.finfo(torch.float16).tiny).sqrt()

        return MCTOutput(
            logits=_ranked_mean(patch_cam) if self.fusion == "plus" else patch_cam.mean((-2, -1)),
            features=last if penultimate is None or self.bank_features == "last" else penultimate,
            cam=cam,
            token_logits=tokens[:, :classes].mean(-1),
            patch_cam=patch_cam,
            attention=attention,
            affinity=torch.stack([each[:, classes:, classes:] for each in attentions]).mean(0).to(cam.dtype),
            tokens=torch.stack(behind),
        )


def class_token_contrast(tokens: Tensor, labels: Tensor) -> Tensor:
    r"""Push the tokens of different classes apart, in every block (MCTformer+).

    .. math:: L = \frac{1}{|y|} \sum_{c \in y} -\log \frac{e^{\cos(t_c, t_c)}}{\sum_k e^{\cos(t_c, t_k)}}

    as a mean over blocks and the pictures that have a class.

    Args:
        tokens: ``[blocks, B, C, D]``.
        labels: ``[B, C]`` multi-hot: the :math:`y` of each picture.

    Returns:
        ``[]``; 0, connected to the graph, where no picture has a class.

    Raises:
        ValueError: Shapes that do not belong together.

    Example:
        >>> apart, alike = torch.eye(3).expand(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
        >>> labels = torch.tensor([[1, 0, 1]])
        >>> bool(class_token_contrast(apart, labels) < class_token_contrast(alike, labels))
        True
    """
    checks.shape("class_token_contrast", "tokens", tokens, ("blocks", "B", "C", "D"))
    checks.shape("class_token_contrast", "labels", labels, tuple(tokens.shape[1:3]))
    unit = F.normalize(tokens.float(), dim=-1)
    losses = -(unit @ unit.transpose(-2, -1)).log_softmax(-1).diagonal(dim1=-2, dim2=-1)
    present = labels.to(losses.dtype)
    counts = present.sum(-1)
    means = (losses * present).sum(-1) / counts.clamp_min(1)
    return means.sum() / ((counts > 0).sum().clamp_min(1) * len(tokens))


def _attention(block: Any, tokens: Tensor) -> Tensor:
    """Mean over the heads of what a block's attention is about to be, ``[B, L, L]``, which its fused form keeps."""
    attend = block.attn
    qkv = attend.qkv(block.norm1(tokens))
    q, k, _ = rearrange(qkv, "b l (three heads d) -> three b heads l d", three=3, heads=attend.num_heads)
    q, k = attend.q_norm(q), attend.k_norm(k)
    mean: Tensor = ((q * attend.scale) @ k.transpose(-2, -1)).softmax(-1).mean(1)
    return mean


def _ranked_mean(maps: Tensor, decay: float = 0.996) -> Tensor:
    scores = maps.flatten(2).sort(-1, descending=True).values
    weights = decay ** torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype)
    return (scores * weights).sum(-1) / weights.sum()
