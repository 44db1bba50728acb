"""What a name says: a layer, its inputs or outputs, and where in them the tensor is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from protoseg.utils import checks

__all__ = ["Name", "Selector", "find_layer", "layers_of", "structure"]

Name = str | tuple[str, Callable[[Any], Any]]
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


class Selector(NamedTuple):
    """A name such as ``"encoder"``, ``"head:input"``, ``"assign:input:1"`` or ``"encoder:output:last_hidden_state"``.

    Attributes:
        layer: As in ``named_modules()``.
        side: ``"input"`` or ``"output"``.
        path: Indices and keys, from the outermost structure to the tensor.
        function: Takes the tensor out instead.
    """

    layer: str
    side: str
    path: tuple[str, ...]
    function: Callable[[Any], Any] | None = None

    @classmethod
    def parse(cls, kind: str, name: Name) -> Selector:
        """Read a name, or a pair of a name and a function of what stands there.

        Args:
            kind: The argument's name, for the message.
            name: As the user wrote it.

        Raises:
            TypeError: It is neither.
        """
        function = None
        if isinstance(name, tuple) and len(name) == 2 and isinstance(name[0], str) and callable(name[1]):
            name, function = name
        if not isinstance(name, str):
            raise TypeError(
                f"attach: {kind} must be a layer's name, or a pair of a name and a function of what the layer gives, "
                f"got {name!r}"
            )
        layer, *path = name.split(":")
        side = "output"
        if path and path[0] in ("input", "output"):
            side = path.pop(0)
        return cls(layer, side, tuple(path), function)

    @property
    def name(self) -> str:
        """As the user wrote it."""
        inner = [self.side] if self.side == "input" else []
        return ":".join([self.layer, *inner, *self.path])

    def pick(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
        """Take the tensor from a layer's inputs or output; of a tuple of tensors the first.

        Raises:
            TypeError: There is none, or it is not clear which; the message lists what there is.
        """
        value: Any = output
        if self.side == "input":
            value = _Inputs(args, kwargs)
        for step in self.path:
            value = self._inside(value, step)
        if isinstance(value, _Inputs):
            value = (*args, *kwargs.values())
        if self.function is not None:
            value = self.function(value)

        if isinstance(value, Tensor):
            return value
        # What is no tensor (None, a number, the size of the grid) may well stand beside one.
        if isinstance(value, tuple | list):
            for each in value:
                if isinstance(each, Tensor):
                    return each
        raise TypeError(
            f"attach: {self.name!r} must give a tensor or a tuple with one, got {structure(value)}; say which behind "
            f"a colon, as in {self.name + ':' + _first_path(value)!r}, or pass ({self.layer!r}, a function of it)"
        )

    def _inside(self, value: Any, step: str) -> Any:
        index = int(step) if step.lstrip("-").isdigit() else None
        try:
            if isinstance(value, _Inputs):
                return value[step] if index is None else value[index]
            # Also an object's attribute, as a dataclass has them.
            if index is None and not isinstance(value, Mapping):
                return getattr(value, step)
            if isinstance(value, Mapping) and index is not None and step not in value:
                return list(value.values())[index]
            return value[step if isinstance(value, Mapping) or index is None else index]
        except (AttributeError, IndexError, KeyError, TypeError):
            raise TypeError(f"attach: {self.name!r} has no {step!r}, got {structure(value)}") from None


class _Inputs:
    """A layer's inputs, in the order of the call or by name."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs

    def __getitem__(self, step: int | str) -> Any:
        if isinstance(step, str):
            return self.kwargs[step]
        return (*self.args, *self.kwargs.values())[step]


def structure(value: Any, depth: int = 3) -> str:
    """Say in a line what a nested output holds: its keys, and the shapes of its tensors."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, _Inputs):
        return structure({**dict(enumerate(value.args)), **value.kwargs}, depth)
    if depth == 0 or not isinstance(value, Mapping | tuple | list):
        return type(value).__name__
    pairs: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
    inner = ", ".join(f"{key}: {structure(each, depth - 1)}" for key, each in list(pairs)[:8])
    return f"{type(value).__name__} of {{{inner}}}"


def _first_path(value: Any) -> str:
    """The way to the first tensor in a structure."""
    if isinstance(value, Mapping | tuple | list):
        pairs: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, each in pairs:
            if isinstance(each, Tensor):
                return str(key)
            inner = _first_path(each)
            if inner != "0":
                return f"{key}:{inner}"
            if isinstance(each, tuple | list) and each and isinstance(each[0], Tensor):
                return f"{key}:0"
    return "0"


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """All layers by name, a layer with several names under each; what wrappers put into the names is left out."""
    found: dict[str, nn.Module] = {}
    for name, layer in network.named_modules(remove_duplicate=False):
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        found[plain] = layer
    return found


def find_layer(network: nn.Module, kind: str, name: str) -> nn.Module:
    """Find a layer by its name.

    Raises:
        ValueError: There is none; near names are listed.
    """
    layers = layers_of(network)
    if name in layers:
        return layers[name]
    names = [each for each in layers if each]
    last = name.rpartition(".")[2]
    near = [each for each in names if each.rpartition(".")[2] == last][:5]
    near += [each for each in checks.near_names(name, names).split(", ") if each and each not in near]
    listed = ", ".join(near[:5] or names[-5:]) or "none at all"
    raise ValueError(f"attach: {kind} must name a layer as in named_modules(), got {name!r}; near names: {listed}")
