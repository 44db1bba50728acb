"""attach: read features and CAM of a network that this library has never seen, by the names of its layers."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from protoseg.modules.context import ContextPrototypeBank, ContextPrototypes
from protoseg.utils import checks

__all__ = ["Tap", "attach"]

_INPUT = ":input"


class _Seen(NamedTuple):
    """What a hook saw: the tensor, how often it had been changed in place, and whether there was to be a graph."""

    tensor: Tensor
    version: int
    grad: bool


class _Forward:
    """One forward pass on one device."""

    def __init__(self) -> None:
        self.seen: dict[str, _Seen] = {}
        self.used = False  # by loss()


class Tap:
    """What :func:`attach` returns: hooks on a network, and what they saw of its last forward pass.

    Attributes:
        bank: As given.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        features: str,
        cam: str | Callable[[Tensor], Tensor] | None = None,
        bank: ContextPrototypeBank | None = None,
        channels: Sequence[int] | None = None,
        background: int | None = None,
        reshape: Callable[[Tensor], Tensor] | int | None = None,
        forwards: int = 1,
    ) -> None:
        checks.positive("attach", "forwards", forwards)
        self.bank = bank
        self._cam = cam
        self._channels = None if channels is None else list(channels)
        if self._channels is not None and min(self._channels, default=-1) < 0:
            raise ValueError(f"attach: channels must be one or more numbers of at least 0, got {self._channels}")
        if background is not None and (self._channels is None or background < 0 or background in self._channels):
            raise ValueError(
                f"attach: background must be a channel beside those in channels, got {background} beside {channels}"
            )
        self._background = background
        self._reshape = reshape
        self._forwards = forwards
        self._devices = getattr(network, "device_ids", None) or []
        self._seen: dict[torch.device, deque[_Forward]] = {}
        self._layers: dict[str, nn.Module] = {}
        self._handles = []
        names = {"features": features}
        if isinstance(cam, str):
            names["cam"] = cam
        elif cam is not None and not callable(cam):
            raise TypeError(f"attach: cam must be a layer's name or a callable, got {type(cam).__name__}")
        self._needed = tuple(names)
        inner = _unwrapped(network)
        for kind, name in names.items():
            self._layers[kind] = _layer(inner, kind, name.removesuffix(_INPUT))
        for kind, name in names.items():
            hook = self._hook(kind, name)
            self._handles.append(self._layers[kind].register_forward_hook(hook, with_kwargs=True))

    def __enter__(self) -> Tap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def features(self) -> Tensor:
        """Features ``[B, D, h, w]`` of the last forward pass, connected to the graph."""
        return self._read()[-1][0]

    @property
    def cam(self) -> Tensor:
        """Raw CAM ``[B, C, h, w]`` of the last forward pass, in the order of the labels, connected to the graph."""
        return self._maps()[-1][1]

    def loss(self, labels: Tensor) -> Tensor:
        """Return the bank's loss for the last forward pass, or the mean over the last ``forwards`` of them.

        A bank in ``train()`` stores the pictures of the first of these, once however often this is called, and nothing
        under ``no_grad``. The next forward pass begins anew.

        Args:
            labels: ``[B, C]`` multi-hot, foreground.

        Returns:
            ``[]``.

        Raises:
            RuntimeError: No bank, no forward pass yet, released, or what was captured has been changed in place since.
            ValueError: With gradients on, what the loss would train is not connected to the graph; tokens without
                ``reshape``; or what the bank rejects.
        """
        bank, maps = self._with_bank(), self._maps()
        last = [each for seen in self._seen.values() for each in seen]
        trains = torch.is_grad_enabled()
        what, index = ("features", 0) if bank.detach == "cam" else ("CAM", 1)
        connected = all(each.grad for forward in last for each in forward.seen.values())
        if trains and not (connected and all(each[index].requires_grad for each in maps)):
            raise ValueError(
                f"attach: the {what} must be connected to the graph, got a detached one, whose loss would train "
                "nothing; name the layer that computes it (for MCTformer 'head') or pass a callable of the features, "
                "run checkpointed layers with use_reentrant=False, or call loss() under no_grad as well"
            )
        stores = bank.training and trains and not any(forward.used for forward in last)
        # All see the same state: the only call that changes it is the last.
        losses = [bank(*each, labels, store=False).loss for each in maps[1:]]
        losses.append(bank(*maps[0], labels, store=stores).loss)
        for forward in last:
            forward.used = True
        return torch.stack(losses).mean()

    def pacam(self, labels: Tensor) -> Tensor:
        """Return the prototype-aware CAM ``[B, C+1, h, w]`` of the last forward pass; the bank is not changed.

        Args:
            labels: ``[B, C]`` multi-hot, foreground.

        Returns:
            Maps in ``[0, 1]``, background in front, as of :class:`protoseg.ContextPrototypeBank`.

        Raises:
            RuntimeError: As :meth:`loss`.
            ValueError: As :meth:`loss`, but for a detached CAM, which is no error here.
        """
        bank, maps = self._with_bank(), self._maps()
        mode = bank.training
        try:
            out: ContextPrototypes = bank.eval()(*maps[-1], labels)
            return out.pacam
        finally:
            bank.train(mode)

    def clear(self) -> None:
        """Forget what was captured, and with it the graph that it holds."""
        self._seen.clear()

    def release(self) -> None:
        """Remove all hooks and forget the network; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layers.clear()
        self.clear()

    def _hook(self, kind: str, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            # A copy of the network (a moving average of it, say) has our hooks too; replicas of DataParallel are ours.
            if not self._layers or (layer is not self._layers[kind] and not getattr(layer, "_is_replica", False)):
                return  # or what was compiled with the hook still runs it behind release()
            # Checkpointing runs layers again in the backward pass.
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                return
            self._keep(kind, _tensor(name, (*args, *kwargs.values()) if name.endswith(_INPUT) else output))

        return hook

    def _keep(self, kind: str, tensor: Tensor) -> None:
        seen = self._seen.setdefault(tensor.device, deque(maxlen=self._forwards))
        if seen and seen[-1].used:
            seen.clear()
        if not seen or kind in seen[-1].seen:
            seen.append(_Forward())
        version = -1 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
        seen[-1].seen[kind] = _Seen(tensor, version, torch.is_grad_enabled())

    def _read(self) -> list[tuple[Tensor, Tensor | None]]:
        """Features and what was captured for the CAM, of each forward pass, from all devices on the first."""
        if not self._handles:
            raise RuntimeError("attach: this tap has been released; attach again")
        if not self._seen:
            raise RuntimeError(
                "attach: no forward pass has been captured; call the network first, and attach before it is compiled"
            )
        order = sorted(self._seen, key=lambda device: _rank(device, self._devices))
        counts = {len(self._seen[device]) for device in order}
        forwards = [[self._seen[device][index] for device in order] for index in range(min(counts))]
        if len(counts) > 1 or any("features" not in each.seen for every in forwards for each in every):
            raise RuntimeError(
                f"attach: a forward pass did not run through all of {self._needed}; call clear() after one that was "
                "broken off"
            )
        found: list[tuple[Tensor, Tensor | None]] = []
        for every in forwards:
            features = _joined("features", every, order[0])
            cam = _joined("cam", every, order[0]) if all("cam" in each.seen for each in every) else None
            found.append((self._as_map("features", features), cam))
        return found

    def _maps(self) -> list[tuple[Tensor, Tensor]]:
        """Features and CAM of each forward pass."""
        found = []
        for features, captured in self._read():
            cam = self._cam_of(features, captured)
            named = [*(self._channels or ()), *(() if self._background is None else (self._background,))]
            if max(named, default=0) >= cam.shape[1]:
                raise ValueError(
                    f"attach: channels and background must be below the CAM's {cam.shape[1]} channels, got {max(named)}"
                )
            if self._background is not None:
                cam = cam - cam[:, self._background, None]
            if self._channels is not None:
                cam = cam[:, self._channels]
            found.append((features, cam))
        return found

    def _cam_of(self, features: Tensor, captured: Tensor | None) -> Tensor:
        if self._cam is None:
            raise RuntimeError("attach: a CAM was asked for and none was named; pass cam= to attach")
        if callable(self._cam):
            return self._as_map("cam", self._cam(features))
        layer = self._layers["cam"]
        pooled = captured is None or captured.dim() == 2 or (captured.dim() == 4 and captured.shape[-2:] == (1, 1))
        if pooled and features.shape[-2:] != (1, 1):
            weight = _pointwise(layer)
            if weight is None:
                raise ValueError(
                    f"attach: {self._cam!r} must give a map or be a linear layer or a 1x1 convolution, whose weights "
                    f"give one, got {type(layer).__name__} with {'no' if captured is None else 'pooled'} output; pass "
                    "a callable that makes the CAM from the features"
                )
            if weight.shape[1] != features.shape[1]:
                raise ValueError(
                    f"attach: {self._cam!r} takes {weight.shape[1]} channels and the features have "
                    f"{features.shape[1]}; name as features what is pooled before it"
                )
            return F.conv2d(features, weight.to(features.dtype))
        assert captured is not None
        return self._as_map("cam", captured)

    def _as_map(self, kind: str, tensor: Tensor) -> Tensor:
        if tensor.dim() == 4:
            return tensor
        if tensor.dim() == 3 and self._reshape is not None:
            if callable(self._reshape):
                return self._reshape(tensor)
            side = round((tensor.shape[1] - self._reshape) ** 0.5)
            if side * side == tensor.shape[1] - self._reshape:
                return rearrange(tensor[:, self._reshape :], "b (h w) d -> b d h w", h=side)
            raise ValueError(
                f"attach: {kind} {tuple(tensor.shape)} has no square of patches after {self._reshape} tokens; pass "
                "as reshape a function from [B, L, D] to [B, D, h, w]"
            )
        raise ValueError(
            f"attach: {kind} must be a map [B, D, h, w], got {tuple(tensor.shape)}"
            + ("; pass reshape= for tokens: how many come before the patches, or a function" * (tensor.dim() == 3))
        )

    def _with_bank(self) -> ContextPrototypeBank:
        if self.bank is None:
            raise RuntimeError("attach: this needs a bank and none was given; pass bank= to attach")
        return self.bank


def attach(
    network: nn.Module,
    *,
    features: str,
    cam: str | Callable[[Tensor], Tensor] | None = None,
    bank: ContextPrototypeBank | None = None,
    channels: Sequence[int] | None = None,
    background: int | None = None,
    reshape: Callable[[Tensor], Tensor] | int | None = None,
    forwards: int = 1,
) -> Tap:
    """Hook a network's features and CAM, so that a bank's loss and maps take one line; also a context manager.

    The network's code, parameters, ``state_dict`` and modes stay as they are: the tap reads what two layers see while
    the network runs. Leaving the ``with`` block, or :meth:`Tap.release`, removes the hooks. The bank is not part of the
    network: move it to the features' device, save and load it yourself; its ``train()`` and ``eval()`` are its own, as
    some networks' do nothing.

    The last forward pass is kept, with its graph, until the next one, :meth:`Tap.clear` or release. What checkpointing
    computes again in the backward pass is not taken for another one. With gradient accumulation call
    :meth:`Tap.loss` once for each forward pass. ``DataParallel`` and ``DistributedDataParallel`` may come before or
    after; a network to be compiled is attached to before its first call.

    Args:
        network: Any module; wrappers of data-parallel and compiled networks are looked through.
        features: Name of the layer, as in ``named_modules()``, whose output is the features; with ``":input"`` behind
            it, whose first input is. Of a tuple the first tensor is taken.
        cam: The CAM, before any ``detach``: the name of the layer that computes it, in the same way; the name of a
            linear layer or 1x1 convolution that sees pooled features, whose weights then give the CAM; or a function
            of the features ``[B, D, h, w]``. Raw scores, not normalized.
        bank: A :class:`protoseg.ContextPrototypeBank`; without one the tap only gives ``features`` and ``cam``.
        channels: The CAM's channel of each class in the order of the labels, such as ``range(1, 21)`` where channel 0
            is background. By default all channels, as they are.
        background: Channel of the CAM that scores background, which is then subtracted from the others: what is left
            is a class's log odds against it, where a softmax over both makes the published map. Needs ``channels``.
        reshape: For tokens ``[B, L, D]``: how many of them come before a square of patches, or a function to
            ``[B, D, h, w]``.
        forwards: Forward passes that make one step (two views, several scales), each of all pictures.

    Returns:
        A :class:`Tap`, whose :meth:`Tap.loss` and :meth:`Tap.pacam` take the pictures' labels.

    Raises:
        ValueError: There is no such layer (near names are listed), ``channels`` is empty or below 0, ``background``
            is not a channel beside them, or ``forwards`` is below 1.
        TypeError: ``cam`` is neither a name nor callable, or a layer's output holds no tensor.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> network = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        ... )
        >>> bank = ContextPrototypeBank(num_classes=4, dim=8)
        >>> labels = torch.eye(4)
        >>> with attach(network, features="1", cam="4", bank=bank) as tap:
        ...     logits = network(torch.rand(4, 3, 16, 16))
        ...     loss = F.multilabel_soft_margin_loss(logits, labels) + tap.loss(labels)
        ...     loss.backward()
        >>> bank.stored.sum().item() > 0
        True
    """
    return Tap(
        network,
        features=features,
        cam=cam,
        bank=bank,
        channels=channels,
        background=background,
        reshape=reshape,
        forwards=forwards,
    )


def _unwrapped(network: nn.Module) -> nn.Module:
    while True:
        if isinstance(network, DataParallel | DistributedDataParallel):
            network = network.module
        elif isinstance(inner := getattr(network, "_orig_mod", None), nn.Module):
            network = inner
        else:
            return network


def _layer(network: nn.Module, kind: str, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        # Not as get_submodule finds them alone: a layer may be there under several names.
        names = [each for each, _ in network.named_modules(remove_duplicate=False) if each]
        last = name.rpartition(".")[2]
        near = [each for each in names if each.rpartition(".")[2] == last][:5]
        near += [each for each in difflib.get_close_matches(name, names, n=5) if each not in near]
        listed = ", ".join(near[:5] or names[-5:]) or "none at all"
        raise ValueError(
            f"attach: {kind} must name a layer as in named_modules(), got {name!r}; near names: {listed}"
        ) from None


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    for each in value if isinstance(value, tuple | list) else ():
        if isinstance(each, Tensor):
            return each
    raise TypeError(f"attach: {name!r} must give a tensor or a tuple with one, got {type(value).__name__}")


def _joined(kind: str, parts: Sequence[_Forward], device: torch.device) -> Tensor:
    """The batch of one forward pass from the parts of it that several devices have seen."""
    found = []
    for part in parts:
        tensor, version, _ = part.seen[kind]
        if version >= 0 and version != tensor._version:
            raise RuntimeError(
                f"attach: what was captured as {kind} has been changed in place since; name the layer that changes it, "
                "or make it not inplace"
            )
        found.append(tensor.to(device))
    return torch.cat(found) if len(found) > 1 else found[0]


def _rank(device: torch.device, order: Sequence[int]) -> tuple[int, int]:
    index = device.index or 0
    return (list(order).index(index) if index in order else len(order), index)


def _pointwise(layer: nn.Module) -> Tensor | None:
    """The weights ``[C, D, 1, 1]`` of a layer that a pooled vector runs through, where it is that simple."""
    if isinstance(layer, nn.Linear):
        return layer.weight[:, :, None, None]
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer.weight
    return None
