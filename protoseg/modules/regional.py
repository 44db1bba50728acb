"""RegionalSemanticContrast: regions of dense features against prototypes (VPL, arXiv 2412.19650)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from protoseg.functional import masked_average_pooling
from protoseg.modules.base import PrototypeModule
from protoseg.utils import checks, distributed
from protoseg.utils.numeric import full_precision, no_autocast, unit

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


class RegionalSemanticContrast(PrototypeModule):
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
        check_values: Whether to look for NaN, masks outside 0..1 and labels other than 0 and 1, which waits for the
            device. By default on the CPU only; never while compiling.

    Shape:
        - features: ``[B, D, H, W]``
        - masks: ``[B, C, H, W]``, shares in ``[0, 1]`` or bool, of the features' size
        - prototypes: ``[C, D]``
        - labels: ``[B, C]``, 1 = the class is in the picture; all are present where not given
        - background: ``[K, D]``, prototypes that no region belongs to
        - output: :class:`ContrastedRegions`

    Raises:
        ValueError: Wrong shapes, sizes or devices, NaN, masks that leave ``[0, 1]`` (logits do), labels that are not 0
            and 1.
        TypeError: Features, masks or prototypes are of a wrong type.

    Example:
        >>> features, masks = torch.randn(2, 8, 4, 4, requires_grad=True), torch.rand(2, 3, 4, 4)
        >>> tags = torch.tensor([[1, 0, 0], [0, 1, 1]])
        >>> out = RegionalSemanticContrast()(features, masks, torch.randn(3, 8), tags)
        >>> out.loss.backward()
        >>> out.regions.shape, out.counted.tolist()
        (torch.Size([2, 3, 8]), [[True, False, False], [False, True, True]])
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        suppression: float = 1.0,
        least_area: float = 0.0,
        check_values: bool | None = None,
    ) -> None:
        super().__init__(check_values)
        me = type(self).__name__
        checks.positive(me, "temperature", temperature)
        checks.unit_interval(me, "least_area", least_area)
        checks.between(me, "suppression", suppression, 0)
        self.temperature = temperature
        self.suppression = suppression
        self.least_area = least_area

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
        with no_autocast(features.device):
            return self._compute(features, masks, prototypes, labels, background)

    def _compute(
        self,
        features: Tensor,
        masks: Tensor,
        prototypes: Tensor,
        labels: Tensor | None,
        background: Tensor | None,
    ) -> ContrastedRegions:
        features = full_precision(features)
        masks = masks.to(features.dtype)
        every = prototypes.to(features.dtype)
        if background is not None:
            every = torch.cat([every, background.to(features.dtype)])

        # Regions, and which of them count: of present classes for the contrast, of absent ones for the suppression.
        regions, _ = masked_average_pooling(features, masks)
        area = masks.mean((-2, -1))
        known = (area > 0) & (area >= self.least_area)
        present = torch.ones_like(known) if labels is None else labels > 0
        counted = known & present
        absent = known & ~present

        # Probabilities of each region over all prototypes.
        similarity = unit(regions) @ unit(every).T
        log_p = (similarity / self.temperature).log_softmax(-1)
        own = log_p.diagonal(dim1=1, dim2=2)
        contrast = -_mean(own, counted)

        # log(1 - p) from log p, which keeps its digits where p is near 1; a class alone is sure of everything.
        others = torch.zeros_like(own)
        if similarity.shape[-1] > 1:
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
        checks.floating(me, "prototypes", prototypes)
        if labels is not None:
            checks.shape(me, "labels", labels, (batch, classes), "one row per picture, one column per class")
        if background is not None:
            checks.shape(me, "background", background, ("K", dim))
            checks.floating(me, "background", background)
        others = {"masks": masks, "prototypes": prototypes, "labels": labels, "background": background}
        self._same_device(features.device, **others)

        if self._looks_at_values(features):
            for name, value in (("features", features), ("prototypes", prototypes), ("background", background)):
                if value is not None:
                    checks.finite(me, name, value)
            if masks.dtype != torch.bool:
                checks.within_unit_interval(me, "masks", masks)
            if labels is not None:
                checks.multi_hot(me, "labels", labels)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of the values that count; 0 of none, with a gradient of 0. Its mean over ranks is that over all values."""
    count = distributed.all_gather(counted.sum().reshape(1)).sum().clamp_min(1)
    return torch.where(counted, values, torch.zeros_like(values)).sum() * distributed.world_size() / count


def _diagonal(similarity: Tensor) -> Tensor:
    """Where a region meets its own class: ``[C, C + K]`` bool."""
    rows, columns = similarity.shape[1:]
    return torch.eye(rows, columns, dtype=torch.bool, device=similarity.device)
