"""Expectation-maximization of one mixture per image, all images at once, without gradient."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from protoseg.utils import checks
from protoseg.utils.numeric import full_precision, no_autocast, unit

Kernel = Literal["dot", "gaussian", "cosine"]
_TINY = 1e-12  # below it a share or a length is none


class Mixture(NamedTuple):
    """What :func:`em` finds.

    Attributes:
        prototypes: ``[B, K, D]``; of unit length under ``"dot"`` and ``"cosine"``.
        responsibilities: ``[B, L, K]``, the shares of each token in the prototypes by the last E-step: they sum to 1
            over ``K``, or are 0 for a token that the mask leaves out.
    """

    prototypes: Tensor
    responsibilities: Tensor


@torch.no_grad()
def em(
    tokens: Tensor,
    centers: Tensor,
    mask: Tensor | None = None,
    *,
    iterations: int = 10,
    kernel: Kernel = "dot",
    bandwidth: float | Tensor = 1.0,
    hard: bool = False,
) -> Mixture:
    r"""Fit the prototypes of each image's tokens by EM (PGSeg, arXiv 2310.19001, section 4.1).

    .. math::
        \text{E:}\quad r_{lk} = \mathrm{softmax}_k\, \kappa(x_l, \mu_k) / b \qquad
        \text{M:}\quad \mu_k = \sum_l r_{lk} x_l \Big/ \sum_l r_{lk}

    with :math:`\kappa` one of :math:`\langle x, \mu \rangle` (``"dot"``, as published), :math:`-\|x - \mu\|^2 / 2`
    (``"gaussian"``) and :math:`\cos(x, \mu)` (``"cosine"``, of which the M-step averages directions). Under ``"dot"``
    and ``"cosine"`` the means are then scaled to unit length. Under ``"gaussian"`` they are not: this is EM of a
    mixture of equal shares with covariance :math:`b I`, whose likelihood never falls.

    The bandwidth decides between sharing and collapse: for tokens of unit length and ``"dot"``, all prototypes become
    one at 1 and stay apart at 0.1.

    Where there are fewer tokens than ``2 D`` the rounds run on the tokens' Gram matrix: the means are combinations of
    tokens, so :math:`\langle x_l, \mu_k \rangle` and :math:`\|\mu_k\|` are too, exactly, at a fraction of the work.

    Args:
        tokens: ``[B, L, D]``.
        centers: ``[K, D]`` or ``[B, K, D]``, where the prototypes start.
        mask: ``[B, L]`` bool, the tokens that count; all where not given. What it leaves out may be anything.
        iterations: Rounds of E and M, at least 1.
        kernel: :math:`\kappa`.
        bandwidth: :math:`b` above 0, a number or ``[B]``.
        hard: Give each token whole to its best prototype: k-means with this similarity.

    Returns:
        :class:`Mixture`. A prototype without a share in any token goes back to where it started.

    Raises:
        ValueError: Wrong shape, unknown kernel, ``iterations`` below 1, or a bandwidth that is not above 0.

    Example:
        >>> tokens = torch.tensor([[[1.0, 0.1], [1.0, -0.1], [0.1, 1.0]]])
        >>> fitted = em(tokens, torch.eye(2), bandwidth=0.1)
        >>> fitted.responsibilities.round().tolist()
        [[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]
    """
    checks.shape("em", "tokens", tokens, ("B", "L", "D"))
    checks.not_empty("em", "tokens", tokens)
    batch, length, dim = tokens.shape
    checks.shape("em", "centers", centers, (*((batch,) if centers.dim() == 3 else ()), "K", dim))
    checks.choice("em", "kernel", kernel, get_args(Kernel))
    if iterations < 1:
        raise ValueError(f"em: iterations must be at least 1, got {iterations}")
    if not isinstance(bandwidth, Tensor):
        checks.positive("em", "bandwidth", bandwidth)
    if mask is not None:
        checks.shape("em", "mask", mask, (batch, length))

    with no_autocast(tokens.device):
        tokens, centers = full_precision(tokens), full_precision(centers)
        if mask is not None:
            tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
        if kernel == "cosine":
            tokens, centers = unit(tokens), unit(centers)

        sharpness = 1 / bandwidth
        if isinstance(sharpness, Tensor):
            sharpness = sharpness.to(tokens.dtype).reshape(-1, 1, 1)
        return _rounds(tokens, centers.expand(batch, -1, -1), mask, iterations, kernel, sharpness, hard)


def _rounds(
    tokens: Tensor,
    start: Tensor,
    mask: Tensor | None,
    iterations: int,
    kernel: Kernel,
    sharpness: float | Tensor,
    hard: bool,
) -> Mixture:
    """Run EM with shares as ``[B, K, L]``: with few prototypes a softmax across them is faster along the tokens."""
    length, dim = tokens.shape[1:]
    gram = tokens @ tokens.transpose(1, 2) if length < 2 * dim and iterations > 2 else None

    # <mu, x> and |mu|^2, both times the sharpness; [B, K, L] and [B, K, 1].
    first, began = _compared(tokens, start, kernel, sharpness)
    inner, squared = first, began

    for _ in range(iterations - 1):
        shares = _shares(inner, squared, mask, hard)
        if gram is None:
            inner, squared = _compared(tokens, _means(tokens, shares, kernel, start), kernel, sharpness)
            continue

        # mu = X^T r / z with z the mass or the length, so <x, mu> = (X X^T r) / z and |X^T r|^2 = r^T X X^T r.
        reached = shares @ gram
        norms = (shares * reached).sum(-1, keepdim=True).clamp_min_(0.0)
        size = shares.sum(-1, keepdim=True) if kernel == "gaussian" else norms.sqrt()
        lost, size = size <= _TINY, size.clamp_min(_TINY)
        inner = reached.mul_(sharpness / size)
        if began is not None:
            squared = torch.where(lost, began, sharpness * norms / size.square())

        # Where asking costs nothing, a pass over all scores is saved: it is rare that a prototype loses all its tokens.
        if torch.compiler.is_compiling() or lost.device.type != "cpu" or bool(lost.any()):
            inner = torch.where(lost, first, inner)

    shares = _shares(inner, squared, mask, hard)
    return Mixture(_means(tokens, shares, kernel, start), shares.transpose(1, 2))


def _compared(
    tokens: Tensor, centers: Tensor, kernel: Kernel, sharpness: float | Tensor
) -> tuple[Tensor, Tensor | None]:
    inner = (centers @ tokens.transpose(1, 2)).mul_(sharpness)
    return inner, sharpness * centers.square().sum(-1, keepdim=True) if kernel == "gaussian" else None


def _shares(inner: Tensor, squared: Tensor | None, mask: Tensor | None, hard: bool) -> Tensor:
    """E-step: ``[B, K, L]``."""
    # The token's own |x|^2 is the same for all prototypes, so that the softmax does not see it.
    scores = inner if squared is None else inner - squared / 2
    best = scores.argmax(1, keepdim=True) if hard else None
    shares = scores.softmax(1) if best is None else torch.zeros_like(scores).scatter_(1, best, 1.0)
    return shares if mask is None else shares * mask.unsqueeze(1)


def _means(tokens: Tensor, shares: Tensor, kernel: Kernel, start: Tensor) -> Tensor:
    """M-step: ``[B, K, D]``."""
    sums = shares @ tokens
    mass = kernel == "gaussian"
    size = shares.sum(-1, keepdim=True) if mass else torch.linalg.vector_norm(sums, dim=-1, keepdim=True)
    return torch.where(size <= _TINY, start, sums / size.clamp_min(_TINY))
