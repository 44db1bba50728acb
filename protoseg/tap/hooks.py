"""Hooks that hold nothing alive, and that stay behind when a network is copied or saved."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["Hook", "evaluating", "runs_again", "unwrapped"]


class Hook:
    """Calls a method of its owner, as long as there is one.

    Args:
        owner: Whose method it is; not kept alive.
        method: Its name.
        first: Arguments that come before those of the hook.
    """

    def __init__(self, owner: object, method: str, *first: Any) -> None:
        self._owner = weakref.ref(owner)
        self._method = method
        self._first = first

    def __call__(self, *args: Any) -> None:
        """Pass the call on."""
        owner = self._owner()
        if owner is not None:
            getattr(owner, self._method)(*self._first, *args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # In a copy or a file there is no owner. What stands there instead takes any arguments, does nothing, and comes
        # from the standard library: a network that was saved must load where this library is not.
        return getattr, (contextlib.nullcontext(), "__exit__")


def runs_again() -> bool:
    """Whether this runs in a backward pass, where checkpointing computes layers again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside of data-parallel, sharded and compiled ones."""
    while True:
        inner = getattr(network, "_orig_mod", getattr(network, "_fsdp_wrapped_module", None))
        if isinstance(network, DataParallel | DistributedDataParallel):
            network = network.module
        elif isinstance(inner, nn.Module):
            network = inner
        else:
            return network


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put every layer into ``eval()`` without asking ``train()``, which some networks override, and back."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
