"""One-to-one matching of group tokens and prototypes, and the contrast between the matched."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.utils import checks
from protoseg.utils.numeric import full_precision, no_autocast

Matching = Literal["hungarian", "greedy", "none"]


def match(similarity: Tensor, method: Matching = "hungarian") -> Tensor:
    r"""Give each group a prototype of its own so that the total similarity is largest.

    .. math:: \max_\sigma \sum_g s_{g \sigma(g)},\quad \sigma \text{ one-to-one}

    (PGSeg, arXiv 2310.19001, section 4.1.) The published code minimizes this sum; see
    :class:`protoseg.GMMPrototypeRegularizer`.

    On the CPU ``"hungarian"`` is scipy's solver, image by image; on CUDA it is that of torch-linear-assignment where
    that is installed (``pip install protoseg[cuda]``), which does not wait for the device, else scipy's. One opaque
    operator: ``torch.compile`` keeps its graph whole.

    Args:
        similarity: ``[B, G, K]``, finite.
        method: ``"hungarian"``, the optimum; ``"greedy"``, the largest similarity first; ``"none"``, for each group its
            best prototype, which others may have too.

    Returns:
        ``[B, G]`` int64, the prototype of each group; -1 for a group that is left over where ``G > K``.

    Raises:
        ValueError: Wrong shape or unknown method.

    Example:
        >>> match(torch.tensor([[[0.9, 0.8], [0.8, 0.1]]]))
        tensor([[1, 0]])
    """
    checks.shape("match", "similarity", similarity, ("B", "G", "K"))
    checks.not_empty("match", "similarity", similarity)
    checks.choice("match", "method", method, get_args(Matching))
    similarity = full_precision(similarity).detach()
    if method == "none":
        return similarity.argmax(-1)
    return greedy(similarity) if method == "greedy" else hungarian(similarity)


@torch.library.custom_op("protoseg::hungarian", mutates_args=())
def hungarian(similarity: Tensor) -> Tensor:
    """Solve the assignment of each image: ``[B, G, K]`` to ``[B, G]``."""
    similarity = similarity.nan_to_num(0.0)  # solvers stop, or never do
    if similarity.is_cuda and (solve := _cuda_solver()) is not None:
        found: Tensor = solve(-similarity).to(torch.int64)
        return found
    from scipy.optimize import linear_sum_assignment

    result = np.full(similarity.shape[:2], -1, dtype=np.int64)
    for scores, row in zip(similarity.cpu().numpy(), result, strict=True):
        groups, prototypes = linear_sum_assignment(scores, maximize=True)
        row[groups] = prototypes
    return torch.from_numpy(result).to(similarity.device)


@hungarian.register_fake
def _(similarity: Tensor) -> Tensor:
    return similarity.new_empty(similarity.shape[:2], dtype=torch.int64)


def _cuda_solver() -> Any:
    """torch-linear-assignment's batched solver, or None."""
    try:
        from torch_linear_assignment import batch_linear_assignment
    except ImportError:
        return None
    return batch_linear_assignment


def greedy(similarity: Tensor) -> Tensor:
    """Pair the most similar group and prototype, then of the rest, and so on: ``[B, G, K]`` to ``[B, G]``."""
    batch, groups, prototypes = similarity.shape
    left = similarity.flatten(1).clone()
    result = torch.full((batch, groups), -1, dtype=torch.int64, device=similarity.device)
    grid = left.view_as(similarity)
    for _ in range(min(groups, prototypes)):
        best = left.argmax(-1, keepdim=True)
        group, prototype = best // prototypes, best % prototypes
        result.scatter_(1, group, prototype)
        grid.scatter_(1, group.unsqueeze(-1).expand(-1, 1, prototypes), -torch.inf)
        grid.scatter_(2, prototype.unsqueeze(-1).expand(-1, groups, 1), -torch.inf)
    return result


def own_similarity(similarity: Tensor, matched: Tensor) -> Tensor:
    """Similarity of each group to its own prototype: ``[B, G]``; 0 for a group without one."""
    own = similarity.gather(-1, matched.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(matched >= 0, own, torch.zeros_like(own))


def symmetric_contrast(similarity: Tensor, matched: Tensor, keep: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    r"""Contrast matched groups and prototypes within each image, both ways.

    .. math::
        L = -\frac{1}{B} \sum_b \frac{1}{|P_b|} \sum_{(g, k) \in P_b} \left(
        \log \frac{e^{t s_{gk}}}{\sum_{k'} e^{t s_{gk'}}} + \log \frac{e^{t s_{gk}}}{\sum_{g'} e^{t s_{g'k}}} \right)

    over the kept pairs :math:`P_b` of each image; every prototype, or every group, of the image is a candidate (PGSeg,
    arXiv 2310.19001, section 4.1). The two directions are added, as in the published code, which takes one mean over
    the pairs of all images instead: that depends on how a batch is split over processes.

    Args:
        similarity: ``[B, G, K]``.
        matched: ``[B, G]`` int64, each group's prototype, or -1.
        keep: ``[B, G]`` bool, the pairs that count. A group without a prototype never counts.
        scale: :math:`t`, the inverse of the temperature.

    Returns:
        ``[]``; an image without a kept pair adds 0, which stays connected to the graph.

    Raises:
        ValueError: Wrong shape.

    Example:
        >>> similarity = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> loss = symmetric_contrast(similarity, torch.tensor([[0, 1]]), torch.tensor([[True, True]]), 10.0)
        >>> round(loss.item(), 6)
        9.1e-05
    """
    checks.shape("symmetric_contrast", "similarity", similarity, ("B", "G", "K"))
    for name, value in (("matched", matched), ("keep", keep)):
        checks.shape("symmetric_contrast", name, value, similarity.shape[:2])
    with no_autocast(similarity.device):
        logits = full_precision(similarity) * scale
        place = matched.clamp_min(0).unsqueeze(-1)
        over_prototypes = F.log_softmax(logits, -1).gather(-1, place).squeeze(-1)
        over_groups = F.log_softmax(logits, 1).gather(-1, place).squeeze(-1)
        weight = (keep & (matched >= 0)).to(logits.dtype)
        pairs = weight.sum(1).clamp_min(1.0)
        return -((weight * (over_prototypes + over_groups)).sum(1) / pairs).mean()
