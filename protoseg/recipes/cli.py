"""The command ``protoseg``; what a subcommand needs is imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

__all__ = ["main"]

# The module that runs each recipe, and what it is.
RECIPES = {
    "cpal": ("protoseg.recipes.cpal", "masks from image-level tags, with a bank of context prototypes (CPAL)"),
    "pgseg": ("protoseg.recipes.pgseg", "masks for classes by name, from pictures with sentences (PGSeg)"),
    "vpl": ("protoseg.recipes.vpl", "masks from image-level tags, by a frozen CLIP and prototypes in it (VPL)"),
}
# Commands of their own.
COMMANDS = {
    "masks": ("protoseg.recipes.masks", "masks from a folder of pictures and a table of tags, in one command"),
    "check": ("protoseg.recipes.check", "everything that is wrong with a folder of pictures and tags, in one list"),
    "predict": ("protoseg.recipes.predict", "masks of new pictures, by the network of a run"),
    "convert": ("protoseg.recipes.convert", "masks as COCO, LabelMe, color PNG or IRN's .npy"),
    "segment": ("protoseg.recipes.segment", "masks of a folder of pictures, for classes by name, without training"),
    "layers": ("protoseg.recipes.layers", "which layers of a network can be named as features and CAM"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand; its own flags stand behind it."""
    parser = argparse.ArgumentParser(prog="protoseg", description="Prototypes for weakly supervised segmentation.")
    parser.add_argument("--version", action="version", version=f"protoseg {version('protoseg')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train a paper's network and make masks", description="Train.")
    recipes = train.add_subparsers(dest="recipe", metavar="RECIPE", required=True)
    for name, (_, what) in RECIPES.items():
        # Its flags, --help among them, are read by the recipe.
        recipes.add_parser(name, help=what, add_help=False)

    for name, (_, what) in COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)

    arguments = list(sys.argv[1:] if argv is None else argv)
    words = 1 if arguments[:1] and arguments[0] in COMMANDS else 2
    chosen = parser.parse_args(arguments[:words])
    module, _ = COMMANDS[chosen.command] if words == 1 else RECIPES[chosen.recipe]
    importlib.import_module(module).main(arguments[words:])
