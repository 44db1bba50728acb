"""The plain CAM head on a backbone."""

from __future__ import annotations

import math
import os
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from protoseg.models.backbones import Backbone, BankFeatures, SmallResNet, TimmBackbone, load_weights
from protoseg.utils import checks

__all__ = ["CAMNetwork", "CAMOutput", "build_cam_network"]


class CAMOutput(NamedTuple):
    """What :class:`CAMNetwork` returns.

    Attributes:
        logits: ``[B, C]`` for a multi-label loss.
        features: ``[B, D, h, w]``, what a prototype bank compares: of the backbone's last or last but one map.
        cam: ``[B, C, h, w]`` raw scores: the classifier on every pixel. Connected to the graph.
    """

    logits: Tensor
    features: Tensor
    cam: Tensor


class CAMNetwork(nn.Module):
    r"""Global average pooling and a 1x1 classifier: the class activation map comes with the prediction.

    .. math:: M_c(j) = \langle w_c, F(j)\rangle, \qquad y_c = b_c + \frac{1}{HW} \sum_j M_c(j)

    After Zhou et al., "Learning deep features for discriminative localization", 2016. Without ``prior`` there is no
    bias, so that the mean of the map is the logit.

    Args:
        backbone: Takes ``[B, 3, H, W]`` to its last two maps, of one size.
        num_classes: ``C``.
        bank_features: The map that a prototype bank is given: ``"last"``, which the classifier reads, or
            ``"penultimate"``, the input of the backbone's last block, which is less bent to the classes of its
            training.
        prior: Share of the pictures that a class is expected in, in (0, 1): what the logits say before any training, by
            their bias. Where each class is rare, that spares a pretrained network some epochs.

    Attributes:
        channels: ``D``, channels of those features.
        bank_features: As given.

    Shape:
        ``[B, 3, H, W]`` to :class:`CAMOutput`.

    Raises:
        ValueError: ``num_classes`` below 1, features of another name, or ``prior`` outside (0, 1).

    Example:
        >>> out = CAMNetwork(SmallResNet(8), num_classes=5)(torch.zeros(2, 3, 32, 32))
        >>> out.logits.shape, out.cam.shape
        (torch.Size([2, 5]), torch.Size([2, 5, 4, 4]))
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        bank_features: BankFeatures = "last",
        prior: float | None = None,
    ) -> None:
        super().__init__()
        checks.positive("CAMNetwork", "num_classes", num_classes)
        checks.choice("CAMNetwork", "bank_features", bank_features, get_args(BankFeatures))
        self.backbone = backbone
        self.bank_features: BankFeatures = bank_features
        self.channels = backbone.channels if bank_features == "last" else backbone.penultimate_channels
        self.classifier = nn.Conv2d(backbone.channels, num_classes, 1, bias=False)
        if prior is not None and not 0 < prior < 1:
            raise ValueError(f"CAMNetwork: prior must lie between 0 and 1, got {prior}")
        self.bias: nn.Parameter | None = None
        if prior is not None:
            self.bias = nn.Parameter(torch.full((num_classes,), math.log(prior / (1 - prior))))

    def forward(self, images: Tensor) -> CAMOutput:
        """Return logits, features and CAM."""
        penultimate, last = self.backbone.last_two(images)
        cam = self.classifier(last)
        features = last if self.bank_features == "last" else penultimate
        logits = cam.mean(dim=(-2, -1))
        if self.bias is not None:
            logits = logits + self.bias
        return CAMOutput(logits, features, cam)


def build_cam_network(
    backbone: str,
    num_classes: int,
    *,
    weights: str | os.PathLike[str] | None = None,
    stride: int = 16,
    bank_features: BankFeatures = "last",
    prior: float | None = None,
) -> CAMNetwork:
    """Make a CAM network by the name of its backbone.

    Args:
        backbone: ``"small"``, ``"small:WIDTH"``, or a timm model name.
        num_classes: ``C``.
        weights: What :func:`protoseg.models.backbones.load_weights` takes; ``None`` for random ones.
        stride: For timm: pixels per feature.
        bank_features: Of :class:`CAMNetwork`.
        prior: Likewise.

    Returns:
        The network.

    Raises:
        FileNotFoundError: There is no such file of weights.
        ImportError: timm, or the package of the weights, is wanted and not installed.
        ValueError: An unknown name, or weights of another network; the small one has none but those of files.

    Example:
        >>> build_cam_network("small:8", 5).channels
        32
    """
    kind, _, width = backbone.partition(":")
    network: Backbone
    if kind != "small":
        network = TimmBackbone(backbone, weights=weights, stride=stride)
    elif width and not width.isdecimal():
        raise ValueError(f"build_cam_network: backbone must look like 'small:32', got {backbone!r}")
    else:
        network = SmallResNet(int(width)) if width else SmallResNet()
        if weights is not None:
            load_weights(network, weights)
    return CAMNetwork(network, num_classes, bank_features=bank_features, prior=prior)
