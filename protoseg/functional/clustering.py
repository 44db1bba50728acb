"""K-means over all classes at once, the same on every rank and in every run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from protoseg.utils import checks
from protoseg.utils.numeric import block_size, full_precision, masked_mean, no_autocast


class Clusters(NamedTuple):
    """What :func:`kmeans` finds.

    Attributes:
        centers: ``[C, K, D]``; 0 where a cluster is empty.
        valid: ``[C, K]`` bool, the clusters that have a member.
        assignment: ``[C, N]`` int64, the cluster of each point (0 for a point that is not valid).
        inertia: ``[C]``, the sum of squared distances of the valid points to their centers.
    """

    centers: Tensor
    valid: Tensor
    assignment: Tensor
    inertia: Tensor


@torch.no_grad()
def kmeans(points: Tensor, valid: Tensor | None = None, *, num_clusters: int, iterations: int = 10) -> Clusters:
    r"""Cluster each class's points at once: seeding by squared distance, then Lloyd's rounds.

    A round is one batched matrix product for the distances,
    :math:`\|x-m\|^2 = \|x\|^2 - 2\langle x, m\rangle + \|m\|^2`, and one for the new centers; there is no loop over
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
        >>> kmeans(points, num_clusters=2).centers.flatten().sort().values
        tensor([0.1000, 5.1000])
    """
    checks.shape("kmeans", "points", points, ("C", "N", "D"))
    checks.not_empty("kmeans", "points", points)
    if num_clusters < 1 or iterations < 0:
        raise ValueError(
            f"kmeans: num_clusters must be at least 1 and iterations at least 0, got {num_clusters} and {iterations}"
        )
    everything = valid is None
    if valid is None:
        valid = points.new_ones(points.shape[:2], dtype=torch.bool)
    checks.shape("kmeans", "valid", valid, points.shape[:2])

    # A block of classes at a time, which on the CPU stays in its cache through all rounds, and always in the same room.
    block = max(1, block_size(points.device) // max(1, points.shape[1] * points.shape[2]))

    with no_autocast(points.device):
        blocks = zip(torch.split(points, block), torch.split(valid, block), strict=True)
        room = torch.empty_like(full_precision(points[:block]))
        parts = []
        for some, which in blocks:
            # What does not count may be anything, also NaN.
            finite = some if everything else some.masked_fill(~which.unsqueeze(-1), 0.0)
            parts.append(_cluster(full_precision(finite), which, num_clusters, iterations, room[: len(some)]))
    return Clusters(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _cluster(points: Tensor, valid: Tensor, num_clusters: int, iterations: int, room: Tensor) -> Clusters:
    weights = valid.to(points.dtype)

    # 1. Around each class's own mean, as distances cancel badly far from the origin.
    mean = masked_mean(points, valid).unsqueeze(1)
    points = torch.sub(points, mean, out=room).mul_(weights.unsqueeze(-1))
    norms = torch.linalg.vector_norm(points, dim=-1).square_()

    # 2. Seeds, then rounds of assignment and means.
    centers = _seed(points, norms, weights, num_clusters)
    distance, nearest = _nearest(points, centers)
    for _ in range(iterations):
        members = _members(nearest, num_clusters) * weights.unsqueeze(1)
        sizes = members.sum(-1, keepdim=True)
        centers = torch.where(sizes > 0, members @ points / sizes.clamp_min(1.0), centers)
        before = nearest
        distance, nearest = _nearest(points, centers)
        # No later round would change anything. Other devices would have to be waited for.
        if points.device.type == "cpu" and torch.equal(before, nearest):
            break

    # 3. What came out: clusters with a member, and the sum of squared distances.
    filled = (_members(nearest, num_clusters) & valid.unsqueeze(1)).any(-1)
    inertia = ((distance + norms).clamp_min(0.0) * weights).sum(-1)
    return Clusters((centers + mean) * filled.unsqueeze(-1), filled, nearest * valid, inertia)


def _nearest(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest center, less the point's own squared norm, and its index: ``[C, N]`` each."""
    norms = centers.square().sum(-1, keepdim=True)
    distance, nearest = torch.baddbmm(norms, centers, points.transpose(1, 2), alpha=-2.0).min(1)
    return distance, nearest


def _members(nearest: Tensor, num_clusters: int) -> Tensor:
    """Which cluster has which point: ``[C, K, N]`` bool."""
    return nearest.unsqueeze(1) == torch.arange(num_clusters, device=nearest.device).unsqueeze(-1)


def _seed(points: Tensor, norms: Tensor, weights: Tensor, num_clusters: int) -> Tensor:
    """Greedy k-means++: of several candidates, drawn by squared distance, take the one that lowers the sum most."""
    candidates = 2 + int(num_clusters).bit_length()
    rows = torch.arange(len(points), device=points.device)
    steps = torch.arange(1, num_clusters * candidates + 1, device=points.device, dtype=points.dtype)
    draws = (0.6180339887 * steps % 1.0).reshape(num_clusters, candidates)

    # The first draw is by distance from the mean, later ones by distance from the nearest center so far.
    nearest = norms * weights
    centers = points.new_zeros(len(points), num_clusters, points.shape[-1])
    for k in range(num_clusters):
        cumulative = nearest.cumsum(-1)
        drawn = torch.searchsorted(cumulative, draws[k] * cumulative[:, -1:], right=True)
        places = (rows.unsqueeze(-1), drawn.clamp_max(points.shape[1] - 1))
        trial = points[places]
        offset = norms.unsqueeze(1) + norms[places].unsqueeze(-1)
        distance = torch.baddbmm(offset, trial, points.transpose(1, 2), alpha=-2.0)
        distance = distance.clamp_min_(0.0).mul_(weights.unsqueeze(1))

        if k:
            distance = torch.minimum(distance, nearest.unsqueeze(1))
        total = distance.sum(-1)

        # The first of those that are as good as the best: of equals rounding must not choose.
        best = (total <= 1.00001 * total.amin(-1, keepdim=True)).int().argmax(-1)
        centers[:, k] = trial[rows, best]
        nearest = distance[rows, best]
    return centers
