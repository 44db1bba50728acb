"""The mathematics of the modules as pure functions of tensors.

Axes: ``B`` images, ``C`` classes, ``K`` prototypes, ``D`` channels, ``H W``. Leading axes written ``...`` broadcast.
Every function computes in float32 whatever the input's dtype (float64 stays float64) and whatever autocast says;
the modules cast back.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg import _checks

__all__ = [
    "Clusters",
    "Metric",
    "cosine_map",
    "full_precision",
    "judge",
    "kmeans",
    "masked_average",
    "max_normalize",
    "mean_direction",
    "mean_of",
    "metric_scale",
    "positiveness",
    "prototype_cam",
    "prototype_shift",
    "select_top_k",
    "similarity",
]

Metric = Literal["dot", "cosine", "l1", "l2"]
_EPS = 1e-8


def full_precision(value: Tensor) -> Tensor:
    """Return ``value`` in float32, or unchanged where it already is float32 or float64."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def max_normalize(cam: Tensor) -> Tensor:
    r"""Clip a class activation map at 0 and divide each channel by its own maximum.

    .. math:: M(j) = \frac{\mathrm{ReLU}(m(j))}{\max_{j'} \mathrm{ReLU}(m(j'))}

    Args:
        cam: ``[..., H, W]`` raw scores.

    Returns:
        ``[..., H, W]`` in ``[0, 1]``. A channel without a positive score is all zero, and so is its gradient.

    Example:
        >>> max_normalize(torch.tensor([[[-1.0, 2.0, 4.0]]])).tolist()
        [[[0.0, 0.5, 1.0]]]
    """
    cam = full_precision(cam).relu()
    peak = cam.amax(dim=(-2, -1), keepdim=True)
    return cam / torch.where(peak > _EPS, peak, torch.ones_like(peak))


def masked_average(features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    r"""Average the features under each mask: the prototype of a region.

    .. math:: a_n = \frac{\sum_j w_n(j) F(j)}{\sum_j w_n(j)}

    Args:
        features: ``[B, D, H, W]``.
        masks: ``[B, N, H, W]`` weights of at least 0, or bool.

    Returns:
        Prototypes ``[B, N, D]`` and ``[B, N]`` bool, ``False`` where the mask is empty; the prototype is then 0.

    Example:
        >>> features = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> average, valid = masked_average(features, features[:, :1] > 1)
        >>> average.item(), valid.item()
        (2.5, True)
    """
    with torch.autocast(features.device.type, enabled=False):
        features = full_precision(features)
        weights = masks.to(features.dtype)
        total = weights.sum(dim=(-2, -1))
        summed = weights.flatten(2) @ features.flatten(2).transpose(1, 2)
        return summed / total.clamp_min(_EPS).unsqueeze(-1), total > 0


def similarity(anchors: Tensor, prototypes: Tensor, metric: Metric = "dot") -> Tensor:
    r"""Compare each anchor with each prototype; larger is nearer under every metric.

    ``dot`` is :math:`\langle a, p\rangle`, ``cosine`` the same of unit vectors, ``l1`` is :math:`-\|a-p\|_1` and
    ``l2`` is :math:`-\|a-p\|_2`.

    Args:
        anchors: ``[..., N, D]``.
        prototypes: ``[..., K, D]``, with the same leading axes.
        metric: How to compare.

    Returns:
        ``[..., N, K]``.

    Raises:
        ValueError: Unknown metric.

    Example:
        >>> similarity(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), "l1").tolist()
        [[-1.0, -2.0]]
    """
    _checks.choice("similarity", "metric", metric, get_args(Metric))
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, prototypes = full_precision(anchors), full_precision(prototypes)
        if metric in ("l1", "l2"):
            # The faster route through a matrix product cancels digits where two points are close.
            power = 1.0 if metric == "l1" else 2.0
            mode = "donot_use_mm_for_euclid_dist"
            distance: Tensor = torch.cdist(anchors, prototypes, p=power, compute_mode=mode)
            return -distance
        if metric == "cosine":
            anchors, prototypes = F.normalize(anchors, dim=-1), F.normalize(prototypes, dim=-1)
        return anchors @ prototypes.transpose(-2, -1)


def metric_scale(prototypes: Tensor, valid: Tensor, metric: Metric = "dot") -> Tensor:
    r"""Size of a metric's values among prototypes, so that one temperature suits every metric and every network.

    The mean of :math:`\|p\|^2` for ``dot``, of :math:`\|p\|_1` for ``l1``, of :math:`\|p\|_2` for ``l2``; 1 for ``cosine``.

    Args:
        prototypes: ``[..., K, D]``.
        valid: ``[..., K]`` bool, which prototypes exist.
        metric: As in :func:`similarity`.

    Returns:
        ``[]``, above 0.
    """
    if metric == "cosine":
        return prototypes.new_ones(())
    order = 1 if metric == "l1" else 2
    sizes = torch.linalg.vector_norm(full_precision(prototypes), ord=order, dim=-1)
    if metric == "dot":
        sizes = sizes.square()
    return ((sizes * valid).sum() / valid.sum().clamp_min(1)).clamp_min(_EPS)


def positiveness(scores: Tensor, valid: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    r"""Turn similarities into the share that each context has in an instance (CPAL section 3.3, 2403.07630).

    .. math:: w_i = \frac{\exp(s_i / T)}{\sum_{i' \in \text{valid}} \exp(s_{i'} / T)}

    Args:
        scores: ``[..., K]`` similarities.
        valid: ``[..., K]`` bool; the other contexts get 0.
        temperature: ``T`` above 0. Not in the paper.

    Returns:
        ``[..., K]`` that sums to 1, or all zero where nothing is valid.

    Example:
        >>> positiveness(torch.zeros(3), torch.tensor([True, True, False])).tolist()
        [0.5, 0.5, 0.0]
    """
    scores = full_precision(scores) / temperature
    # Of a row without a valid entry -inf would make softmax NaN, in the gradient too; any finite floor will do.
    floor = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~valid, floor), dim=-1) * valid


def select_top_k(weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Keep the ``k`` largest weights, in falling order; all of them where there are fewer.

    Args:
        weights: ``[..., K]`` of at least 0.
        k: How many, at least 1.

    Returns:
        Weights ``[..., min(k, K)]`` and their indices; an entry of weight 0 is an empty place.

    Example:
        >>> values, indices = select_top_k(torch.tensor([0.2, 0.5, 0.3]), 2)
        >>> indices.tolist()
        [1, 2]
    """
    top = weights.topk(min(k, weights.shape[-1]), dim=-1)
    return top.values, top.indices


def mean_direction(prototypes: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Average the unit prototypes, so that one product with unit features gives the mean of all their cosines.

    .. math:: \frac{\sum_i w_i \cos(F, p_i)}{\sum_i w_i}
        = \Bigl\langle \frac{F}{\|F\|}, \frac{\sum_i w_i\, p_i / \|p_i\|}{\sum_i w_i} \Bigr\rangle

    Args:
        prototypes: ``[..., K, D]``.
        weights: ``[..., K]`` of at least 0, which may have more leading axes; equal where not given.

    Returns:
        ``[..., D]`` of length at most 1; 0 where all weights are 0.
    """
    with torch.autocast(prototypes.device.type, enabled=False):
        unit = F.normalize(full_precision(prototypes), dim=-1)
        if weights is None:
            return unit.mean(-2)
        weights = full_precision(weights)
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(_EPS)
        return torch.einsum("...k,...kd->...d", weights, unit)


def cosine_map(features: Tensor, directions: Tensor) -> Tensor:
    """Multiply unit features with directions.

    Args:
        features: ``[B, D, H, W]``.
        directions: ``[B, N, D]``, from :func:`mean_direction`.

    Returns:
        ``[B, N, H, W]`` in ``[-1, 1]``.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(full_precision(features), dim=1)
        return (full_precision(directions) @ unit.flatten(2)).reshape(len(features), -1, *features.shape[-2:])


def prototype_cam(features: Tensor, prototypes: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Score every pixel against weighted prototypes (CPAL section 3.2, 2403.07630).

    .. math:: \tilde M_n(j) = \mathrm{ReLU}\Bigl(\frac{\sum_i w_i \cos(F(j), p_i)}{\sum_i w_i}\Bigr)

    The ``K`` maps are never made, see :func:`mean_direction`: the cost is the same for any ``K``.

    Args:
        features: ``[B, D, H, W]``.
        prototypes: ``[B, N, K, D]``.
        weights: ``[B, N, K]`` of at least 0; equal where not given.

    Returns:
        ``[B, N, H, W]`` in ``[0, 1]``; 0 where all weights are 0.

    Example:
        >>> features = torch.randn(1, 4, 2, 2)
        >>> own = prototype_cam(features, features[:, :, 0, 0].reshape(1, 1, 1, 4))
        >>> round(own[0, 0, 0, 0].item(), 4)
        1.0
    """
    return cosine_map(features, mean_direction(prototypes, weights)).relu()


def prototype_shift(contexts: Tensor, valid: Tensor, instances: Tensor, stored: Tensor) -> Tensor:
    r"""Step from the mean instance of a class to its mean context (CPAL section 3.3, distribution alignment).

    .. math:: \delta_n = -E[\epsilon_{i,q}] = \frac{1}{N_p Q_n} \sum_{i,q} (p_i - P^I_{n,q}) = \bar p - \bar P^I_n

    Args:
        contexts: ``[C, K, D]``.
        valid: ``[C, K]`` bool, which contexts exist.
        instances: ``[C, Q, D]``.
        stored: ``[C, Q]`` bool, which instances exist.

    Returns:
        ``[C, D]``; 0 for a class without contexts or without instances.
    """
    both = (valid.any(-1) & stored.any(-1)).unsqueeze(-1)
    mean_context = mean_of(contexts, valid)
    return (mean_context - mean_of(instances, stored)) * both


def mean_of(points: Tensor, valid: Tensor) -> Tensor:
    """Average the valid points.

    Args:
        points: ``[..., N, D]``.
        valid: ``[..., N]`` bool.

    Returns:
        ``[..., D]``; 0 where nothing is valid.
    """
    weights = valid.to(points.dtype)
    return (weights.unsqueeze(-2) @ points).squeeze(-2) / weights.sum(-1, keepdim=True).clamp_min(1.0)


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
def kmeans(
    points: Tensor, valid: Tensor | None = None, *, num_clusters: int, iterations: int = 10
) -> Clusters:
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
        ValueError: Wrong rank or ``num_clusters`` below 1.

    Example:
        >>> points = torch.tensor([[[0.0], [0.2], [5.0], [5.2]]])
        >>> kmeans(points, num_clusters=2).centres.flatten().sort().values
        tensor([0.1000, 5.1000])
    """
    _checks.shape("kmeans", "points", points, ("C", "N", "D"))
    if num_clusters < 1 or iterations < 0:
        raise ValueError(
            f"kmeans: num_clusters must be at least 1 and iterations at least 0, got {num_clusters} and {iterations}"
        )
    classes, n, _ = points.shape
    if valid is None:
        valid = points.new_ones(classes, n, dtype=torch.bool)
    _checks.shape("kmeans", "valid", valid, (classes, n))
    with torch.autocast(points.device.type, enabled=False):
        weights = valid.to(full_precision(points).dtype)
        # Distances cancel badly far from the origin: work around each class's own mean.
        mean = mean_of(full_precision(points), valid).unsqueeze(1)
        centred = (full_precision(points) - mean) * weights.unsqueeze(-1)
        norms = centred.square().sum(-1)
        centres = _seed(centred, norms, weights, num_clusters)
        for _ in range(iterations):
            members = _members(centred, centres, weights)
            sizes = members.sum(1)
            moved = members.transpose(1, 2) @ centred / sizes.clamp_min(1.0).unsqueeze(-1)
            centres = torch.where(sizes.unsqueeze(-1) > 0, moved, centres)
        distances = _distances(centred, centres)
        assignment = distances.argmin(-1) * valid
        members = F.one_hot(assignment, num_clusters).to(weights.dtype) * weights.unsqueeze(-1)
        filled = members.sum(1) > 0
        nearest = (distances.gather(-1, assignment.unsqueeze(-1)).squeeze(-1) + norms).clamp_min(0.0)
        centres = (centres + mean) * filled.unsqueeze(-1)
        return Clusters(centres, filled, assignment, (nearest * weights).sum(-1))


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances less the points' own squared norms, which do not change the nearest: ``[C, N, K]``."""
    return torch.baddbmm(centres.square().sum(-1).unsqueeze(1), points, centres.transpose(1, 2), alpha=-2.0)


def _members(points: Tensor, centres: Tensor, weights: Tensor) -> Tensor:
    nearest = _distances(points, centres).argmin(-1)
    return F.one_hot(nearest, centres.shape[1]).to(points.dtype) * weights.unsqueeze(-1)


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
        draws = (0.5 + 0.6180339887 * (k * candidates + steps)) % 1.0
        target = draws * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, target.contiguous(), right=True).clamp_max(points.shape[1] - 1)
        trial = points[rows, drawn]
        trial_norms = norms[rows, drawn].unsqueeze(1)
        distance = torch.baddbmm(norms.unsqueeze(-1) + trial_norms, points, trial.transpose(1, 2), alpha=-2.0)
        distance = distance.clamp_min(0.0) * weights.unsqueeze(-1)
        if k:
            distance = torch.minimum(distance, nearest.unsqueeze(-1))
        best = distance.sum(1).argmin(-1, keepdim=True)
        centres[:, k] = trial[rows, best].squeeze(1)
        nearest = distance.gather(-1, best.unsqueeze(1).expand(-1, points.shape[1], -1)).squeeze(-1)
    return centres


def judge(foreground: Tensor, background: Tensor, sharpness: float = 3.0) -> Tensor:
    r"""Judge a foreground score against the background's, on a scale where 1/2 is undecided.

    .. math:: \tilde M_c(j) = \mathrm{clamp}\bigl(\kappa\,(s_c(j) - s_0(j)) + \tfrac12,\ 0,\ 1\bigr)

    Not in the CPAL paper, which compares a cosine with a constant.

    Args:
        foreground: ``[B, C, H, W]`` scores.
        background: ``[B, 1, H, W]`` scores of the background.
        sharpness: :math:`\kappa` above 0.

    Returns:
        ``[B, C, H, W]`` in ``[0, 1]``.
    """
    return (sharpness * (foreground - background) + 0.5).clamp(0.0, 1.0)
