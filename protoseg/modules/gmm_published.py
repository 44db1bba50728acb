"""PublishedPrototypeRegularizer: the arithmetic of PGSeg's published code, error by error.

Written from what that code computes, to continue or check weights that were trained with it. What differs from the
paper is listed in :class:`protoseg.GMMPrototypeRegularizer`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.functional import Mixture, match
from protoseg.modules.gmm import GMMPrototypeRegularizer, move
from protoseg.utils.numeric import unit

__all__ = ["PublishedPrototypeRegularizer"]

_EPS = 1e-6


class PublishedPrototypeRegularizer(GMMPrototypeRegularizer):
    """Prototypes, matching, rejection and loss as PGSeg's published code computes them.

    Args:
        dim: ``D``. One channel stands for the published text path.
        num_prototypes: ``K``, which must equal the number of groups.
        options: Further arguments of :class:`protoseg.GMMPrototypeRegularizer`; those of kernel, bandwidth, estimator
            and matching do not count.

    Raises:
        ValueError: As there; also for a mask, which the published code does not know, or another number of groups.

    Example:
        >>> regularizer = PublishedPrototypeRegularizer(dim=16, num_prototypes=4)
        >>> out = regularizer(torch.randn(2, 49, 16), torch.randn(2, 4, 16))
        >>> out.match.sort().values.tolist()
        [[0, 1, 2, 3], [0, 1, 2, 3]]
    """

    def __init__(self, dim: int, num_prototypes: int, **options: Any) -> None:
        super().__init__(dim, num_prototypes, **options)

    def reset_parameters(self) -> None:
        """Draw the shared prototypes anew; of one channel they are scaled together."""
        super().reset_parameters()
        if self.dim == 1:
            with torch.no_grad():
                self.mu.normal_()
                self.mu.copy_(unit(self.mu, 0))

    @torch.no_grad()
    def _estimate(self, tokens: Tensor, mask: Tensor | None, mu: Tensor) -> Mixture:
        return _em(tokens, mu.to(tokens.dtype), self.iterations)

    def _directions(self, prototypes: Tensor, responsibilities: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return unit(prototypes)

    def _contrast(
        self, groups: Tensor, directions: Tensor, known: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # In the published order, to the last bit: prototypes that are all the same leave the matching to rounding.
        similarity = unit(groups) @ directions.transpose(1, 2)
        matched = match(-similarity)
        loss, accepted = _published_contrast(similarity, matched, scale, self.reject_threshold)
        return loss, similarity, matched, accepted

    @torch.no_grad()
    def _move(self, prototypes: Tensor, known: Tensor) -> None:
        # Of images the published prototypes never move; of words they do, and are not scaled.
        if self.dim == 1:
            total, count = self._arrivals(prototypes, known)
            move(self.mu, total, count, self.momentum, False)

    def _check(self, tokens: Tensor, group_tokens: Tensor, mask: Tensor | None) -> None:
        super()._check(tokens, group_tokens, mask)
        me = type(self).__name__
        if mask is not None:
            raise ValueError(f"{me}: the published code knows no token_mask; leave it out")
        if group_tokens.shape[1] != self.num_prototypes:
            raise ValueError(
                f"{me}: needs as many groups as prototypes ({self.num_prototypes}), got {group_tokens.shape[1]}"
            )


def _em(tokens: Tensor, start: Tensor, iterations: int) -> Mixture:
    """Fit prototypes with bandwidth 1, from ``[K, D]``; of one channel the prototypes share their unit length."""
    axis = 1 if tokens.shape[-1] == 1 else 2
    centers = start.expand(len(tokens), -1, -1)
    shares = tokens
    for _ in range(iterations):
        shares = (tokens @ centers.transpose(1, 2)).softmax(-1)
        weights = shares / (_EPS + shares.sum(1, keepdim=True))
        centers = weights.transpose(1, 2) @ tokens
        centers = centers / (_EPS + torch.linalg.vector_norm(centers, dim=axis, keepdim=True))
    return Mixture(centers, shares)


def _published_contrast(similarity: Tensor, matched: Tensor, scale: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Contrast groups with their prototypes, which it keeps by the wrong similarity; NaN where all are rejected.

    Args:
        similarity: ``[B, G, G]``, groups by prototypes.
        matched: ``[B, G]``, a permutation.
        scale: Inverse temperature.
        threshold: Of the min-max normalized similarity.

    Returns:
        The loss, and the pairs ``[B, G]`` kept in the direction from prototypes to groups.
    """
    groups = similarity.shape[1]
    # Prototypes in the order of the groups that they were given to: the pairs lie on the diagonal.
    ordered = similarity.gather(2, matched.unsqueeze(1).expand(-1, groups, -1))
    # Of every row it looks at column 0, and of rows that it later reads as columns.
    from_prototypes = _near_first(ordered.detach(), threshold)
    from_groups = _near_first(ordered.detach().transpose(1, 2), threshold)
    target = torch.arange(groups, device=similarity.device).expand(len(similarity), -1)
    logits = ordered.transpose(1, 2)
    loss = F.cross_entropy(logits[from_prototypes] * scale, target[from_prototypes])
    loss = loss + F.cross_entropy(ordered[from_groups] * scale, target[from_groups])
    return loss, from_prototypes


def _near_first(similarity: Tensor, threshold: float) -> Tensor:
    low, high = similarity.amin(1, keepdim=True), similarity.amax(1, keepdim=True)
    return ((similarity - low) / (high - low + _EPS))[:, :, 0] > threshold
