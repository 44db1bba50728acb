"""K-means over all classes at once, the same on every rank and in every run."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg import _checks
from protoseg._numeric import full_precision, mean_of


class Clusters(NamedTuple):
    """What :func:`kmeans` finds.

    Attributes:
        centres: ``[C, K, D]``; 0 where a cluster is empty.
        valid: ``[C, K]`` bool, the clusters that have a member.
        assignment: ``[C, N]`` int64, the cluster of each point (0 for a point that is not valid).
        inertia: ``[C]``, the sum of squared distances of the valid points to their centres.
    """

    centres: Tensor
    valid: Tensor
    assignment: Tensor
    inertia: Tensor


@torch.no_grad()
def kmeans(points: Tensor, valid: Tensor | None = None, *, num_clusters: int, iterations: int = 10) -> Clusters:
    r"""Cluster each class's points at once: seeding by squared distance, then Lloyd's rounds.

    A round is one batched matrix product for the distances,
    :math:`\|x-m\|^2 = \|x\|^2 - 2\langle x, m\rangle + \|m\|^2`, and one for the new centres; there is no loop over
    classes. Seeding is greedy k-means++ (Arthur and Vassilvitskii, 2007) whose draws are a fixed low-discrepancy
    sequence instead of random numbers, so that every rank and every resumed run finds the same clusters.

    Args:
        points: ``[C, N, D]``.
        valid: ``[C, N]`` bool, the points that count; all where not given.
        num_clusters: ``K``, at least 1. A class with fewer distinct points gets fewer clusters.
        iterations: Rounds after seeding, at least 0.

    Returns:
        :class:`Clusters`.

    Raises:
        ValueError: Wrong shape, no point, ``num_clusters`` below 1 or ``iterations`` below 0.

    Example:
        >>> points = torch.tensor([[[0.0], [0.2], [5.0], [5.2]]])
        >>> kmeans(points, num_clusters=2).centres.flatten().sort().values
        tensor([0.1000, 5.1000])
    """
    _checks.shape("kmeans", "points", points, ("C", "N", "D"))
    _checks.not_empty("kmeans", "points", points)
    if num_clusters < 1 or iterations < 0:
        raise ValueError(
            f"kmeans: num_clusters must be at least 1 and iterations at least 0, got {num_clusters} and {iterations}"
        )
    if valid is None:
        valid = points.new_ones(points.shape[:2], dtype=torch.bool)
    _checks.shape("kmeans", "valid", valid, points.shape[:2])
    with torch.autocast(points.device.type, enabled=False):
        points = full_precision(points).masked_fill(~valid.unsqueeze(-1), 0.0)
        weights = valid.to(points.dtype)
        # Distances cancel badly far from the origin: work around each class's own mean.
        mean = mean_of(points, valid).unsqueeze(1)
        points = (points - mean) * weights.unsqueeze(-1)
        norms = points.square().sum(-1)
        centres = _seed(points, norms, weights, num_clusters)
        for _ in range(iterations):
            members = _members(_distances(points, centres), weights)
            sizes = members.sum(1).unsqueeze(-1)
            moved = members.transpose(1, 2) @ points / sizes.clamp_min(1.0)
            centres = torch.where(sizes > 0, moved, centres)
        distances = _distances(points, centres)
        filled = _members(distances, weights).sum(1) > 0
        nearest = (distances.amin(-1) + norms).clamp_min(0.0)
        centres = (centres + mean) * filled.unsqueeze(-1)
        return Clusters(centres, filled, distances.argmin(-1) * valid, (nearest * weights).sum(-1))


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances less the points' own squared norms, which do not change the nearest: ``[C, N, K]``."""
    return torch.baddbmm(centres.square().sum(-1).unsqueeze(1), points, centres.transpose(1, 2), alpha=-2.0)


def _members(distances: Tensor, weights: Tensor) -> Tensor:
    """Weight of each point in the cluster that it is nearest to, 0 in the others: ``[C, N, K]``."""
    return F.one_hot(distances.argmin(-1), distances.shape[-1]).to(weights.dtype) * weights.unsqueeze(-1)


def _seed(points: Tensor, norms: Tensor, weights: Tensor, num_clusters: int) -> Tensor:
    """Greedy k-means++: of several candidates, drawn by squared distance, take the one that lowers the sum most."""
    candidates = 2 + int(num_clusters).bit_length()
    rows = torch.arange(len(points), device=points.device).unsqueeze(-1)
    # The first draw is by distance from the mean, later ones by distance from the nearest centre so far.
    nearest = norms * weights
    centres = points.new_zeros(len(points), num_clusters, points.shape[-1])
    for k in range(num_clusters):
        cumulative = nearest.cumsum(-1)
        steps = torch.arange(candidates, device=points.device, dtype=points.dtype)
        draws = 0.6180339887 * (k * candidates + steps + 1) % 1.0
        target = draws * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target.contiguous(), right=True).clamp_max(points.shape[1] - 1)
        trial = points[rows, drawn]
        trial_norms = norms[rows, drawn].unsqueeze(1)
        distance = torch.baddbmm(norms.unsqueeze(-1) + trial_norms, points, trial.transpose(1, 2), alpha=-2.0)
        distance = distance.clamp_min(0.0) * weights.unsqueeze(-1)
        if k:
            distance = torch.minimum(distance, nearest.unsqueeze(-1))
        total = distance.sum(1)
        # The first of those that are as good as the best: of equals rounding must not choose.
        best = (total <= 1.00001 * total.amin(-1, keepdim=True)).int().argmax(-1, keepdim=True)
        centres[:, k] = trial[rows, best].squeeze(1)
        nearest = distance.gather(-1, best.unsqueeze(1).expand(-1, points.shape[1], -1)).squeeze(-1)
    return centres
