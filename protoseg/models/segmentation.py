"""The final segmentation network: any of segmentation_models_pytorch, also on the CAM network's own backbone."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from protoseg.models.backbones import Backbone, SmallResNet, TimmBackbone
from protoseg.utils.extras import require

__all__ = ["SmallUnet", "build_segmentation_network"]


class SmallUnet(nn.Module):
    """The U-Net decoder of segmentation_models_pytorch on a :class:`protoseg.models.backbones.SmallResNet`.

    For pictures that are too few to train one of the usual encoders from nothing: the backbone that learned from their
    tags is a start.

    Args:
        encoder: Backbone, taken over as it is.
        classes: Channels of the output, background included.

    Shape:
        ``[B, 3, H, W]`` to ``[B, classes, H, W]`` logits.

    Raises:
        ImportError: segmentation_models_pytorch is not installed.
    """

    def __init__(self, encoder: SmallResNet, classes: int) -> None:
        super().__init__()
        smp = require("segmentation_models_pytorch", "SmallUnet", "recipes")
        width = encoder.channels // 4
        self.encoder = encoder
        self.decoder = smp.decoders.unet.decoder.UnetDecoder(
            (3, width, 2 * width, 4 * width), (2 * width, width, width // 2), n_blocks=3
        )
        self.head = smp.base.SegmentationHead(width // 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.decoder(self.encoder.pyramid(images)))
        return logits


def build_segmentation_network(
    name: str, classes: int, *, backbone: Backbone | None = None, weights: Literal["timm"] | None = None
) -> nn.Module:
    """Make a segmentation network by name.

    Args:
        name: ``"ARCHITECTURE:ENCODER"`` of segmentation_models_pytorch, such as ``"deeplabv3plus:resnet101"``, or
            ``"ARCHITECTURE:backbone"`` for an encoder that begins with the weights of ``backbone``: any architecture on
            a timm backbone, and ``"unet:backbone"``, a :class:`SmallUnet`, on the small one.
        classes: Channels of the output, background included.
        backbone: For ``"ARCHITECTURE:backbone"``, as trained from tags; it is copied.
        weights: ``"timm"`` to load the weights that are published for a named encoder, which needs a network connection
            or a filled cache.

    Returns:
        A network from ``[B, 3, H, W]`` to ``[B, classes, H, W]`` logits.

    Raises:
        ImportError: segmentation_models_pytorch is not installed.
        ValueError: There is no such network, or none on that backbone.

    Example:
        >>> network = build_segmentation_network("unet:backbone", 3, backbone=SmallResNet(8))
        >>> network(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 3, 32, 32])
    """
    architecture, _, encoder = name.partition(":")
    if encoder == "backbone":
        if isinstance(backbone, TimmBackbone):
            return _on_timm(architecture, backbone, classes)
        if backbone is None or architecture != "unet":
            raise ValueError(
                f"build_segmentation_network: {name!r} needs a backbone of timm, or must be 'unet:backbone' with the "
                f"small one, got {type(backbone).__name__}; name an encoder of segmentation_models_pytorch"
            )
        return SmallUnet(copy.deepcopy(backbone), classes)

    if weights not in (None, "timm"):
        raise ValueError(
            f"build_segmentation_network: weights must be 'timm' or None, got {weights!r}; load others into a backbone "
            "and name 'ARCHITECTURE:backbone'"
        )
    published: bool | str | None = None
    if weights is not None:
        published = True if encoder.startswith("tu-") else "imagenet"
    return _create(name, classes, published)


def _create(name: str, classes: int, weights: bool | str | None = None) -> nn.Module:
    smp = require("segmentation_models_pytorch", "build_segmentation_network", "recipes")
    architecture, _, encoder = name.partition(":")
    try:
        model: nn.Module = smp.create_model(architecture, encoder, encoder_weights=weights, classes=classes)
    except (KeyError, ValueError) as error:
        raise ValueError(f"build_segmentation_network: expected ARCHITECTURE:ENCODER, got {name!r}; {error}") from error
    return model


def _on_timm(architecture: str, backbone: TimmBackbone, classes: int) -> nn.Module:
    """An architecture on the encoder of the same timm name, which is the same features-only network."""
    model: Any = _create(f"{architecture}:tu-{backbone.name}", classes)
    try:
        model.encoder.model.load_state_dict(backbone.network.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"build_segmentation_network: the encoder of {architecture!r} does not take the weights of "
            f"{backbone.name}; name another architecture, such as deeplabv3plus; {error}"
        ) from error
    if backbone.channels_last:
        model.to(memory_format=torch.channels_last)
    network: nn.Module = model
    return network
