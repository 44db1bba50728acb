"""attach: read features and CAM of a network that this library has never seen, by the names of its layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from protoseg.functional import multi_scale
from protoseg.modules.context import ContextPrototypeBank, ContextPrototypes, MapContrast
from protoseg.tap.hooks import evaluating, unwrapped
from protoseg.tap.reading import CAMReader, Reshape
from protoseg.tap.recorder import Joined, Recorder
from protoseg.tap.selectors import Name, Selector, find_layer
from protoseg.utils import checks

__all__ = ["LastStep", "Maps", "Tap", "attach"]

# Runs a network on images and labels; what it returns is not looked at.
Run = Callable[[Tensor, Tensor], Any]
# After so many steps in which nothing was stored, it is said.
_IDLE = 100


class LastStep(NamedTuple):
    """What became of the present classes in the last call of a bank, by picture and class.

    Attributes:
        present: How many the labels named.
        valid: Of these, how many had a pixel that the CAM was sure of.
        stored: How many instances were stored, on all ranks together.
        accepted: How many had a map made by contexts of the bank, and not by the picture's own instance.
    """

    present: int
    valid: int
    stored: int
    accepted: int


class Maps(NamedTuple):
    """What :meth:`Tap.maps` returns, of the pictures' size.

    Attributes:
        pacam: ``[B, C, H, W]`` in 0..1, the bank's maps of the classes; absent classes 0.
        cam: ``[B, C, H, W]``, the normalized CAM likewise.
    """

    pacam: Tensor
    cam: Tensor


class Tap:
    """What :func:`attach` returns: hooks on a network, and what they saw of its last forward pass.

    It holds the network; the network does not hold it. A copy of a tap, or one from a file, is released.

    Attributes:
        bank: As given.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        features: Name,
        cam: Name | Callable[[Tensor], Tensor] | None = None,
        bank: ContextPrototypeBank | None = None,
        channels: Sequence[int] | None = None,
        background: int | None = None,
        reshape: Reshape = None,
        forwards: int = 1,
        call: int | None = None,
        changed: bool = False,
    ) -> None:
        checks.positive("attach", "forwards", forwards)
        if call is not None and call < 0:
            raise ValueError(f"attach: call must be at least 0, the first call of a layer in a pass, got {call}")
        if cam is not None and not callable(cam) and not isinstance(cam, str | tuple):
            raise TypeError(f"attach: cam must be a layer's name or a callable, got {type(cam).__name__}")

        self.bank = bank
        inner = unwrapped(network)
        names: dict[str, Name] = {"features": features}
        if isinstance(cam, str | tuple):
            names["cam"] = cam
        selectors = {kind: Selector.parse(kind, name) for kind, name in names.items()}
        layers = {kind: find_layer(inner, kind, each.layer) for kind, each in selectors.items()}

        self._reader = CAMReader(
            cam if cam is None or "cam" not in selectors else selectors["cam"].name,  # type: ignore[arg-type]
            layers.get("cam"),
            selectors["features"].name,
            channels=channels,
            background=background,
            reshape=reshape,
        )

        self._devices = getattr(network, "device_ids", None) or []
        self._network: nn.Module | None = network
        self._recorder = Recorder(
            inner,
            {kind: (layers[kind], selectors[kind]) for kind in selectors},
            forwards=forwards,
            call=call,
            changed=changed,
            # Of a compiled network nobody sees the layers.
            survey=not hasattr(network, "_orig_mod"),
        )
        self._recorder.keep_outputs = isinstance(network, DistributedDataParallel) and network.find_unused_parameters
        self._last: tuple[Tensor, ContextPrototypes, Tensor] | None = None
        self._idle = 0
        self._idle_stored: Tensor | None = None

    def __enter__(self) -> Tap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __reduce__(self) -> tuple[Callable[..., Tap], tuple[Any, ...]]:
        return _released, (self.bank,)

    @property
    def features(self) -> Tensor:
        """Features ``[B, D, h, w]`` of the last forward pass, connected to the graph."""
        return self._features(self._read()[-1])

    @property
    def cam(self) -> Tensor:
        """Raw CAM ``[B, C, h, w]`` of the last forward pass, in the order of the labels, connected to the graph."""
        return self._maps(self._read()[-1:])[-1][1]

    @property
    def last(self) -> LastStep | None:
        """What became of the classes in the last :meth:`loss`, :meth:`store` or :meth:`pacam`; waits for the device."""
        if self._last is None:
            return None
        labels, out, stored = self._last
        present = labels > 0
        return LastStep(
            int(present.sum()),
            int(out.valid.sum()),
            int(stored),
            int(((out.selected >= 0).any(-1) & present).sum()),
        )

    def loss(self, labels: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the bank's loss for the last training pass, or the mean over the last ``forwards`` of them.

        A bank in ``train()`` stores the pictures of the first of these, once however often this is called, and nothing
        under ``no_grad``. The next forward pass begins anew. Passes under ``no_grad`` in between are looked past.

        Args:
            labels: ``[B, C]`` multi-hot, foreground.
            valid: ``[B, H, W]`` bool, False where a picture was padded.

        Returns:
            ``[]``.

        Raises:
            RuntimeError: No bank, no forward pass yet, released, what was captured has been changed in place since, or
                a wrapper would refuse the backward pass.
            ValueError: With gradients on, what the loss would train is not connected to the graph; tokens without
                ``reshape``; pooled features; or what the bank rejects.
        """
        bank = self._with_bank()
        trains = torch.is_grad_enabled()
        last = self._read(training=trains)
        maps = self._maps(last)

        what, index = ("features", 0) if bank.detach == "cam" else ("CAM", 1)
        connected = all(each.grad for each in last) and all(each[index].requires_grad for each in maps)
        if trains and not connected:
            raise ValueError(
                f"attach: the {what} must be connected to the graph, got a detached one, whose loss would train "
                "nothing; name the layer that computes it (for MCTformer 'head') or pass a callable of the features, "
                "run checkpointed layers with use_reentrant=False, or call loss() under no_grad as well"
            )

        used = any(part.used for forward in last for part in forward.parts)
        stores = bank.training and trains and not used
        # All see the same state: the only call that changes it is the last.
        losses = [bank(*each, labels, valid, store=False).loss for each in maps[1:]]
        losses.append(self._ask(bank, maps[0], labels, valid, store=stores).loss)

        for forward in last:
            for part in forward.parts:
                part.used = True
        found = torch.stack(losses).mean()
        if trains:
            self._check_wrapper(found)
        return found

    def store(self, labels: Tensor, valid: Tensor | None = None) -> None:
        """Store the pictures of the last forward pass without a loss, in whatever mode bank and gradients are.

        Args:
            labels: ``[B, C]`` multi-hot, foreground.
            valid: ``[B, H, W]`` bool, False where a picture was padded.

        Raises:
            RuntimeError: As :meth:`loss`; or these pictures have been stored already.
            ValueError: Tokens without ``reshape``, pooled features, or what the bank rejects.
        """
        bank, last = self._with_bank(), self._read()
        if any(part.used for part in last[0].parts):
            raise RuntimeError("attach: the pictures of this pass have been stored already; run the network first")
        mode = bank.training
        try:
            features, cam = self._maps(last[:1])[0]
            # Under no_grad the bank would keep its state, for a pass that checkpointing may compute again.
            with torch.enable_grad():
                self._ask(bank.train(), (features.detach(), cam.detach()), labels, valid, store=True)
        finally:
            bank.train(mode)
        for forward in last:
            for part in forward.parts:
                part.used = True

    def pacam(self, labels: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the prototype-aware CAM ``[B, C+1, h, w]`` of the last forward pass; the bank is not changed.

        Args:
            labels: ``[B, C]`` multi-hot, foreground.
            valid: ``[B, H, W]`` bool, False where a picture was padded.

        Returns:
            Maps in ``[0, 1]``, background in front, as of :class:`protoseg.ContextPrototypeBank`.

        Raises:
            RuntimeError: As :meth:`loss`.
            ValueError: As :meth:`loss`, but for a detached CAM, which is no error here.
        """
        bank, maps = self._with_bank(), self._maps(self._read()[-1:])
        return self._look(bank, maps[0], labels, valid).pacam

    def fill(
        self,
        loader: Iterable[Any],
        *,
        rounds: int = 3,
        run: Run | None = None,
        unpack: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
        keep: int = 2**30,
    ) -> MapContrast:
        """Fill the bank anew with what the network, in ``eval()`` and without gradients, sees of a loader's pictures.

        Nothing is trained. The network's modes and the bank's stay as they were.

        Args:
            loader: Batches of images ``[B, 3, H, W]`` and labels ``[B, C]``, in this order if a batch holds more; read
                again for every round, so no generator.
            rounds: See :meth:`protoseg.modules.ContextPrototypeBank.fill`.
            run: Runs the network on images and labels, where ``network(images)`` is not how it is called.
            unpack: Takes images and labels from a batch of another form, such as a dict.
            keep: Bytes of maps that are kept instead of being computed again, if all fit.

        Returns:
            How well CAM and PACAM part the features, as of :meth:`protoseg.modules.ContextPrototypeBank.fill`.

        Raises:
            RuntimeError: As :meth:`loss`.
            ValueError: As :meth:`protoseg.modules.ContextPrototypeBank.fill`.
            TypeError: The loader can be read only once, or a batch does not hold images and labels.
        """
        bank = self._with_bank()
        if isinstance(loader, Iterator):
            raise TypeError(
                f"attach: fill reads the loader once a round, got a {type(loader).__name__}; pass a list or a loader"
            )
        views = _Views(self, loader, run or self._run(), unpack or _images_and_labels, keep)
        with evaluating(self._inner()):
            return bank.fill(views, rounds=rounds)

    @torch.no_grad()
    def maps(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = True,
        multiple: int = 8,
        run: Run | None = None,
    ) -> Maps:
        """Run the network, in ``eval()`` and without gradients, at some scales and mirrored, and make one map of all.

        Features and raw CAM are averaged on the grid of the first scale, and the bank is asked once.

        Args:
            images: ``[B, 3, H, W]``, as the network wants them.
            labels: ``[B, C]`` multi-hot.
            scales: Factors above 0.
            flip: Also mirrored.
            multiple: Sides are rounded to a multiple of it; the network's stride, so that mirrored maps lie on the
                others.
            run: As of :meth:`fill`.

        Returns:
            :class:`Maps` of the pictures' size.

        Raises:
            RuntimeError: As :meth:`loss`.
            ValueError: As :meth:`pacam`, or no scale.
        """
        bank, run = self._with_bank(), run or self._run()

        def look(pictures: Tensor) -> Sequence[Tensor]:
            return self._see(pictures, labels, run)

        with evaluating(self._inner()):
            features, cam = multi_scale(look, images, scales=scales, flip=flip, multiple=multiple)
        out = self._look(bank, (features, cam), labels.to(features.device), None)

        def enlarged(maps: Tensor) -> Tensor:
            size = images.shape[-2:]
            return F.interpolate(maps[:, 1:].float(), size, mode="bilinear", align_corners=False).clamp(0, 1)

        return Maps(enlarged(out.pacam), enlarged(out.cam))

    def clear(self) -> None:
        """Forget what was captured, and with it the graph that it holds."""
        self._recorder.clear()
        self._last = None

    def release(self) -> None:
        """Remove all hooks and forget the network; may be called again."""
        self._recorder.remove()
        self._network = None
        self._last = None

    def _run(self) -> Run:
        network = self._inner()
        return lambda images, labels: network(images)

    def _inner(self) -> nn.Module:
        if self._network is None:
            raise RuntimeError("attach: this tap has been released; attach again")
        return self._network

    @torch.no_grad()
    def _see(self, images: Tensor, labels: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """Features and CAM of a pass that is forgotten again."""
        self._recorder.clear()
        parameter = next(self._inner().parameters(), None)
        where = images.device if parameter is None else parameter.device
        run(images.to(where), labels.to(where))
        try:
            return self._maps(self._read()[-1:])[0]
        finally:
            self._recorder.clear()

    def _read(self, *, training: bool = False) -> list[Joined]:
        if not self._recorder.attached:
            raise RuntimeError("attach: this tap has been released; attach again")
        return self._recorder.read(self._devices, training=training)

    def _features(self, forward: Joined) -> Tensor:
        return self._reader.features(forward.seen["features"], forward.picture, self._recorder.survey)

    def _maps(self, forwards: list[Joined]) -> list[tuple[Tensor, Tensor]]:
        """Features and CAM of each forward pass."""
        found = []
        for each in forwards:
            features = self._features(each)
            rank = each.seen["features"].dim()
            cam = self._reader.read(features, each.seen.get("cam"), each.picture, self._recorder.survey, rank)
            found.append((features, cam))
        return found

    def _look(
        self, bank: ContextPrototypeBank, maps: tuple[Tensor, Tensor], labels: Tensor, valid: Tensor | None
    ) -> ContextPrototypes:
        mode = bank.training
        try:
            return self._ask(bank.eval(), maps, labels, valid, store=False)
        finally:
            bank.train(mode)

    def _ask(
        self,
        bank: ContextPrototypeBank,
        maps: tuple[Tensor, Tensor],
        labels: Tensor,
        valid: Tensor | None,
        *,
        store: bool,
    ) -> ContextPrototypes:
        """Call the bank, and note what became of the classes."""
        pointer, before = bank.memory.pointer.clone(), bank.stored.clone()
        out: ContextPrototypes = bank(*maps, labels, valid, store=store)
        moved = (bank.memory.pointer - pointer) % bank.capacity
        # A ring that was filled exactly once is where it was.
        stored = torch.where((moved == 0) & (bank.stored > before), bank.capacity, moved)[: bank.num_classes].sum()
        self._last = (labels.detach(), ContextPrototypes(*(each.detach() for each in out)), stored)
        if store:
            self._count_idle(stored)
        return out

    def _count_idle(self, stored: Tensor) -> None:
        """Say so when nothing has been stored for long; looks at the device only then."""
        self._idle_stored = stored if self._idle_stored is None else self._idle_stored + stored
        self._idle += 1
        if self._idle < _IDLE:
            return
        if not torch.compiler.is_compiling() and int(self._idle_stored) == 0:
            warnings.warn(
                f"attach: nothing has been stored in the last {_IDLE} steps; see tap.last: where no class is present "
                "look at the labels, where none is valid at the CAM (raw scores, the channels in the order of the "
                "labels)",
                stacklevel=4,
            )
        self._idle, self._idle_stored = 0, None

    def _check_wrapper(self, loss: Tensor) -> None:
        """Refuse what DistributedDataParallel would only refuse in the backward pass, and by another name; once."""
        if not self._recorder.keep_outputs:
            return
        outputs = self._recorder.outputs
        self._recorder.keep_outputs, self._recorder.outputs = False, None
        alone = _leaves([loss]) - _leaves(_tensors(outputs))
        if not alone:
            return
        names = [name for name, each in unwrapped(self._inner()).named_parameters() if each in alone]
        if names:
            raise RuntimeError(
                f"attach: {', '.join(names[:5])} are reached by the bank's loss and not by what the network returns, "
                "and DistributedDataParallel(find_unused_parameters=True) has given them up by then ('mark a variable "
                "ready only once'); wrap with static_graph=True instead, or return what the loss needs from forward()"
            )

    def _with_bank(self) -> ContextPrototypeBank:
        if self.bank is None:
            raise RuntimeError("attach: this needs a bank and none was given; pass bank= to attach")
        return self.bank


class _Views:
    """Features, CAM and labels of a loader's pictures, as often as they are asked for."""

    def __init__(
        self,
        tap: Tap,
        loader: Iterable[Any],
        run: Run,
        unpack: Callable[[Any], tuple[Tensor, Tensor]],
        keep: int,
    ) -> None:
        self._tap, self._loader, self._run, self._unpack, self._room = tap, loader, run, unpack, keep
        self._kept: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        size = 0
        for batch in self._loader:
            images, labels = self._unpack(batch)
            features, cam = self._tap._see(images, labels, self._run)
            found = features, cam, labels.to(features.device)
            size += sum(each.numel() * each.element_size() for each in found)
            # All or none: a shuffled loader gives other batches the next time.
            kept = [*kept, found] if size <= self._room else []
            yield found
        if kept:
            self._kept = kept


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, tuple | list) and len(batch) >= 2 and all(isinstance(each, Tensor) for each in batch[:2]):
        return batch[0], batch[1]
    got = type(batch).__name__
    if isinstance(batch, dict):
        got += f" with {', '.join(map(repr, batch))}"
    raise TypeError(
        f"attach: a batch must be a tuple of images and labels, got {got}; pass as unpack= a function that takes both "
        "out of it"
    )


def _released(bank: ContextPrototypeBank | None) -> Tap:
    """What is left of a tap in a copy or a file."""
    network = nn.Identity()
    tap = Tap(network, features="", bank=bank)
    tap.release()
    return tap


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [each for inner in value for each in _tensors(inner)] if isinstance(value, tuple | list) else []


def _leaves(roots: Iterable[Tensor]) -> set[Tensor]:
    """The parameters in the graph of some tensors."""
    found: set[Tensor] = set()
    seen: set[Any] = set()
    waiting = [each.grad_fn for each in roots if each.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.add(variable)
        waiting.extend(before for before, _ in node.next_functions if before is not None)
    return found


def attach(
    network: nn.Module,
    *,
    features: Name,
    cam: Name | Callable[[Tensor], Tensor] | None = None,
    bank: ContextPrototypeBank | None = None,
    channels: Sequence[int] | None = None,
    background: int | None = None,
    reshape: Reshape = None,
    forwards: int = 1,
    call: int | None = None,
    changed: bool = False,
) -> Tap:
    """Hook a network's features and CAM, so that a bank's loss and maps take one line; also a context manager.

    The network's code, parameters, ``state_dict`` and modes stay as they are: the tap reads what two layers see while
    the network runs. Leaving the ``with`` block, :meth:`Tap.release`, or forgetting the tap removes the hooks; a copy
    of the network, or one from ``torch.save``, has none. The bank is not part of the network: move it to the features'
    device, save and load it yourself; its ``train()`` and ``eval()`` are its own, as some networks' do nothing.

    A forward pass is a call of the network. The last one is kept, with its graph, until the next one,
    :meth:`Tap.clear` or release; one under ``no_grad`` does not take the place of a training pass whose loss has not
    been taken. What checkpointing computes again in the backward pass is not taken for another one. With gradient
    accumulation call :meth:`Tap.loss` once for each forward pass. In the first pass the CAM is compared with what the
    classifier said, and what lies between is told where they differ.

    ``DataParallel`` and ``DistributedDataParallel`` may come before or after; attach to the wrapped one where it looks
    for unused parameters. A network to be compiled is attached to before its first call. Under FSDP layers' inputs and
    outputs can be read, weights cannot.

    Args:
        network: Any module; wrappers of data-parallel and compiled networks are looked through.
        features: Name of the layer, as in ``named_modules()``, whose output is the features; with ``":input"`` behind
            it, whose first input is. Further parts tell where in a nested output, or which input: ``"encoder:0:2"``,
            ``"swin:last_hidden_state"``, ``"assign:input:1"``. Of a tuple the first tensor is taken. A pair of a name
            and a function of what stands there does for all else.
        cam: The CAM, before any ``detach``: the name of the layer that computes it, in the same way; the name of a
            linear layer or 1x1 convolution that sees pooled features, whose weights then give the CAM; or a function
            of the features ``[B, D, h, w]``. Raw scores, not normalized.
        bank: A :class:`protoseg.ContextPrototypeBank`; without one the tap only gives ``features`` and ``cam``.
        channels: The CAM's channel of each class in the order of the labels, such as ``range(1, 21)`` where channel 0
            is background. By default all channels, as they are.
        background: Channel of the CAM that scores background, which is then subtracted from the others: what is left
            is a class's log odds against it, where a softmax over both makes the published map. Needs ``channels``.
        reshape: For tokens ``[B, L, D]``: how many of them come before the patches, which lie like the picture; or,
            for features of any rank, a function to ``[B, D, h, w]``, for a CAM of the same rank as well.
        forwards: Forward passes that make one step (two views, several scales), each of all pictures.
        call: Which call of a layer is meant where it runs several times in one pass, from 0; by default the last one.
        changed: Take what a later layer has changed in place, as it is then.

    Returns:
        A :class:`Tap`, whose :meth:`Tap.loss` and :meth:`Tap.pacam` take the pictures' labels.

    Raises:
        ValueError: There is no such layer (near names are listed), ``channels`` is empty or below 0, ``background``
            is not a channel beside them, ``forwards`` is below 1, or ``call`` below 0.
        TypeError: A name is none, or a layer's output holds no tensor there.

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
        call=call,
        changed=changed,
    )
