"""Prototypes: means of regions, how alike two are, and the maps that they make."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from protoseg.utils import checks
from protoseg.utils.numeric import full_precision, masked_mean, no_autocast, pixel_length, unit

__all__ = [
    "Metric",
    "cosine_map",
    "dot_map",
    "masked_average_pooling",
    "mean_direction",
    "metric_scale",
    "positiveness",
    "prototype_cam",
    "prototype_shift",
    "select_top_k",
    "similarity",
    "weighted_mean",
]

Metric = Literal["dot", "cosine", "l1", "l2"]
_EPS = 1e-8


def masked_average_pooling(features: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    r"""Average the features under each mask: the prototype of a region.

    .. math:: a_n = \frac{\sum_j w_n(j) F(j)}{\sum_j w_n(j)}

    Args:
        features: ``[B, D, H, W]``.
        masks: ``[B, N, H, W]`` weights of at least 0, or bool.

    Returns:
        Prototypes ``[B, N, D]`` and ``[B, N]`` bool, ``False`` where the mask is empty; the prototype is then 0.

    Example:
        >>> features = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> average, valid = masked_average_pooling(features, features[:, :1] > 1)
        >>> average.item(), valid.item()
        (2.5, True)
    """
    with no_autocast(features.device):
        features = full_precision(features)
        weights = masks.to(features.dtype)
        total = weights.sum(dim=(-2, -1))
        summed = rearrange(weights, "b n h w -> b n (h w)") @ rearrange(features, "b d h w -> b (h w) d")
        # Of an empty mask the sum is 0, and must not be divided by next to nothing: that would be its gradient's scale.
        size = torch.where(total > 0, total, torch.ones_like(total))
        return summed / size.unsqueeze(-1), total > 0


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
    checks.choice("similarity", "metric", metric, get_args(Metric))
    with no_autocast(anchors.device):
        anchors, prototypes = full_precision(anchors), full_precision(prototypes)
        if metric in ("l1", "l2"):
            # The faster route through a matrix product cancels digits where two points are close.
            power = 1.0 if metric == "l1" else 2.0
            mode = "donot_use_mm_for_euclid_dist"
            distance: Tensor = torch.cdist(anchors, prototypes, p=power, compute_mode=mode)
            return -distance
        if metric == "cosine":
            anchors, prototypes = unit(anchors), unit(prototypes)
        return anchors @ prototypes.transpose(-2, -1)


def metric_scale(prototypes: Tensor, valid: Tensor, metric: Metric = "dot") -> Tensor:
    r"""Size of a metric's values among prototypes, so that one temperature suits every metric and every network.

    The mean of :math:`\|p\|^2` for ``dot``, of :math:`\|p\|_1` for ``l1``, of :math:`\|p\|_2` for ``l2``; 1 for
    ``cosine``. Not in the paper.

    Args:
        prototypes: ``[..., K, D]``.
        valid: ``[..., K]`` bool, which prototypes exist.
        metric: As in :func:`similarity`.

    Returns:
        ``[]``, above 0.

    Raises:
        ValueError: Unknown metric.
    """
    checks.choice("metric_scale", "metric", metric, get_args(Metric))
    if metric == "cosine":
        return prototypes.new_ones(())
    order = 1 if metric == "l1" else 2
    sizes: Tensor = torch.linalg.vector_norm(full_precision(prototypes), ord=order, dim=-1)
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
    with no_autocast(prototypes.device):
        prototypes = unit(full_precision(prototypes))
        return prototypes.mean(-2) if weights is None else weighted_mean(prototypes, weights)


def weighted_mean(prototypes: Tensor, weights: Tensor) -> Tensor:
    r"""Average prototypes by weight, :math:`\sum_i w_i p_i / \sum_i w_i`.

    Args:
        prototypes: ``[..., K, D]``.
        weights: ``[..., K]`` of at least 0, or bool, which may have more leading axes.

    Returns:
        ``[..., D]``; 0 where all weights are 0.

    Example:
        >>> weighted_mean(torch.tensor([[0.0, 4.0], [8.0, 0.0]]), torch.tensor([3.0, 1.0])).tolist()
        [2.0, 3.0]
    """
    with no_autocast(prototypes.device):
        prototypes, weights = full_precision(prototypes), full_precision(weights)
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(_EPS)
        return torch.einsum("...k,...kd->...d", weights, prototypes)


def dot_map(features: Tensor, directions: Tensor, origin: Tensor | None = None) -> Tensor:
    r"""Multiply features, seen from ``origin``, with directions; the moved features are never made.

    Args:
        features: ``[B, D, H, W]``.
        directions: ``[B, N, D]``.
        origin: ``[D]``, what to subtract from the features first.

    Returns:
        ``[B, N, H, W]``.
    """
    with no_autocast(features.device):
        flat, directions = full_precision(features).flatten(2), full_precision(directions)
        scores = directions @ flat
        if origin is not None:
            scores = scores - (directions @ origin.to(flat.dtype)).unsqueeze(-1)
        return scores.reshape(len(features), -1, *features.shape[-2:])


def cosine_map(features: Tensor, directions: Tensor, origin: Tensor | None = None) -> Tensor:
    """Multiply unit features with directions. Neither the unit features nor the moved ones are ever made.

    Args:
        features: ``[B, D, H, W]``.
        directions: ``[B, N, D]``, from :func:`mean_direction`.
        origin: ``[D]``, what to subtract from the features first.

    Returns:
        ``[B, N, H, W]`` in ``[-1, 1]``.
    """
    with no_autocast(features.device):
        scores = dot_map(features, directions, origin)
        lengths = pixel_length(full_precision(features).flatten(2), origin)
        lengths = lengths.reshape(len(features), 1, *features.shape[-2:])
        far = lengths > 1e-12
        return scores / torch.where(far, lengths, torch.ones_like(lengths)) * far


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
    return (masked_mean(contexts, valid) - masked_mean(instances, stored)) * both
