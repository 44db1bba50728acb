"""The arithmetic of PGSeg's published code, error by error, for ``compat="pgseg-repo"``.

Written from what that code computes, to continue or check weights that were trained with it. What differs from the
paper is listed in :class:`protoseg.GMMPrototypeRegularizer`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.functional import Mixture

_EPS = 1e-6


def em(tokens: Tensor, start: Tensor, iterations: int) -> Mixture:
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


def contrast(similarity: Tensor, matched: Tensor, scale: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
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
