"""The head of AMN: atrous convolutions on features that the picture's tags condition (Lee et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.models.backbones import Backbone, BankFeatures
from protoseg.utils import checks
from protoseg.utils.numeric import full_precision

__all__ = ["AMNNetwork", "AMNOutput", "activation_loss"]


class AMNOutput(NamedTuple):
    """What :class:`AMNNetwork` returns.

    Attributes:
        logits: ``[B, C+1, h, w]``, background in front, for :func:`activation_loss`.
        features: ``[B, D, h, w]``, the backbone's last or last but one map, before tags condition anything.
        cam: ``[B, C, h, w]``, logits less background's, above 0 where a class is likelier; absent classes 0.
    """

    logits: Tensor
    features: Tensor
    cam: Tensor


class AMNNetwork(nn.Module):
    r"""Class maps from a per-pixel classifier that knows which classes are in the picture.

    .. math:: A = \sum_r \mathrm{conv}_r(F \odot W y), \qquad M_c(j) = A_c(j) - A_0(j)

    with the backbone's features :math:`F`, the tags :math:`y`, a linear layer :math:`W`, 3x3 convolutions of dilation
    :math:`r`, and background as class 0. After Lee, Kim and Shim, "Threshold Matters in WSSS: Manipulating the
    Activation for the Robust and Accurate Segmentation Model Against Thresholds", CVPR 2022; it learns from masks that
    another network's CAM gave, by :func:`activation_loss`. The published maps are shares of the picture's classes and
    background (a softmax), scaled by minimum and maximum within what IRN takes for foreground. As smoothing keeps
    shares from 0, a bank would take background for objects: here the map is a class's log odds against background. A
    bank is given features that the tags have not scaled, which can be compared between pictures.

    Args:
        backbone: Takes ``[B, 3, H, W]`` to its last two maps, of one size.
        num_classes: ``C``, foreground classes.
        rates: Dilations, at least 1 each. The published ones suit maps of 32x32 and more.
        dropout: Of the conditioned features.
        bank_features: The map that a prototype bank is given: ``"last"``, which the convolutions read, or
            ``"penultimate"``, the input of the backbone's last block.

    Attributes:
        channels: ``D``, channels of those features.
        bank_features: As given.

    Shape:
        - images: ``[B, 3, H, W]``
        - labels: ``[B, C]`` multi-hot
        - output: :class:`AMNOutput`

    Raises:
        ValueError: ``num_classes`` below 1, no rates or one below 1, features of another name, or labels of another
            shape.

    Example:
        >>> from protoseg.models.backbones import SmallResNet
        >>> network = AMNNetwork(SmallResNet(8), num_classes=5, rates=(1, 2))
        >>> out = network(torch.zeros(2, 3, 32, 32), torch.eye(5)[:2])
        >>> out.logits.shape, out.cam.shape
        (torch.Size([2, 6, 4, 4]), torch.Size([2, 5, 4, 4]))
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        rates: Sequence[int] = (6, 12, 18, 24),
        dropout: float = 0.1,
        bank_features: BankFeatures = "last",
    ) -> None:
        super().__init__()
        checks.positive("AMNNetwork", "num_classes", num_classes)
        if not rates or min(rates) < 1:
            raise ValueError(f"AMNNetwork: rates must be one or more numbers of at least 1, got {tuple(rates)}")
        checks.choice("AMNNetwork", "bank_features", bank_features, get_args(BankFeatures))

        self.num_classes = num_classes
        self.backbone = backbone
        self.bank_features: BankFeatures = bank_features
        self.channels = backbone.channels if bank_features == "last" else backbone.penultimate_channels

        self.label_encoder = nn.Linear(num_classes, backbone.channels)
        self.dropout = nn.Dropout(dropout)
        self.atrous = nn.ModuleList(
            nn.Conv2d(backbone.channels, num_classes + 1, 3, padding=rate, dilation=rate) for rate in rates
        )

        for conv in self.atrous:
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, images: Tensor, labels: Tensor) -> AMNOutput:
        """Return logits, features and CAM. See the class for shapes and errors."""
        checks.shape("AMNNetwork", "labels", labels, (len(images), self.num_classes), "pass the pictures' tags")

        penultimate, last = self.backbone.last_two(images)
        conditioned = self.dropout(last * self.label_encoder(labels.to(last.dtype))[..., None, None])
        logits = torch.stack([conv(conditioned) for conv in self.atrous]).sum(0)
        odds = logits[:, 1:] - logits[:, :1]

        features = last if self.bank_features == "last" else penultimate
        return AMNOutput(logits, features, odds * (labels != 0)[..., None, None])


def activation_loss(logits: Tensor, masks: Tensor, smoothing: float = 0.4) -> Tensor:
    r"""Cross entropy with smoothed masks, in which background and foreground weigh the same.

    .. math:: L = \frac{1}{2} \sum_{S \in \{bg, fg\}} \frac{1}{|S|} \sum_{j \in S} -\sum_c q_c(j) \log p_c(j)

    with :math:`q = 1 - \epsilon` for the pixel's class and :math:`\epsilon / C` for the others. Strong smoothing keeps
    the activations of easy and hard pixels alike, so that one threshold suits all pictures. The published code divides
    by 0 where a batch has no foreground or no background; here that part is left out.

    Args:
        logits: ``[B, C+1, h, w]``, background in front.
        masks: ``[B, H, W]`` with 0 = background, 1..C = classes, 255 = void; the pixels nearest to the logits' count.
        smoothing: :math:`\epsilon` in ``[0, 1]``.

    Returns:
        ``[]`` in float32 (float64 of float64 logits); 0, connected to the graph, where all is void.

    Raises:
        ValueError: Shapes that do not belong together, or ``smoothing`` outside ``[0, 1]``.

    Example:
        >>> loss = activation_loss(torch.zeros(1, 4, 2, 2), torch.tensor([[[0, 0], [1, 255]]]))
        >>> loss.isclose(torch.tensor(4.0).log()).item()
        True
    """
    checks.unit_interval("activation_loss", "smoothing", smoothing)
    checks.shape("activation_loss", "logits", logits, ("B", "C+1", "h", "w"))
    checks.shape("activation_loss", "masks", masks, (len(logits), "H", "W"))
    # Class indices are exact in float32.
    target = F.interpolate(masks[:, None].float(), logits.shape[-2:], mode="nearest-exact")[:, 0].long()
    log_shares = full_precision(logits).log_softmax(1)
    classes = logits.shape[1] - 1
    own = log_shares.gather(1, target.where(target != 255, 0)[:, None])[:, 0]
    losses = -(1 - smoothing) * own - smoothing / max(classes, 1) * (log_shares.sum(1) - own)
    parts = [losses * (target == 0), losses * ((target != 0) & (target != 255))]
    counts = [(target == 0).sum(), ((target != 0) & (target != 255)).sum()]
    means = torch.stack([part.sum() / count.clamp_min(1) for part, count in zip(parts, counts, strict=True)])
    return means.sum() / torch.stack(counts).bool().sum().clamp_min(1)
