"""Mean and covariance of all pixels that a bank has seen, and the change of coordinates that they give.

The covariance is ``[D, D]`` (``"whitened"``), its diagonal ``[D]`` (``"diagonal"``) or empty ``[0]``; its shape says
which.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protoseg.utils import distributed
from protoseg.utils.numeric import no_autocast

__all__ = ["factorize", "from_space", "measure", "to_space"]


@torch.no_grad()
def measure(features: Tensor, counted: Tensor, weight: Tensor, mean: Tensor, covariance: Tensor, retain: float) -> None:
    r"""Add the pixels of all ranks to the statistics, in place (Chan, Golub and LeVeque, 1979).

    .. math::
        m' = m + \tfrac{n}{w + n} (b - m), \qquad
        \Sigma' = \frac{w \Sigma + S}{w + n} + \frac{w n}{(w + n)^2} (b - m)(b - m)^\top

    with the arrivals' weight :math:`n`, their mean :math:`b` and their scatter :math:`S` around it. A pixel weighs one
    over the pixels of its picture, so that all pictures weigh the same, whatever their sizes; one that is not finite,
    and a picture that is not ``counted``, weigh nothing.

    Args:
        features: ``[B, D, H, W]``.
        counted: ``[B]`` bool.
        weight: ``[]``, how many pictures the statistics stand for.
        mean: ``[D]``.
        covariance: ``[D, D]``, ``[D]`` or ``[0]``.
        retain: Share of the old weight that stays, in 0..1.
    """
    pixels = features.transpose(0, 1).flatten(1).to(mean.dtype)
    area = features.shape[-2] * features.shape[-1]
    weights = (counted.to(mean.dtype) / area).repeat_interleave(area) * pixels.sum(0).isfinite()
    pixels = torch.where(weights > 0, pixels, torch.zeros_like(pixels))

    with no_autocast(features.device):
        arrived = distributed.all_sum(weights.sum())
        total = distributed.all_sum(pixels @ weights)
        center = total / torch.where(arrived > 0, arrived, torch.ones_like(arrived))
        around = (pixels - center.unsqueeze(-1)) * weights.sqrt()
        if covariance.dim() == 2:
            scatter = around @ around.T
        elif len(covariance):
            scatter = around.square().sum(1)
        else:
            scatter = torch.zeros_like(covariance)
    scatter = distributed.all_sum(scatter)

    # Finite pixels may overflow in a square; what cannot be held leaves everything as it was.
    usable = (arrived > 0) & total.isfinite().all() & scatter.isfinite().all()
    old = weight * retain
    after = torch.where(usable, old + arrived, torch.ones_like(old))
    step = center - mean
    if len(covariance):
        outer = torch.outer(step, step) if covariance.dim() == 2 else step.square()
        merged = (old * covariance + scatter) / after + old * arrived / after.square() * outer
        covariance.copy_(torch.where(usable, merged, covariance))
    mean.copy_(torch.where(usable, mean + arrived / after * step, mean))
    weight.copy_(torch.where(usable, after, weight))


@torch.no_grad()
def factorize(covariance: Tensor, shrinkage: float) -> Tensor:
    r"""Factor :math:`\Sigma + \lambda \bar\sigma^2 I = L L^\top`, with the mean variance :math:`\bar\sigma^2`.

    Args:
        covariance: ``[D, D]``, ``[D]`` or ``[0]``.
        shrinkage: :math:`\lambda` above 0.

    Returns:
        Lower triangular ``[D, D]``, deviations ``[D]``, or ``[0]``. Where nothing varies: as if all variances were 1.
    """
    if not len(covariance):
        return covariance.clone()
    variances = covariance.diagonal() if covariance.dim() == 2 else covariance
    size = variances.mean()
    ridge = torch.where(size > 0, shrinkage * size, torch.ones_like(size))
    if covariance.dim() == 1:
        return (covariance + ridge).sqrt()
    lower: Tensor = torch.linalg.cholesky(covariance + torch.diag(ridge.expand(len(covariance))))
    return lower


def to_space(vectors: Tensor, factor: Tensor) -> Tensor:
    r"""Coordinates in which pixels vary alike in all directions, :math:`L^{-1} v`.

    Args:
        vectors: ``[..., D]``.
        factor: From :func:`factorize`.

    Returns:
        ``[..., D]``.
    """
    if factor.dim() == 2:
        solved: Tensor = torch.linalg.solve_triangular(factor, vectors.flatten(0, -2).T, upper=False)
        return solved.T.reshape(vectors.shape)
    return vectors / factor if len(factor) else vectors


def from_space(directions: Tensor, factor: Tensor) -> Tensor:
    r"""Turn directions so that their product with a vector is that of the two in the space, :math:`L^{-\top} u`.

    Args:
        directions: ``[..., D]``.
        factor: From :func:`factorize`.

    Returns:
        ``[..., D]``.
    """
    if factor.dim() == 2:
        solved: Tensor = torch.linalg.solve_triangular(factor.T, directions.flatten(0, -2).T, upper=True)
        return solved.T.reshape(directions.shape)
    return directions / factor if len(factor) else directions
