"""The flags that the recipes ``cpal`` and ``vpl`` share, and what is wrong with them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_shared(parser: argparse.ArgumentParser, *, stages: Sequence[str], output: str, eval_scenes: int) -> None:
    """Add the flags of data, stages and the run."""
    add = parser.add_argument
    add("--data", default="scenes", help="'scenes' or a VOC-layout folder (default: %(default)s)")
    add("--train-split", default="train")
    add("--eval-data", help="folder of the evaluation pictures, with the same classes (default: --data)")
    add("--eval-split", default="val")
    add("--tags", choices=("auto", "csv", "xml", "masks"), default="auto", help="auto: labels.csv, else VOC's XML")
    add("--mask-dir", default="SegmentationClass", help="folder of the true masks, such as SegmentationClassAug")
    add("--stages", nargs="+", choices=stages, default=list(stages))
    add("--output", type=Path, default=Path(output))
    add("--resume", action="store_true", help="continue the run in --output where it stopped")
    add("--overwrite", action="store_true", help="delete what stages that start anew left in --output before")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, or whatever accelerate finds; 'cpu' forces the CPU")
    add("--precision", choices=("no", "fp16", "bf16"), default="no", help="of what is trained")
    add("--workers", type=int, default=0, help="processes that read pictures")
    add("--skip-broken", action="store_true", help="leave out pictures that cannot be read, and report them")
    add("--train-scenes", type=int, default=600)
    add("--eval-scenes", type=int, default=eval_scenes)


def check_counts(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Stop where a number that has to be at least 1 is not."""
    for name in names:
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")


def check_threshold(threshold: str) -> None:
    """Stop where ``--threshold`` is neither a rule nor a number between 0 and 1."""
    if threshold in ("otsu", "sweep"):
        return
    try:
        valid = 0 <= float(threshold) <= 1
    except ValueError:
        valid = False
    if not valid:
        raise SystemExit(f"--threshold: expected otsu, sweep or a number in 0..1, got {threshold!r}")
