"""Which layers of a network run in a forward pass, in which order, and what they give."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from protoseg.tap.hooks import Hook, runs_again
from protoseg.tap.selectors import layers_of

__all__ = ["Ran", "Survey"]


class Ran(NamedTuple):
    """A layer that ran.

    Attributes:
        name: As in ``named_modules()``.
        layer: Itself.
        shape: Of its output, if that is one tensor.
    """

    name: str
    layer: nn.Module
    shape: tuple[int, ...] | None

    @property
    def is_map(self) -> bool:
        """Whether the output is a map or tokens, with more than one place."""
        if self.shape is None or len(self.shape) not in (3, 4):
            return False
        if len(self.shape) == 3:
            return self.shape[1] > 1
        return self.shape[-2:] != (1, 1)


class Survey:
    """Hooks on all layers for one forward pass; :meth:`remove` takes them away.

    Args:
        network: Whose layers.

    Attributes:
        ran: In the order in which they were done; a layer that runs again stands where it was done last.
    """

    def __init__(self, network: nn.Module) -> None:
        self._ran: dict[str, Ran] = {}
        self._handles = []
        known: set[nn.Module] = set()
        for name, layer in layers_of(network).items():
            if name and layer not in known:
                known.add(layer)
                self._handles.append(layer.register_forward_hook(Hook(self, "saw", name)))

    @property
    def ran(self) -> list[Ran]:
        """See the class."""
        return list(self._ran.values())

    def saw(self, name: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note that a layer is done."""
        if torch.compiler.is_compiling() or runs_again():
            return
        self._ran.pop(name, None)
        self._ran[name] = Ran(name, layer, tuple(output.shape) if isinstance(output, Tensor) else None)

    def between(self, first: str, last: str) -> list[Ran]:
        """Innermost layers that were done after one and before another, in order."""
        names = list(self._ran)
        if first not in names or last not in names:
            return []
        found = self.ran[names.index(first) + 1 : names.index(last)]
        # A layer around others is done behind them, and tells nothing more.
        inner = [*(each.name for each in found), last]
        return [each for each in found if not any(name.startswith(f"{each.name}.") for name in inner)]

    def near(self, name: str, count: int = 3) -> list[str]:
        """Layers that ran and are closest to one that did not: those in or around it, and its neighbors."""
        parts = name.split(".")

        def shared(other: str) -> int:
            same = 0
            for one, two in zip(parts, other.split("."), strict=False):
                if one != two:
                    break
                same += 1
            return same

        known = [each.name for each in self.ran if each.is_map] or list(self._ran)
        inside = [each for each in known if each.startswith(f"{name}.")]
        # Last in the pass first: what a layer gives is most like what its last part gives.
        known.reverse()
        inside.reverse()
        ranked = sorted(known, key=shared, reverse=True)
        return [*inside, *(each for each in ranked if each not in inside)][:count]

    def remove(self) -> None:
        """Take the hooks away; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
