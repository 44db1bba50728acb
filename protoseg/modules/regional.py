"""RegionalSemanticContrast: regions of dense features against prototypes (VPL, arXiv 2412.19650)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from protoseg.functional import masked_average_pooling
from protoseg.utils import checks, distributed
from protoseg.utils.numeric import full_precision, unit

__all__ = ["ContrastedRegions", "RegionalSemanticContrast"]


class ContrastedRegions(NamedTuple):
    """What :class:`RegionalSemanticContrast` returns.

    Attributes:
        loss: ``[]``, contrast and weighted suppression; zero and connected to the graph where no region counts.
        contrast: ``[]``, of the regions of present classes.
        suppression: ``[]``, of the regions of absent classes.
        regions: ``[B, C, D]``, the mean feature under each mask; 0 under an empty one.
        similarity: ``[B, C, C + K]``, cosine of each region and each prototype.
        counted: ``[B, C]`` bool, the regions that the contrast is made of.
    """

    loss: Tensor
    contrast: Tensor
    suppression: Tensor
    regions: Tensor
    similarity: Tensor
    counted: Tensor


class RegionalSemanticContrast(nn.Module):
    r"""Pulls the mean feature of each region to its class's prototype, away from those of other classes.

    With :math:`r_c` the mean of the dense features under the mask of class :math:`c`, :math:`v` the prototypes of all
    classes and of background, and :math:`p_{ck} = \mathrm{softmax}_k(\cos(r_c, v_k) / \tau)` (VPL, phase 2):

    .. math::
        L = -\frac{1}{|R|} \sum_{(b, c) \in R} \log p_{cc}
            - \frac{\lambda}{|A|} \sum_{(b, c) \in A} \log (1 - p_{cc})

    over the regions :math:`R` of present classes, and :math:`A` of absent ones, whose mask is not empty: the mask of an
    absent class should not hold what looks like that class.

    Not stated in the paper: temperature, weight, negatives, and how absent classes enter ("negative masks from
    unrelated texts"). The gradient reaches features and masks, and the prototypes where these have one.

    Args:
        temperature: :math:`\tau` above 0.
        suppression: :math:`\lambda`, at least 0.
        least_area: Share of the picture in ``[0, 1]`` that a mask must cover to count; one of 0 never counts.

    Shape:
        - features: ``[B, D, H, W]``
        - masks: ``[B, C, H, W]``, shares in ``[0, 1]`` or bool, of the features' size
        - prototypes: ``[C, D]``
        - labels: ``[B, C]``, 1 = the class is in the picture; all are present where not given
        - background: ``[K, D]``, prototypes that no region belongs to
        - output: :class:`ContrastedRegions`

    Raises:
        ValueError: Wrong shapes or sizes, labels that are not 0 and 1.
        TypeError: Features or masks are of a wrong type.

    Example:
        >>> features, masks = torch.randn(2, 8, 4, 4, requires_grad=True), torch.rand(2, 3, 4, 4)
        >>> tags = torch.tensor([[1, 0, 0], [0, 1, 1]])
        >>> out = RegionalSemanticContrast()(features, masks, torch.randn(3, 8), tags)
        >>> out.loss.backward()
        >>> out.regions.shape, out.counted.tolist()
        (torch.Size([2, 3, 8]), [[True, False, False], [False, True, True]])
    """

    def __init__(self, *, temperature: float = 0.1, suppression: float = 1.0, least_area: float = 0.0) -> None:
        super().__init__()
        me = type(self).__name__
        checks.positive(me, "temperature", temperature)
        checks.unit_interval(me, "least_area", least_area)
        if not suppression >= 0:
            raise ValueError(f"{me}: suppression must be at least 0, got {suppression}")
        self.temperature, self.suppression, self.least_area = temperature, suppression, least_area

    def forward(
        self,
        features: Tensor,
        masks: Tensor,
        prototypes: Tensor,
        labels: Tensor | None = None,
        background: Tensor | None = None,
    ) -> ContrastedRegions:
        """Compute the loss. See the class for shapes and errors."""
        self._check(features, masks, prototypes, labels, background)
        with torch.autocast(features.device.type, enabled=False):
            features = full_precision(features)
            masks = masks.to(features.dtype)
            every = prototypes if background is None else torch.cat([prototypes, background.to(prototypes)])
            regions, _ = masked_average_pooling(features, masks)
            area = masks.mean((-2, -1))
            known = (area > 0) & (area >= self.least_area)
            similarity = unit(regions) @ unit(every.to(features.dtype)).T
            log_p = (similarity / self.temperature).log_softmax(-1)
            own = log_p.diagonal(dim1=1, dim2=2)
            present = torch.ones_like(known) if labels is None else labels.to(known.device) != 0
            counted, absent = known & present, known & ~present
            contrast = -_mean(own, counted)
            # log(1 - p) from log p, which keeps its digits where p is near 1.
            others = torch.zeros_like(own)
            if similarity.shape[-1] > 1:  # a class alone is sure of everything
                others = log_p.masked_fill(_diagonal(similarity), -torch.inf).logsumexp(-1)
            suppression = -_mean(others, absent)
            loss = contrast + self.suppression * suppression
            return ContrastedRegions(loss, contrast, suppression, regions, similarity, counted)

    def extra_repr(self) -> str:
        """The options, as in the constructor."""
        return f"temperature={self.temperature}, suppression={self.suppression}, least_area={self.least_area}"

    def _check(
        self, features: Tensor, masks: Tensor, prototypes: Tensor, labels: Tensor | None, background: Tensor | None
    ) -> None:
        me = type(self).__name__
        checks.shape(me, "features", features, ("B", "D", "H", "W"))
        checks.floating(me, "features", features)
        batch, dim, height, width = features.shape
        checks.shape(me, "prototypes", prototypes, ("C", dim), "project the features to the prototypes' space")
        classes = len(prototypes)
        remedy = "resize the masks to the features, one channel per class"
        checks.shape(me, "masks", masks, (batch, classes, height, width), remedy)
        if masks.dtype != torch.bool:
            checks.floating(me, "masks", masks)
        if labels is not None:
            checks.shape(me, "labels", labels, (batch, classes), "one row per picture, one column per class")
            checks.multi_hot(me, "labels", labels)
        if background is not None:
            checks.shape(me, "background", background, ("K", dim))


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of the values that count; 0 of none, with a gradient of 0. Its mean over ranks is that over all values."""
    count = distributed.all_gather(counted.sum().reshape(1)).sum().clamp_min(1)
    return torch.where(counted, values, torch.zeros_like(values)).sum() * distributed.world_size() / count


def _diagonal(similarity: Tensor) -> Tensor:
    """Where a region meets its own class: ``[C, C + K]`` bool."""
    rows, columns = similarity.shape[1:]
    return torch.eye(rows, columns, dtype=torch.bool, device=similarity.device)
