"""candidates: which inputs and outputs of a network's layers look like features and a CAM."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from protoseg.tap.hooks import Hook, evaluating, unwrapped
from protoseg.tap.reading import grid_of, pointwise, pooled
from protoseg.tap.selectors import layers_of
from protoseg.utils import checks

__all__ = ["Candidate", "candidates"]

# Names that say a layer is there for the classes.
_TOLD = ("classifier", "fc", "head", "cam", "cls", "logit", "fc8")

# Below it there is neither a name nor a number that speaks for a pair.
_LEAST = 0.1


class Candidate(NamedTuple):
    """A pair of features and CAM that a network seems to have.

    Attributes:
        features: Name of the features, as :func:`protoseg.attach` takes it.
        cam: Name of the CAM's layer likewise.
        reshape: None for maps ``[B, D, h, w]``; how many tokens come before the patches; ``"channels_last"``.
        channels: ``D``.
        classes: ``C``, channels of the CAM; one more than the classes where background is one of them.
        grid: ``h`` and ``w``.
        agreement: How far the CAM's mean is what the classifier said of the picture, 1: to rounding, 0: not at all.
        score: By which candidates are ordered.
    """

    features: str
    cam: str
    reshape: int | str | None
    channels: int
    classes: int
    grid: tuple[int, int]
    agreement: float
    score: float

    @property
    def line(self) -> str:
        """The line to copy."""
        reshape = ""
        if self.reshape == "channels_last":
            reshape = ", reshape=lambda x: x.permute(0, 3, 1, 2)"
        elif self.reshape is not None:
            reshape = f", reshape={self.reshape}"
        return f'tap = attach(network, features="{self.features}", cam="{self.cam}"{reshape}, bank=bank)'


class _Place(NamedTuple):
    """A tensor that a layer was given or gave."""

    name: str
    tensor: Tensor
    order: int


class _Map(NamedTuple):
    """A place that can be seen as a map."""

    place: _Place
    reshape: int | str | None
    channels: int
    grid: tuple[int, int]
    mean: Tensor  # [B, D], over the places
    token: Tensor | None  # [B, D], the first token, which does not lie on the picture


class _Watch:
    """Hooks that keep what all layers see in one pass."""

    def __init__(self, network: nn.Module) -> None:
        self.places: list[_Place] = []
        self.layers: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        self._handles = []
        known: set[nn.Module] = set()
        for name, layer in layers_of(network).items():
            if name and layer not in known:
                known.add(layer)
                self._handles.append(layer.register_forward_hook(Hook(self, "saw", name), with_kwargs=True))

    def saw(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        for index, value in enumerate(given[:3]):
            # Without a number the first tensor is meant.
            self._keep(f"{name}:input" + (f":{index}" if index else ""), value)
        for path, value in _flat(output):
            self._keep(name + path, value)
            if given and not path and isinstance(layer, nn.Linear | nn.Conv2d):
                self.layers.append((name, layer, given[0], value))

    def _keep(self, name: str, value: Tensor) -> None:
        if value.is_floating_point() and value.dim() in (3, 4):
            self.places.append(_Place(name, value, len(self.places)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _flat(output: Any, path: str = "", depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested output, each with its way there; the first of a tuple needs none."""
    if isinstance(output, Tensor):
        yield path, output
    elif depth and isinstance(output, dict):
        for key, each in output.items():
            yield from _flat(each, f"{path}:{key}", depth - 1)
    elif depth and isinstance(output, tuple | list):
        for index, each in enumerate(output):
            plain = index == 0 and isinstance(each, Tensor)
            yield from _flat(each, path if plain else f"{path}:{index}", depth - 1)


@torch.no_grad()
def candidates(
    network: nn.Module,
    images: Tensor,
    *,
    run: Callable[[Tensor], Any] | None = None,
    count: int = 5,
) -> list[Candidate]:
    """Run a network once, in ``eval()``, and say which inputs and outputs of its layers may be features and CAM.

    A CAM is the output of a linear layer or convolution that sees a map, or whose input is the mean over one: then its
    weights make the CAM. It is looked for by comparing numbers, so random weights do, and pictures that are not square
    tell rows from columns.

    Args:
        network: Any module; wrappers of data-parallel and compiled networks are looked through.
        images: ``[B, 3, H, W]``, one or more, not all alike.
        run: Runs the network on them, where ``network(images)`` is not how it is called.
        count: How many are given.

    Returns:
        Best first; none where nothing looks like a CAM.

    Raises:
        ValueError: ``count`` is below 1, or ``images`` are no pictures.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> candidates(network, torch.rand(2, 3, 16, 12))[0].line
        'tap = attach(network, features="0", cam="3", bank=bank)'
    """
    checks.positive("candidates", "count", count)
    checks.shape("candidates", "images", images, ("B", "channels", "H", "W"))
    inner = unwrapped(network)
    watch = _Watch(inner)
    try:
        with evaluating(inner):
            output = (run or network)(images)
    finally:
        watch.remove()

    picture = (int(images.shape[-2]), int(images.shape[-1]))
    maps = [each for place in watch.places for each in _as_maps(place, picture)]
    returned = [each for _, each in _flat(output)]
    said = [each.flatten(1) for each in returned if pooled(each)]
    found = [*_by_weights(watch, maps, returned, picture), *_by_maps(watch, maps, returned, picture)]
    if said:
        # What the network says of a picture tells how many classes there are; background may be one more of a map.
        widths = {each.shape[1] for each in said}
        found = [each for each in found if each.classes in widths or each.classes - 1 in widths]
    found = [each for each in found if each.score >= _LEAST]
    found.sort(key=lambda each: -each.score)
    best: dict[tuple[str, str], Candidate] = {}
    for each in found:
        best.setdefault((each.features, each.cam), each)
    return list(best.values())[:count]


def _as_maps(place: _Place, picture: tuple[int, int]) -> Iterator[_Map]:
    tensor = place.tensor
    if tensor.dim() == 4:
        rows, columns = tensor.shape[-2:]
        if rows * columns > 1 and _lies_like(rows, columns, picture):
            yield _Map(place, None, tensor.shape[1], (rows, columns), tensor.mean((-2, -1)), None)
        rows, columns = tensor.shape[1:3]
        if rows * columns > 1 and _lies_like(rows, columns, picture):
            yield _Map(place, "channels_last", tensor.shape[3], (rows, columns), tensor.mean((1, 2)), None)
        return
    for prefix in range(min(tensor.shape[1], 33)):
        grid = grid_of(tensor.shape[1] - prefix, picture)
        if grid is not None and min(grid) > 1 and _lies_like(*grid, picture):
            token = tensor[:, 0] if prefix else None
            yield _Map(place, prefix, tensor.shape[2], grid, tensor[:, prefix:].mean(1), token)


def _lies_like(rows: int, columns: int, picture: tuple[int, int]) -> bool:
    """Whether a grid has the picture's proportions, up to a place on each side."""
    height, width = picture
    return (rows - 1) * width <= (columns + 1) * height and (columns - 1) * height <= (rows + 1) * width


def _by_weights(
    watch: _Watch, maps: list[_Map], returned: list[Tensor], picture: tuple[int, int]
) -> Iterator[Candidate]:
    """Classifiers that see a vector a picture, each with the maps that it may be the mean of."""
    for name, layer, given, gave in watch.layers:
        found = pointwise(layer)
        vector = given.flatten(1) if given.dim() == 2 or given.shape[-2:] == (1, 1) else None
        if found is None or vector is None or found[0].dim() != 4:
            continue
        classes, channels = found[0].shape[:2]
        for each in maps:
            if each.channels != channels or len(each.mean) != len(vector):
                continue
            agreement = _agreement(each.mean, vector)
            # A class token stands for its tokens, though no mean of them.
            if each.token is not None and _agreement(each.token, vector) > 0.99:
                agreement = max(agreement, 0.5)
            score = agreement + _bonus(name, gave, returned) + _late(each, watch, picture)
            yield _candidate(each, name, classes, agreement, score)


def _by_maps(watch: _Watch, maps: list[_Map], returned: list[Tensor], picture: tuple[int, int]) -> Iterator[Candidate]:
    """Classifiers that see every place, each with its input."""
    inputs = {each.place.name: each for each in maps if each.place.name.endswith(":input")}
    for name, layer, given, gave in watch.layers:
        each = inputs.get(f"{name}:input")
        classes = gave.shape[-1] if isinstance(layer, nn.Linear) else gave.shape[1]
        if each is None or given.dim() != gave.dim() or classes == each.channels:
            continue
        means = [one.mean for one in maps if one.place.tensor is gave and one.channels == classes]
        if not means:
            continue
        agreement = 0.0
        for logits in (one.flatten(1) for one in returned if pooled(one)):
            width = min(logits.shape[1], classes)
            pooled_maps = [means[0], gave.flatten(2).amax(-1)] if gave.dim() == 4 else means[:1]
            # Where background is first or last among the channels, the others still say what the logits are.
            agreement = max([agreement, *(_agreement(one[:, -width:], logits[:, -width:]) for one in pooled_maps)])
        score = agreement + _bonus(name, gave, returned) + _late(each, watch, picture)
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            score -= 0.05
        yield _candidate(each, name, classes, agreement, score)


def _candidate(each: _Map, cam: str, classes: int, agreement: float, score: float) -> Candidate:
    return Candidate(each.place.name, cam, each.reshape, each.channels, classes, each.grid, agreement, score)


def _agreement(mean: Tensor, vector: Tensor) -> float:
    """1 where two ``[B, D]`` are the same, 0 where one says nothing of the other."""
    if mean.shape != vector.shape:
        return 0.0
    off = (mean.float() - vector.float()).norm() / vector.float().norm().clamp_min(1e-12)
    return float((1 - off).clamp(0, 1))


def _bonus(name: str, gave: Tensor, returned: list[Tensor]) -> float:
    """For a layer whose output the network returns, or that has as many channels, or whose name says what it is."""
    same = any(one.numel() == gave.numel() and torch.equal(one.flatten(), gave.flatten()) for one in returned)
    classes = gave.shape[2] if gave.dim() == 3 else gave.shape[1]
    fits = classes in {one.shape[1] for one in returned if pooled(one)}
    told = any(part.startswith(_TOLD) for part in name.split("."))
    return 0.5 * same + 0.5 * fits + 0.1 * told


def _late(each: _Map, watch: _Watch, picture: tuple[int, int]) -> float:
    """Of equal maps the later one, outputs before inputs, and the one whose grid is most like the picture."""
    late = each.place.order / max(1, len(watch.places))
    depth = each.place.name.count(".")
    (rows, columns), (height, width) = each.grid, picture
    stretch = abs(math.log(height / rows * columns / width))
    return 0.05 * late - 0.004 * depth - 0.02 * (":input" in each.place.name) - 0.1 * stretch
