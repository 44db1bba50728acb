"""Collectives that ask for the process group when they are called and are the identity outside one."""

from __future__ import annotations

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
    from torch.distributed.nn.functional import all_gather as gather

    parts: tuple[Tensor, ...] = gather(value.contiguous())  # type: ignore[no-untyped-call]
    return torch.cat(parts)


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
