"""What can be set in the recipe ``pgseg``, and its presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from protoseg.models.pgseg.zeroshot import Score
from protoseg.recipes.options import RunOptions, check_counts, read

__all__ = ["PRESETS", "PGSegOptions", "parse"]


@dataclasses.dataclass(kw_only=True)
class PGSegOptions(RunOptions):
    """Options of ``protoseg train pgseg``."""

    data: str = "scenes"
    """'scenes', a CSV, a VOC-layout folder, or shards"""
    output: Path = Path("runs/pgseg")
    """folder of the run"""
    stages: list[Literal["train", "score"]] = dataclasses.field(default_factory=lambda: ["train", "score"])  # type: ignore[assignment]
    """stages to run"""
    shard_pairs: int | None = None
    """pairs of an epoch on each process, with shards"""
    eval_data: str | None = None
    """'scenes' or a VOC-layout folder with masks; --data where it is one of these"""
    tune_split: str = ""
    """pictures to choose the threshold on; where not given tune for scenes, else train"""
    train_scenes: int = 8000
    """made scenes to train on"""
    eval_scenes: int = 300
    """made scenes to evaluate on"""
    preset: Literal["tiny", "lite0", "vit-s"] = "tiny"
    """sizes and schedule: of made scenes, of a trained backbone with few pictures, or the published ones"""

    npr: Literal["none", "image", "text", "both"] = "both"
    """prototypes: of image tokens, of words, both, or none"""
    npr_options: list[str] = dataclasses.field(default_factory=list)
    """prototypes: arguments of GMMPrototypeRegularizer as NAME=VALUE"""
    npr_start: float = 0.0
    """prototypes: share of the epochs before they count"""
    weight_image: float = 0.1
    """prototypes: of those of image tokens"""
    weight_text: float = 0.01
    """prototypes: of those of words"""
    weight_nouns: float
    """of the contrast of single nouns; 0 leaves it out"""
    nouns: list[str] = dataclasses.field(default_factory=list)
    """words of the captions that count, with tiny; all but stop words where none is given, of scenes the nouns"""

    background: list[str] = dataclasses.field(default_factory=list)
    """zero-shot: names that count as background"""
    score: Score
    """zero-shot: what groups are scored with"""

    size: int
    """side of the training pictures in pixels"""
    network: list[str] = dataclasses.field(default_factory=list)
    """fields of PGSegConfig and ImageConfig as NAME=VALUE"""
    smallest_crop: float
    """smallest share of a picture's area in a view"""
    epochs: int
    """of the training"""
    batch: int
    """pictures of a step, per process"""
    lr: float
    """learning rate"""
    final_lr: float
    """share of --lr at the end of the cosine"""
    warmup: float
    """share of the steps with a rising rate"""
    clip_grad: float = 5.0
    """largest norm of the gradient"""
    eval_every: int = 0
    """epochs between evaluations; 0: at the end only"""


# "vit-s" has the sizes, rates, epochs and smallest crop of the published configuration, not its other augmentation.
# "tiny" was chosen on made scenes.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "epochs": 6, "batch": 32, "lr": 1e-3, "final_lr": 0.0, "warmup": 0.05, "smallest_crop": 1.0, "size": 64,
        "weight_nouns": 1.0, "score": "cosine",
    },
    "lite0": {
        "epochs": 20, "batch": 32, "lr": 1e-3, "final_lr": 0.0, "warmup": 0.05, "smallest_crop": 1.0, "size": 224,
        "weight_nouns": 1.0, "score": "cosine",
    },
    "vit-s": {
        "epochs": 30, "batch": 256, "lr": 1e-4, "final_lr": 0.1, "warmup": 1 / 3, "smallest_crop": 0.08, "size": 224,
        "weight_nouns": 0.0, "score": "softmax",
    },
}  # fmt: skip


def parse(argv: Sequence[str] | None, description: str | None = None) -> PGSegOptions:
    """Read the options over the defaults of the preset."""
    args = read(
        PGSegOptions,
        argv,
        prog="protoseg train pgseg",
        description=description,
        choosers=("preset",),
        preset=_defaults,
    )
    if args.eval_data is None and (args.data == "scenes" or Path(args.data).is_dir()):
        args.eval_data = args.data
    args.tune_split = args.tune_split or ("tune" if args.eval_data == "scenes" else "train")
    check_counts(args, ("epochs", "batch", "size", "train_scenes", "eval_scenes"))
    return args


def _defaults(chosen: Mapping[str, Any]) -> dict[str, Any]:
    preset = chosen["preset"] or "tiny"
    if preset not in PRESETS:
        raise SystemExit(f"--preset: must be one of {', '.join(PRESETS)}, got {preset!r}")
    return {**PRESETS[preset], "preset": preset}
