"""The final segmentation network: any of segmentation_models_pytorch, or a U-Net on the CAM network's own backbone."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from protoseg.models.heads import SmallResNet, TimmBackbone

__all__ = ["SmallUnet", "build_segmentation_network"]


class SmallUnet(nn.Module):
    """The U-Net decoder of segmentation_models_pytorch on a :class:`protoseg.models.heads.SmallResNet`.

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
        try:
            from segmentation_models_pytorch.base import SegmentationHead
            from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
        except ImportError as error:
            raise ImportError(
                'SmallUnet needs segmentation_models_pytorch; run pip install "protoseg[examples]"'
            ) from error
        width = encoder.channels // 4
        self.encoder = encoder
        self.decoder = UnetDecoder((3, width, 2 * width, 4 * width), (2 * width, width, width // 2), n_blocks=3)
        self.head = SegmentationHead(width // 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.decoder(self.encoder.pyramid(images)))
        return logits


def build_segmentation_network(
    name: str, classes: int, *, backbone: SmallResNet | TimmBackbone | None = None, pretrained: bool = False
) -> nn.Module:
    """Make a segmentation network by name.

    Args:
        name: ``"ARCHITECTURE:ENCODER"`` of segmentation_models_pytorch, such as ``"deeplabv3plus:resnet50"``, or
            ``"unet:backbone"`` for a :class:`SmallUnet` on a copy of ``backbone``.
        classes: Channels of the output, background included.
        backbone: For ``"unet:backbone"``, as trained from tags.
        pretrained: Load the encoder's weights.

    Returns:
        A network from ``[B, 3, H, W]`` to ``[B, classes, H, W]`` logits.

    Raises:
        ImportError: segmentation_models_pytorch is not installed.
        ValueError: There is no such network, or ``"unet:backbone"`` without a small backbone.

    Example:
        >>> import torch
        >>> network = build_segmentation_network("unet:backbone", 3, backbone=SmallResNet(8))
        >>> network(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 3, 32, 32])
    """
    architecture, _, encoder = name.partition(":")
    if encoder == "backbone":
        if architecture != "unet" or not isinstance(backbone, SmallResNet):
            raise ValueError(
                f"build_segmentation_network: {name!r} must be 'unet:backbone' and needs the small backbone, "
                f"got {type(backbone).__name__}; name an encoder of segmentation_models_pytorch"
            )
        return SmallUnet(copy.deepcopy(backbone), classes)
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ImportError(
            'build_segmentation_network needs segmentation_models_pytorch; run pip install "protoseg[examples]"'
        ) from error
    weights = (True if encoder.startswith("tu-") else "imagenet") if pretrained else None
    try:
        model: nn.Module = smp.create_model(architecture, encoder, encoder_weights=weights, classes=classes)
    except (KeyError, ValueError) as error:
        raise ValueError(f"build_segmentation_network: expected ARCHITECTURE:ENCODER, got {name!r}; {error}") from error
    return model
