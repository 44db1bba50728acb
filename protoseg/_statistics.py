"""Mean and covariance of all pixels that a bank has seen, and the change of coordinates that they give.

The covariance is ``[D, D]`` (``"whitened"``), its diagonal ``[D]`` (``"diagonal"``) or empty ``[0]``; its shape says
which.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["factorize", "from_space", "merge", "moments", "to_space"]


@torch.no_grad()
def moments(features: Tensor, origin: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, sum and scatter of the pixels around ``origin``; one that is not finite counts nowhere.

    A pixel weighs one over the pixels of its picture, so that all pictures weigh the same, whatever their sizes.

    Args:
        features: ``[B, D, H, W]``.
        origin: ``[D]``.
        covariance: Of the shape that the scatter shall have.

    Returns:
        ``[]``, ``[D]``, and a scatter like ``covariance``.
    """
    share = 1.0 / (features.shape[-2] * features.shape[-1])
    pixels = features.flatten(2).transpose(0, 1).flatten(1).to(origin.dtype) - origin.unsqueeze(-1)
    finite = pixels.sum(0).isfinite()
    pixels = torch.where(finite, pixels, torch.zeros_like(pixels))

    if covariance.dim() == 2:
        scatter = pixels @ pixels.T
    elif len(covariance):
        scatter = pixels.square().sum(1)
    else:
        scatter = torch.zeros_like(covariance)
    return share * finite.sum().to(origin.dtype), share * pixels.sum(1), share * scatter


@torch.no_grad()
def merge(
    weight: Tensor, mean: Tensor, covariance: Tensor, count: Tensor, total: Tensor, scatter: Tensor, retain: float
) -> None:
    r"""Add pixels to the statistics, in place (Chan, Golub and LeVeque, 1979).

    .. math::
        m' = m + \tfrac{n}{w + n} d, \qquad
        \Sigma' = \frac{w \Sigma + S}{w + n} - \Bigl(\tfrac{n}{w + n}\Bigr)^2 d\,d^\top

    with the arrivals' weight :math:`n`, their mean :math:`m + d` and their scatter :math:`S` around the old mean.

    Args:
        weight: ``[]``, how many pictures the statistics stand for.
        mean: ``[D]``.
        covariance: ``[D, D]``, ``[D]`` or ``[0]``.
        count: ``[]``, as :func:`moments` returns it for the old mean, like the next two.
        total: ``[D]``.
        scatter: Like ``covariance``.
        retain: Share of the old weight that stays, in 0..1.
    """
    weight *= retain
    after = weight + count
    after = torch.where(after > 0, after, torch.ones_like(after))
    step = total / after

    if len(covariance):
        outer = torch.outer(step, step) if covariance.dim() == 2 else step.square()
        covariance.copy_((weight * covariance + scatter) / after - outer)
    mean += step
    weight += count


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
