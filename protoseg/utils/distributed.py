"""Collectives that ask for the process group when they are called and are the identity outside one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes in the default group, 1 outside one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_with_gradient(value: Tensor) -> Tensor:
    """Concatenate ``value`` of every rank along axis 0; the gradient goes back to the rank that each row came from.

    Args:
        value: ``[n, ...]``, of the same shape on every rank.

    Returns:
        ``[world_size * n, ...]``; ``value`` itself outside a process group.
    """
    if world_size() == 1:
        return value
    gathered: Tensor = _Gather.apply(value)
    return gathered


class _Gather(torch.autograd.Function):
    """That of torch.distributed.nn is deprecated, and what takes its place is not in every version."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.rows = len(value)
        return all_gather(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        first = dist.get_rank() * ctx.rows
        return total[first : first + ctx.rows]


def mean_gradient(parameter: Tensor) -> Tensor:
    """Return ``parameter``, whose gradient becomes the mean over the ranks, as for one that DDP knows."""
    if world_size() == 1:
        return parameter
    shared: Tensor = _MeanGradient.apply(parameter)
    return shared


class _MeanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / world_size()


@torch.no_grad()
def broadcast(value: Tensor) -> None:
    """Give every rank the values of rank 0, in place."""
    if world_size() > 1:
        dist.broadcast(value, 0)


@torch.no_grad()
def all_gather(value: Tensor) -> Tensor:
    """Concatenate ``value`` of every rank along axis 0, in rank order, without gradient.

    All ranks must pass the same shape and dtype, which is what the modules do: they gather whole batches with a
    validity mask, never a number of rows that depends on the data. Under DDP every rank has the same batch size.

    Args:
        value: ``[n, ...]``.

    Returns:
        ``[world_size * n, ...]``; ``value`` itself outside a process group.
    """
    world = world_size()
    if world == 1:
        return value
    value = value.contiguous()
    parts = [torch.empty_like(value) for _ in range(world)]
    dist.all_gather(parts, value)
    return torch.cat(parts)


@torch.no_grad()
def all_sum(value: Tensor) -> Tensor:
    """Sum ``value`` over the ranks, without gradient.

    Args:
        value: Of the same shape on every rank.

    Returns:
        Likewise; ``value`` itself outside a process group.
    """
    if world_size() == 1:
        return value
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
