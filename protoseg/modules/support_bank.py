"""The support bank's memory: writing instances into the rings and clustering the rings into contexts.

Copying the state and updating it are custom operators, opaque to ``torch.compile``: whether a step refreshes the
contexts depends on a counter in the state, which a traced graph cannot branch on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from protoseg.functional import kmeans, prototype_shift
from protoseg.modules.statistics import factorize, measure, to_space
from protoseg.utils import distributed
from protoseg.utils.numeric import masked_mean


@torch.library.custom_op("protoseg::snapshot", mutates_args=())
def snapshot(
    contexts: Tensor, context_valid: Tensor, shift: Tensor, midpoint: Tensor, mean: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Copy what forward and backward read of the state, before the update changes it in place.

    An operator of its own because a compiler may drop a plain copy, or put it off until the backward pass.
    """
    return contexts.clone(), context_valid.clone(), shift.clone(), midpoint.clone(), mean.clone(), factor.clone()


@snapshot.register_fake
def _(
    contexts: Tensor, context_valid: Tensor, shift: Tensor, midpoint: Tensor, mean: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return contexts.clone(), context_valid.clone(), shift.clone(), midpoint.clone(), mean.clone(), factor.clone()


class Memory(NamedTuple):
    """The bank's buffers but its counter of steps; functions here change them in place.

    Attributes:
        bank: ``[R, Q, D]`` rings.
        pointer: ``[R]`` int64, where each ring writes next.
        stored: ``[R]`` int64, how many places are filled.
        contexts: ``[R, K, D]``.
        context_valid: ``[R, K]`` bool.
        shift: ``[R, D]``.
        midpoint: ``[D]``, half way between the mean of the classes' mean instances and the mean instance of background;
            0 while one of them has none, or where background has no row.
        weight: ``[]``, how many pictures mean and covariance stand for.
        mean: ``[D]``.
        covariance: ``[D, D]``, ``[D]`` or ``[0]``.
        factor: Likewise.
    """

    bank: Tensor
    pointer: Tensor
    stored: Tensor
    contexts: Tensor
    context_valid: Tensor
    shift: Tensor
    midpoint: Tensor
    weight: Tensor
    mean: Tensor
    covariance: Tensor
    factor: Tensor


@torch.library.custom_op("protoseg::update_bank", mutates_args=(*Memory._fields, "step"))
def update_bank(
    instances: Tensor,
    valid: Tensor,
    features: Tensor,
    counted: Tensor,
    bank: Tensor,
    pointer: Tensor,
    stored: Tensor,
    contexts: Tensor,
    context_valid: Tensor,
    shift: Tensor,
    midpoint: Tensor,
    weight: Tensor,
    mean: Tensor,
    covariance: Tensor,
    factor: Tensor,
    step: Tensor,
    measured: bool,
    retain: float,
    refresh_every: int,
    shrinkage: float,
    num_contexts: int,
    background_contexts: int,
) -> None:
    """Store the instances and pixels of all ranks, count the step and, when it is due, refresh the contexts.

    Args:
        instances: ``[B, R, D]``, one row per class and, last, one for background where it has a bank.
        valid: ``[B, R]`` bool, the instances to store.
        features: ``[B, D, H, W]``, whose pixels go into the statistics.
        counted: ``[B]`` bool, of which pictures.
        bank: See :class:`Memory`.
        pointer: See :class:`Memory`.
        stored: See :class:`Memory`.
        contexts: See :class:`Memory`.
        context_valid: See :class:`Memory`.
        shift: See :class:`Memory`.
        midpoint: See :class:`Memory`.
        weight: See :class:`Memory`.
        mean: See :class:`Memory`.
        covariance: See :class:`Memory`.
        factor: See :class:`Memory`.
        step: ``[]`` int64, updates so far.
        measured: Whether to measure them.
        retain: Share of ``weight`` that stays then.
        refresh_every: Contexts are refreshed in the first update and every so many after it; 0: not now.
        shrinkage: Of the covariance.
        num_contexts: Of a class.
        background_contexts: Of background, 0 where it has no bank.
    """
    push(distributed.all_gather(instances), distributed.all_gather(valid), bank, pointer, stored)
    if measured:
        measure(features, counted, weight, mean, covariance, retain)

    if refresh_every and int(step) % refresh_every == 0:
        rings = (bank, pointer, stored, contexts, context_valid, shift, midpoint)
        refresh(Memory(*rings, weight, mean, covariance, factor), shrinkage, num_contexts, background_contexts)
    step += 1


@update_bank.register_fake
def _(
    instances: Tensor,
    valid: Tensor,
    features: Tensor,
    counted: Tensor,
    bank: Tensor,
    pointer: Tensor,
    stored: Tensor,
    contexts: Tensor,
    context_valid: Tensor,
    shift: Tensor,
    midpoint: Tensor,
    weight: Tensor,
    mean: Tensor,
    covariance: Tensor,
    factor: Tensor,
    step: Tensor,
    measured: bool,
    retain: float,
    refresh_every: int,
    shrinkage: float,
    num_contexts: int,
    background_contexts: int,
) -> None:
    return None


@torch.no_grad()
def push(instances: Tensor, valid: Tensor, bank: Tensor, pointer: Tensor, count: Tensor) -> None:
    """Write the valid instances behind each class's pointer, in order, the newest over the oldest.

    Args:
        instances: ``[B, R, D]``.
        valid: ``[B, R]`` bool.
        bank: ``[R, Q, D]``, changed in place, like ``pointer`` and ``count``.
        pointer: ``[R]``.
        count: ``[R]``.
    """
    capacity = bank.shape[1]
    order = valid.long().cumsum(0)
    arriving = order[-1]
    # Of more arrivals than the ring holds only the last ones survive: writing the others would be a race.
    keep = valid & (arriving - order < capacity)
    slot = (pointer + order - 1) % capacity
    rows = torch.arange(bank.shape[0], device=bank.device).expand_as(slot)
    bank[rows[keep], slot[keep]] = instances[keep].to(bank.dtype)
    pointer.copy_((pointer + arriving) % capacity)
    count.copy_((count + arriving).clamp_max(capacity))


@torch.no_grad()
def refresh(memory: Memory, shrinkage: float, num_contexts: int, background_contexts: int) -> None:
    """Factor the covariance, cluster every ring into contexts, and find each class's shift and the midpoint, in place.

    Args:
        memory: Of which this changes ``factor``, ``contexts``, ``context_valid``, ``shift`` and ``midpoint``.
        shrinkage: Of the covariance.
        num_contexts: Of a class.
        background_contexts: Of background, which then has the last row; 0 where it has none.
    """
    bank, count, contexts, context_valid = memory.bank, memory.stored, memory.contexts, memory.context_valid
    memory.factor.copy_(factorize(memory.covariance, shrinkage))

    # Rings fill from place 0: places that no class has reached yet need not be looked at.
    filled = max(1, int(count.max()))
    points = bank[:, :filled]
    stored = torch.arange(filled, device=bank.device) < count.unsqueeze(-1)
    contexts.zero_()
    context_valid.zero_()
    classes = len(bank) - (background_contexts > 0)
    for part, size in ((slice(classes), num_contexts), (slice(classes, None), background_contexts)):
        if size:
            members, valid = _clusters(points[part], stored[part], memory.factor, size)
            contexts[part, :size], context_valid[part, :size] = members, valid

    memory.shift.copy_(prototype_shift(contexts, context_valid, points, stored))
    if background_contexts:
        means, known = masked_mean(points, stored), count > 0
        between = (masked_mean(means[:-1], known[:-1]) + means[-1]) / 2
        memory.midpoint.copy_(between * (known[:-1].any() & known[-1]))


def _clusters(points: Tensor, stored: Tensor, factor: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cluster in the space of ``factor``; the means ``[R, K, D]`` of the clusters' points, and which there are."""
    found = kmeans(to_space(points, factor), stored, num_clusters=size)
    member = torch.nn.functional.one_hot(found.assignment, size).bool() & stored.unsqueeze(-1)
    return masked_mean(points.unsqueeze(1), member.transpose(1, 2)), found.valid
