"""The plain CAM head on a timm backbone, or on a small residual network for runs from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from protoseg import _checks
from protoseg.models._timm import knowing

__all__ = ["CAMNetwork", "CAMOutput", "SmallResNet", "TimmBackbone", "build_cam_network"]


class CAMOutput(NamedTuple):
    """What :class:`CAMNetwork` returns.

    Attributes:
        logits: ``[B, C]`` for a multi-label loss.
        features: ``[B, D, h, w]`` of the backbone's last stage.
        cam: ``[B, C, h, w]`` raw scores: the classifier on every pixel. Connected to the graph.
    """

    logits: Tensor
    features: Tensor
    cam: Tensor


class SmallResNet(nn.Module):
    """A residual network of four stages at strides 2, 4, 8 and 8, for small pictures and runs from scratch.

    Basic blocks with batch normalisation. With the default width it has 0.9 million parameters and reaches in minutes
    on two CPU cores what a network without pre-training can reach on a few hundred pictures. The stride of 8 keeps
    small objects visible in the CAM.

    Args:
        width: Channels of the first stage, at least 1; the others have 2, 4 and 4 times as many.
        depths: Blocks per stage.

    Attributes:
        channels: Channels of the output, ``4 * width``.
        stride: 8.

    Shape:
        ``[B, 3, H, W]`` to ``[B, 4 * width, ceil(H / 8), ceil(W / 8)]``, of at least 0.

    Example:
        >>> SmallResNet(8)(torch.zeros(1, 3, 32, 48)).shape
        torch.Size([1, 32, 4, 6])
    """

    stride = 8

    def __init__(self, width: int = 32, *, depths: Sequence[int] = (1, 1, 2, 1)) -> None:
        super().__init__()
        _checks.positive("SmallResNet", "width", width)
        if len(depths) != 4 or min(depths) < 1:
            raise ValueError(f"SmallResNet: depths must be four numbers of at least 1, got {tuple(depths)}")
        channels = (width, 2 * width, 4 * width, 4 * width)
        self.channels = channels[-1]
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
    """The last feature map of any timm network that has ``features_only``.

    Args:
        name: A timm model name, such as ``"resnet50"``.
        pretrained: Load timm's weights, which needs a network connection or a filled cache.
        stride: Pixels per feature; 8, 16 or 32, where the network can be dilated.

    Attributes:
        channels: Channels of the output.
        stride: As given.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm knows no such network, or it cannot have that stride.
    """

    def __init__(self, name: str, *, pretrained: bool = False, stride: int = 16) -> None:
        super().__init__()
        timm: Any = knowing("TimmBackbone", name)
        if stride not in (8, 16, 32):
            raise ValueError(f"TimmBackbone: stride must be 8, 16 or 32, got {stride}")
        network: Any
        try:
            network = timm.create_model(
                name, pretrained=pretrained, features_only=True, out_indices=(-1,), output_stride=stride
            )
        except (TypeError, AssertionError, NotImplementedError) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"TimmBackbone: {name} cannot have stride {stride} or features_only ({reason}); "
                "take a convolutional network such as resnet50"
            ) from error
        self.network: nn.Module = network
        self.channels = int(network.feature_info.channels()[-1])
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        """Return the features ``[B, D, h, w]`` of the last stage."""
        features: Tensor = self.network(images)[-1]
        return features


class CAMNetwork(nn.Module):
    r"""Global average pooling and a 1x1 classifier: the class activation map comes with the prediction.

    .. math:: M_c(j) = \langle w_c, F(j)\rangle, \qquad y_c = \frac{1}{HW} \sum_j M_c(j)

    After Zhou et al., "Learning deep features for discriminative localization", 2016; no bias, so that the mean of
    the map is the logit.

    Args:
        backbone: Takes ``[B, 3, H, W]`` to ``[B, D, h, w]`` and has ``channels`` = ``D``.
        num_classes: ``C``.

    Attributes:
        channels: ``D``, channels of the features.

    Shape:
        ``[B, 3, H, W]`` to :class:`CAMOutput`.

    Example:
        >>> out = CAMNetwork(SmallResNet(8), num_classes=5)(torch.zeros(2, 3, 32, 32))
        >>> out.logits.shape, out.cam.shape
        (torch.Size([2, 5]), torch.Size([2, 5, 4, 4]))
    """

    def __init__(self, backbone: SmallResNet | TimmBackbone, num_classes: int) -> None:
        super().__init__()
        _checks.positive("CAMNetwork", "num_classes", num_classes)
        self.backbone = backbone
        self.channels: int = backbone.channels
        self.classifier = nn.Conv2d(backbone.channels, num_classes, 1, bias=False)

    def forward(self, images: Tensor) -> CAMOutput:
        """Return logits, features and CAM."""
        features = self.backbone(images)
        cam = self.classifier(features)
        return CAMOutput(cam.mean(dim=(-2, -1)), features, cam)


def build_cam_network(backbone: str, num_classes: int, *, pretrained: bool = False, stride: int = 16) -> CAMNetwork:
    """Make a CAM network by the name of its backbone.

    Args:
        backbone: ``"small"``, ``"small:WIDTH"``, or a timm model name.
        num_classes: ``C``.
        pretrained: For timm: load its weights.
        stride: For timm: pixels per feature.

    Returns:
        The network.

    Raises:
        ValueError: Weights wanted for the small network, which has none, or an unknown name.
        ImportError: timm is wanted and not installed.
    """
    kind, _, width = backbone.partition(":")
    if kind != "small":
        return CAMNetwork(TimmBackbone(backbone, pretrained=pretrained, stride=stride), num_classes)
    if pretrained:
        raise ValueError(f"build_cam_network: {backbone!r} has no pre-trained weights; name a timm model")
    if width and not width.isdecimal():
        raise ValueError(f"build_cam_network: backbone must look like 'small:32', got {backbone!r}")
    return CAMNetwork(SmallResNet(int(width)) if width else SmallResNet(), num_classes)
