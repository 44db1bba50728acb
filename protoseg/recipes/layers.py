"""``protoseg layers``: which layers of a network can be named as features and CAM."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from protoseg.tap import candidates
from protoseg.utils import checks

__all__ = ["build", "main"]


def build(target: str) -> nn.Module:
    """Build the network that ``MODULE:BUILDER`` names: a module, or a function that returns one without arguments.

    Raises:
        SystemExit: There is none; the message says what there is.
    """
    module_name, colon, builder = target.partition(":")
    if not colon or not builder:
        raise SystemExit(f"protoseg layers: expected MODULE:BUILDER, such as net.resnet50_cam:Net, got {target!r}")
    try:
        # As python does for a script, so that a code base's own folders are found.
        sys.path.insert(0, str(Path.cwd()))
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"protoseg layers: {module_name} cannot be imported: {error}; run it where it can") from error
    finally:
        sys.path.remove(str(Path.cwd()))

    found = module
    for part in builder.split("."):
        if not hasattr(found, part):
            near = checks.near_names(part, dir(found)) or "none"
            raise SystemExit(f"protoseg layers: {module_name} has no {builder!r}; near names: {near}")
        found = getattr(found, part)
    network = found if isinstance(found, nn.Module) else _called(target, found)
    if not isinstance(network, nn.Module):
        raise SystemExit(f"protoseg layers: {target} must give a torch.nn.Module, got {type(network).__name__}")
    return network


def _called(target: str, builder: object) -> object:
    if not callable(builder):
        return builder
    try:
        return builder()
    except TypeError as error:
        raise SystemExit(
            f"protoseg layers: {target} must be callable without arguments: {error}; write a function that passes them"
        ) from error


def main(argv: Sequence[str]) -> None:
    """Run a network once on random pictures, and print what looks like features and CAM, best first."""
    parser = argparse.ArgumentParser(prog="protoseg layers", description=main.__doc__)
    parser.add_argument("target", metavar="MODULE:BUILDER", help="a network, or a function that builds it")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 160), metavar=("H", "W"), help="of the pictures")
    parser.add_argument("--count", type=int, default=5, help="how many pairs to print")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    network = build(args.target)
    found = candidates(network, torch.rand(2, 3, *args.size), count=args.count)
    if not found:
        raise SystemExit(
            "protoseg layers: nothing looks like a CAM; look at named_modules(), and pass a function of the features"
        )
    for number, each in enumerate(found, 1):
        rows, columns = each.grid
        print(
            f"{number}. features [B, {each.channels}, {rows}, {columns}], CAM of {each.classes} channels, agrees with "
            f"the classifier by {100 * each.agreement:.0f} %"
        )
        print(f"   {each.line}")
