"""SupportBank: rings of instances, the contexts that they are clustered into, and the statistics of all pixels.

Copying the state and updating it are custom operators, opaque to ``torch.compile``: whether a step refreshes the
contexts depends on a counter in the state, which a traced graph cannot branch on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from protoseg.functional import kmeans, prototype_shift
from protoseg.modules.statistics import factorize, measure, to_space
from protoseg.utils import distributed
from protoseg.utils.numeric import full_precision, masked_mean

__all__ = ["BankState", "Statistics", "SupportBank", "push"]

Statistics = Literal["covariance", "variance", "mean", "none"]


class BankState(NamedTuple):
    """What forward and backward read of a bank, as it was before the update of the same pass.

    Attributes:
        contexts: ``[R, K, D]``.
        context_valid: ``[R, K]`` bool, the contexts that there are.
        shift: ``[R, D]``, mean context minus mean instance of each row.
        midpoint: ``[D]``, half way between the mean of the classes' mean instances and the mean instance of background;
            0 while one of them has none, or where background has no row.
        mean: ``[D]``, of all pixels.
        factor: ``[D, D]``, ``[D]`` or ``[0]``, see :mod:`protoseg.modules.statistics`.
    """

    contexts: Tensor
    context_valid: Tensor
    shift: Tensor
    midpoint: Tensor
    mean: Tensor
    factor: Tensor


class _Memory(NamedTuple):
    """All buffers that the update changes, by their names."""

    instances: Tensor
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
    step: Tensor
    seal: Tensor


class SupportBank(nn.Module):
    r"""Per class a ring with the last instances, contexts made of them by k-means, and what all pixels are like.

    A row is a class; background, where it has contexts, has the last one. All state is in buffers, and each rank of a
    process group writes the same.

    Moving averages of a network's *buffers* mix the instances of different steps, and what comes out is no bank;
    :meth:`check_whole` notices it. ``AveragedModel`` without ``use_buffers`` copies buffers, and so is right.

    Args:
        num_classes: ``C``.
        dim: ``D``.
        capacity: ``Q``, instances kept per row.
        num_contexts: Of a class.
        background_contexts: Of background; 0: it has no row.
        statistics: What is kept of the pixels: their mean and ``"covariance"``, mean and each channel's
            ``"variance"``, the ``"mean"`` alone, or ``"none"``.
        shrinkage: Of the covariance, above 0.
        device: Where the state lives.

    Attributes:
        instances: ``[R, Q, D]`` rings.
        pointer: ``[R]`` int64, where each ring writes next.
        stored: ``[R]`` int64, how many places are filled.
        contexts: See :class:`BankState`, likewise ``context_valid``, ``shift``, ``midpoint``, ``mean`` and ``factor``.
        weight: ``[]``, how many pictures mean and covariance stand for.
        covariance: ``[D, D]``, ``[D]`` or ``[0]``.
        step: ``[]`` int64, updates so far.
        seal: ``[]`` int64, the square of ``step``, which an average is not.
        layout: ``[2]`` int64, the classes and the contexts of background, which the shapes do not tell apart.

    Example:
        >>> memory = SupportBank(2, 4, capacity=8, num_contexts=1, background_contexts=3)
        >>> instances, features = torch.rand(5, 3, 4), torch.rand(5, 4, 6, 6)
        >>> memory.store(instances, torch.ones(5, 3).bool(), features, torch.ones(5).bool(), refresh_every=1)
        >>> memory.stored.tolist(), memory.context_valid.sum(1).tolist()
        ([5, 5, 5], [1, 1, 3])
    """

    instances: Tensor
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
    step: Tensor
    seal: Tensor
    layout: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        capacity: int,
        num_contexts: int,
        background_contexts: int = 0,
        statistics: Statistics = "variance",
        shrinkage: float = 0.5,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self._sizes = (num_classes, num_contexts, background_contexts)
        self._statistics: Statistics = statistics
        self.shrinkage = shrinkage

        rows = num_classes + (background_contexts > 0)
        most = max(num_contexts, background_contexts)
        spread = {"covariance": (dim, dim), "variance": (dim,)}.get(statistics, (0,))
        floats: dict[str, Any] = {"device": device}
        counts: dict[str, Any] = {"dtype": torch.long, "device": device}
        self.register_buffer("instances", torch.zeros(rows, capacity, dim, **floats))
        self.register_buffer("pointer", torch.zeros(rows, **counts))
        self.register_buffer("stored", torch.zeros(rows, **counts))
        self.register_buffer("contexts", torch.zeros(rows, most, dim, **floats))
        self.register_buffer("context_valid", torch.zeros(rows, most, dtype=torch.bool, device=device))
        self.register_buffer("shift", torch.zeros(rows, dim, **floats))
        self.register_buffer("midpoint", torch.zeros(dim, **floats))
        self.register_buffer("weight", torch.zeros((), **floats))
        self.register_buffer("mean", torch.zeros(dim, **floats))
        self.register_buffer("covariance", torch.zeros(spread, **floats))
        self.register_buffer("factor", torch.zeros(spread, **floats))
        self.register_buffer("step", torch.zeros((), **counts))
        self.register_buffer("seal", torch.zeros((), **counts))
        self.register_buffer("layout", torch.zeros(2, **counts))
        self.reset_parameters()

    @property
    def num_contexts(self) -> int:
        """Contexts of a class."""
        return self._sizes[1]

    @property
    def background_contexts(self) -> int:
        """Contexts of background; 0: it has no row."""
        return self._sizes[2]

    @property
    def capacity(self) -> int:
        """Instances that a ring holds."""
        return self.instances.shape[1]

    def reset_parameters(self) -> None:
        """Empty the rings, and forget the contexts and the statistics."""
        for buffer in self.buffers():
            buffer.zero_()
        if self.factor.dim() == 2:
            self.factor.fill_diagonal_(1.0)
        else:
            self.factor.fill_(1.0)
        self.layout[0], self.layout[1] = self._sizes[0], self._sizes[2]

    def empty_rings(self) -> None:
        """Forget the instances alone."""
        self.pointer.zero_()
        self.stored.zero_()

    def snapshot(self) -> BankState:
        """Copy what a pass reads, before its update changes it in place while the backward pass still needs it."""
        read = [self.contexts, self.context_valid, self.shift, self.midpoint, self.mean, self.factor]
        return BankState(*_copy(read))

    def store(
        self,
        instances: Tensor,
        valid: Tensor,
        features: Tensor,
        counted: Tensor,
        *,
        measured: bool = True,
        retain: float = 1.0,
        refresh_every: int = 0,
    ) -> None:
        """Store the instances and pixels of all ranks, count the step and, when it is due, refresh the contexts.

        Args:
            instances: ``[B, R, D]``, one row per class and, last, one for background where it has a row.
            valid: ``[B, R]`` bool, the instances to store.
            features: ``[B, D, H, W]``, whose pixels go into the statistics.
            counted: ``[B]`` bool, of which pictures.
            measured: Whether the pixels go into the statistics.
            retain: Share of their weight that the pixels before keep then, in 0..1.
            refresh_every: Contexts are refreshed in the first update and every so many after it; 0: not now.
        """
        options = (measured and self._statistics != "none", retain, refresh_every, self.shrinkage)
        _update(list(self._memory()), instances, valid, features, counted, *options, *self._sizes[1:])

    def refresh(self) -> None:
        """Cluster the rings into contexts now."""
        _refresh(self._memory(), self.shrinkage, *self._sizes[1:])

    def restart_schedule(self, refresh_every: int) -> None:
        """Refresh in the next update, however many there were; to be called once something is stored."""
        # Not 0, which says that nothing is.
        self.step.fill_(refresh_every)
        self.seal.fill_(refresh_every**2)

    def check_whole(self, where: str) -> None:
        """Look whether the state is that of one bank, not an average of several; waits for the device.

        Raises:
            RuntimeError: It is an average.
        """
        step = int(self.step)
        if int(self.seal) != step**2 or (step == 0 and bool(self.context_valid.any())):
            raise RuntimeError(
                f"{where}: the state is an average of several banks, as moving averages of a network's buffers are; "
                "copy it with load_state_dict from the bank that was trained, or fill() this one anew"
            )

    def _memory(self) -> _Memory:
        return _Memory(*(getattr(self, name) for name in _Memory._fields))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SupportBank:
        """Move the module, but keep sums over all pixels in full precision in a bank of half precision."""
        names = ("weight", "mean", "covariance", "factor")
        before = {name: self._buffers[name] for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = full_precision(old).to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        me = type(self).__name__
        advice = "construct the module with the sizes, score and background that the checkpoint was made with"
        for name in ("instances", "contexts", "covariance", "layout"):
            theirs, ours = state_dict.get(prefix + name), getattr(self, name)
            if theirs is not None and theirs.shape != ours.shape:
                raise RuntimeError(
                    f"{me}: the state_dict's {name} is {tuple(theirs.shape)} and this module's is "
                    f"{tuple(ours.shape)}; {advice}"
                )

        layout, mine = state_dict.get(prefix + "layout"), [self._sizes[0], self._sizes[2]]
        if layout is not None and layout.tolist() != mine:
            raise RuntimeError(
                f"{me}: the state_dict is of (classes, background's contexts) {tuple(layout.tolist())} and this module "
                f"has {tuple(mine)}; {advice}"
            )

        weight, step = (state_dict.get(prefix + name, torch.zeros(())) for name in ("weight", "step"))
        if bool(step > 0) and bool(weight > 0) != (self._statistics != "none"):
            kept = "no " if self._statistics != "none" else ""
            raise RuntimeError(f"{me}: the state_dict has {kept}statistics of pixels; {advice}")
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.library.custom_op("protoseg::copy_bank", mutates_args=())
def _copy(state: list[Tensor]) -> list[Tensor]:
    """Clone tensors; an operator of its own because a compiler may drop a plain copy, or put it off until backward."""
    return [each.clone() for each in state]


@_copy.register_fake
def _(state: list[Tensor]) -> list[Tensor]:
    return [each.clone() for each in state]


@torch.library.custom_op("protoseg::update_bank", mutates_args=("memory",))
def _update(
    memory: list[Tensor],
    instances: Tensor,
    valid: Tensor,
    features: Tensor,
    counted: Tensor,
    measured: bool,
    retain: float,
    refresh_every: int,
    shrinkage: float,
    num_contexts: int,
    background_contexts: int,
) -> None:
    bank = _Memory(*memory)
    arrived, which = distributed.all_gather(instances), distributed.all_gather(valid)
    push(arrived, which, bank.instances, bank.pointer, bank.stored)
    if measured:
        measure(features, counted, bank.weight, bank.mean, bank.covariance, retain)

    if refresh_every and int(bank.step) % refresh_every == 0:
        _refresh(bank, shrinkage, num_contexts, background_contexts)
    bank.step.add_(1)
    bank.seal.copy_(bank.step.square())


@_update.register_fake
def _(
    memory: list[Tensor],
    instances: Tensor,
    valid: Tensor,
    features: Tensor,
    counted: Tensor,
    measured: bool,
    retain: float,
    refresh_every: int,
    shrinkage: float,
    num_contexts: int,
    background_contexts: int,
) -> None:
    return None


@torch.no_grad()
def push(instances: Tensor, valid: Tensor, rings: Tensor, pointer: Tensor, count: Tensor) -> None:
    """Write the valid instances behind each row's pointer, in order, the newest over the oldest.

    Args:
        instances: ``[B, R, D]``.
        valid: ``[B, R]`` bool.
        rings: ``[R, Q, D]``, changed in place, like ``pointer`` and ``count``.
        pointer: ``[R]``.
        count: ``[R]``.
    """
    capacity = rings.shape[1]
    order = valid.long().cumsum(0)
    arriving = order[-1]
    # Of more arrivals than the ring holds only the last ones survive: writing the others would be a race.
    keep = valid & (arriving - order < capacity)
    slot = (pointer + order - 1) % capacity
    rows = torch.arange(rings.shape[0], device=rings.device).expand_as(slot)

    rings[rows[keep], slot[keep]] = instances[keep].to(rings.dtype)
    pointer.copy_((pointer + arriving) % capacity)
    count.copy_((count + arriving).clamp_max(capacity))


@torch.no_grad()
def _refresh(memory: _Memory, shrinkage: float, num_contexts: int, background_contexts: int) -> None:
    """Factor the covariance, cluster every ring into contexts, and find each row's shift and the midpoint, in place."""
    contexts, context_valid = memory.contexts, memory.context_valid
    memory.factor.copy_(factorize(memory.covariance, shrinkage))

    # Rings fill from place 0: places that no row has reached yet need not be looked at.
    filled = max(1, int(memory.stored.max()))
    points = memory.instances[:, :filled]
    stored = torch.arange(filled, device=points.device) < memory.stored.unsqueeze(-1)
    contexts.zero_()
    context_valid.zero_()
    classes = len(points) - (background_contexts > 0)
    for part, size in ((slice(classes), num_contexts), (slice(classes, None), background_contexts)):
        if size:
            members, valid = _clusters(points[part], stored[part], memory.factor, size)
            contexts[part, :size], context_valid[part, :size] = members, valid

    memory.shift.copy_(prototype_shift(contexts, context_valid, points, stored))
    if background_contexts:
        means, known = masked_mean(points, stored), memory.stored > 0
        between = (masked_mean(means[:-1], known[:-1]) + means[-1]) / 2
        memory.midpoint.copy_(between * (known[:-1].any() & known[-1]))


def _clusters(points: Tensor, stored: Tensor, factor: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cluster in the space of ``factor``; the means ``[R, K, D]`` of the clusters' points, and which there are."""
    found = kmeans(to_space(points, factor), stored, num_clusters=size)
    member = torch.nn.functional.one_hot(found.assignment, size).bool() & stored.unsqueeze(-1)
    return masked_mean(points.unsqueeze(1), member.transpose(1, 2)), found.valid
