"""The forward passes of a network, and what its named layers saw in each of them."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from protoseg.tap.hooks import Hook, runs_again
from protoseg.tap.selectors import Selector
from protoseg.tap.survey import Survey

__all__ = ["Forward", "Joined", "Recorder", "Seen"]


class Seen(NamedTuple):
    """What a hook saw: the tensor, how often it had been changed in place, and whether there was to be a graph."""

    tensor: Tensor
    version: int
    grad: bool


class Joined(NamedTuple):
    """A forward pass of the whole batch, from all devices on the first.

    Attributes:
        seen: What was captured, by kind.
        grad: Whether the pass and what was captured were to have a graph.
        picture: Height and width of the network's input, where it had a picture.
        parts: What it was joined from.
    """

    seen: dict[str, Tensor]
    grad: bool
    picture: tuple[int, int] | None
    parts: list[Forward]


class Forward:
    """One forward pass on one device.

    Args:
        grad: Whether there was to be a graph.
        picture: Height and width of the network's input, if it has a picture.
        loose: Whether no pass of the whole network was under way, as where a method of it was called.
    """

    def __init__(self, grad: bool, picture: tuple[int, int] | None, loose: bool) -> None:
        self.grad = grad
        self.picture = picture
        self.loose = loose
        self.seen: dict[str, Seen] = {}
        self.calls: dict[str, int] = {}
        self.kept = False
        self.used = False  # by loss() or store()


class Recorder:
    """Hooks on a network and on layers of it, and the passes that they saw.

    A pass is one call of the network; where its layers are reached in another way, as by a method of it, a layer that
    runs again begins another one. Passes without a graph do not take the place of a training pass whose loss has not
    been taken yet.

    Args:
        network: Not wrapped.
        layers: Layer and selector, by kind.
        forwards: Passes that are kept.
        call: Which call of a layer in a pass is meant; None: the last, with a warning where there are several.
        changed: Whether what was captured may have been changed in place since.
        survey: Whether to note which layers run in the first pass.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Mapping[str, tuple[nn.Module, Selector]],
        *,
        forwards: int,
        call: int | None,
        changed: bool,
        survey: bool,
    ) -> None:
        self._network = network
        self._layers = dict(layers)
        self._forwards = forwards
        self._call = call
        self._changed = changed
        self._open: dict[int, Forward] = {}
        self._kept: dict[bool, dict[torch.device, deque[Forward]]] = {True: {}, False: {}}
        self._latest = True
        self._told = False
        self.outputs: Any = None  # of the last pass of the network, where keep_outputs
        self.keep_outputs = False
        self.passes = 0
        self.survey = Survey(network) if survey else None

        handles = [
            network.register_forward_pre_hook(Hook(self, "begin"), with_kwargs=True),
        ]
        for kind, (layer, _) in self._layers.items():
            handles.append(layer.register_forward_hook(Hook(self, "capture", kind), with_kwargs=True))
        # Last, as a layer may be the network itself.
        handles.append(network.register_forward_hook(Hook(self, "end"), always_call=True))
        # Whoever forgets a recorder without removing it is rid of its hooks all the same.
        self._remove = weakref.finalize(self, _remove, handles)
        self._remove.atexit = False

    @property
    def attached(self) -> bool:
        """Whether the hooks are still there."""
        return self._remove.alive

    @property
    def holding(self) -> bool:
        """Whether any pass is kept."""
        return any(seen for kept in self._kept.values() for seen in kept.values())

    def remove(self) -> None:
        """Take the hooks away, and forget network and passes."""
        if self.survey is not None:
            self.survey.remove()
        self._remove()
        self._layers.clear()
        self._network = nn.Identity()
        self.clear()

    def clear(self) -> None:
        """Forget all passes."""
        self._open.clear()
        self._kept = {True: {}, False: {}}
        self.outputs = None

    def begin(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note that a pass of the network begins."""
        if self._ours(network, self._network):
            self._open[_thread()] = Forward(torch.is_grad_enabled(), _picture((*args, *kwargs.values())), False)

    def end(self, network: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note that it is done, or has failed."""
        if not self._ours(network, self._network):
            return
        self._open.pop(_thread(), None)
        self.passes += 1
        if self.keep_outputs:
            self.outputs = output
        if self.survey is not None:
            self.survey.remove()

    def capture(
        self, kind: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Keep what a layer saw."""
        # What was compiled with the hook still runs it behind remove().
        if kind not in self._layers or not self._ours(layer, self._layers[kind][0]):
            return
        tensor = self._layers[kind][1].pick(args, kwargs, output)
        grad = torch.is_grad_enabled()
        forward = self._open.get(_thread())
        if forward is None:
            forward = self._loose(kind, tensor.device, grad)
        if not forward.kept:
            self._keep(forward, tensor.device)

        # In a training pass what runs without a graph, such as a teacher of the same layers, does not count.
        before = forward.seen.get(kind)
        if before is not None and before.grad != grad:
            if before.grad:
                return
            forward.calls[kind] = 0
        count = forward.calls.get(kind, 0)
        forward.calls[kind] = count + 1
        if self._call is None or self._call == count:
            version = -1 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
            forward.seen[kind] = Seen(tensor, version, grad)

    def _ours(self, layer: nn.Module, expected: nn.Module) -> bool:
        """Whether a hook is to listen: not to copies of the network, nor to what checkpointing computes again."""
        ours = layer is expected or getattr(layer, "_is_replica", False)
        return bool(ours) and not runs_again()

    def _loose(self, kind: str, device: torch.device, grad: bool) -> Forward:
        """The pass that a layer belongs to where the network itself was not called."""
        kept = self._kept[grad].get(device)
        if kept and kept[-1].loose and kind not in kept[-1].calls and not kept[-1].used:
            return kept[-1]
        return Forward(grad, None, True)

    def _keep(self, forward: Forward, device: torch.device) -> None:
        """Put a pass among those that are kept; a step begins anew behind a loss."""
        forward.kept = True
        self._latest = forward.grad
        training = self._kept[True].get(device)
        if training and training[-1].used:
            training.clear()
        if forward.grad:
            self._kept[False].pop(device, None)
        kept = self._kept[forward.grad].setdefault(device, deque(maxlen=self._forwards))
        if kept and kept[-1].used:
            kept.clear()
        kept.append(forward)

    def read(self, devices: Sequence[int], *, training: bool = False) -> list[Joined]:
        """The passes that are kept, the last one last.

        Args:
            devices: In the order of the batch, of a data-parallel network.
            training: Those with a graph, if there are any; otherwise the latest.

        Raises:
            RuntimeError: There is none, or a layer did not run in one.
        """
        which = self._latest
        if training and any(self._kept[True].values()):
            which = True
        kept = {device: seen for device, seen in self._kept[which].items() if seen}
        if not kept:
            self._raise_nothing()
        order = sorted(kept, key=lambda device: _rank(device, devices))
        counts = {len(kept[device]) for device in order}
        passes = [[kept[device][index] for device in order] for index in range(min(counts))]
        for parts in passes:
            self._check_whole(parts, len(counts) > 1)
        return [self._joined(parts, order[0]) for parts in passes]

    def _raise_nothing(self) -> None:
        if self.passes == 0:
            raise RuntimeError(
                "attach: no forward pass has been captured; call the network first, and attach before it is compiled"
            )
        names = " and ".join(repr(selector.name) for _, selector in self._layers.values())
        raise RuntimeError(
            f"attach: the network ran and {names} never did{self._instead('features')}; a layer is seen where it is "
            "called, not where its forward() or another method of it is"
        )

    def _instead(self, kind: str) -> str:
        """Which neighbors of a layer that never ran could be named."""
        if self.survey is None:
            return ""
        near = self.survey.near(self._layers[kind][1].layer)
        return f"; what did run near it: {', '.join(near)}" if near else ""

    def _check_whole(self, parts: list[Forward], uneven: bool) -> None:
        for kind, (_, selector) in self._layers.items():
            calls = max(each.calls.get(kind, 0) for each in parts)
            missing = any(kind not in each.seen for each in parts)
            if missing and calls:
                raise RuntimeError(
                    f"attach: {selector.name!r} ran {calls} time(s) in the pass, and call={self._call} asks for "
                    f"another one; pass call=0 to {calls - 1}"
                )
            # Of a CAM's layer that never ran, the weights may do.
            if missing and kind == "features":
                raise RuntimeError(
                    f"attach: {selector.name!r} did not run in a pass that other layers did run in"
                    f"{self._instead(kind)}; name a layer that does, or call clear() after a pass that was broken off"
                )
        if uneven:
            raise RuntimeError(
                "attach: a forward pass did not run through all of the layers; call clear() after one that was broken "
                "off"
            )
        several = {kind: count for each in parts for kind, count in each.calls.items() if count > 1}
        if several and self._call is None and not self._told and not parts[0].loose:
            self._told = True
            kind, count = next(iter(several.items()))
            warnings.warn(
                f"attach: {self._layers[kind][1].name!r} ran {count} times in one forward pass, and the last of them "
                f"was taken; pass call=0 to {count - 1} to say which",
                stacklevel=5,
            )

    def _joined(self, parts: list[Forward], device: torch.device) -> Joined:
        """The batch of one pass from the parts of it that several devices have seen."""
        seen = {}
        for kind in self._layers:
            if all(kind in each.seen for each in parts):
                tensors = [self._unchanged(kind, each.seen[kind]).to(device) for each in parts]
                seen[kind] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        grad = all(each.grad and all(one.grad for one in each.seen.values()) for each in parts)
        return Joined(seen, grad, parts[0].picture, parts)

    def _unchanged(self, kind: str, seen: Seen) -> Tensor:
        if seen.version >= 0 and seen.version != seen.tensor._version and not self._changed:
            raise RuntimeError(
                f"attach: what was captured as {kind} has been changed in place since; name the layer that changes it, "
                "make it not inplace, or, where what it has become is what you want, pass changed=True"
            )
        return seen.tensor


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _thread() -> int:
    """Of a data-parallel network each replica runs in one of its own."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _picture(values: Sequence[Any]) -> tuple[int, int] | None:
    """Height and width of the first map among a network's inputs."""
    for value in values:
        if isinstance(value, Tensor) and value.dim() == 4:
            return int(value.shape[-2]), int(value.shape[-1])
    return None


def _rank(device: torch.device, order: Sequence[int]) -> tuple[int, int]:
    index = device.index or 0
    return (list(order).index(index) if index in order else len(order), index)
