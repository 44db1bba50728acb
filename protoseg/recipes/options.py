"""The options of a run: read from the command line or a file, over the defaults of a preset.

tyro makes flags of dataclasses: lists are typed as words (``--scales 1 1.75``), ``--help`` shows the defaults of the
preset that was asked for, and the code reads typed fields.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from protoseg.utils.checks import near_names
from protoseg.utils.extras import require

__all__ = ["MaskOptions", "RunOptions", "check_counts", "check_scales", "check_threshold", "plain", "read"]

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


@dataclasses.dataclass(kw_only=True)
class RunOptions:
    """What every recipe asks for: data, and how the run is kept."""

    config: Path | None = None
    """file with options in YAML or JSON, such as RUN/config.json of another run; flags go before it"""
    data: str = "scenes"
    """'scenes', a VOC-layout folder, or any folder of pictures"""
    train_split: str = "train"
    """of a VOC-layout folder"""
    eval_data: str | None = None
    """folder of the evaluation pictures, with the same classes; --data where not given"""
    eval_split: str = "val"
    """of the folder; 'none': evaluate on none"""
    tags: str = "auto"
    """where tags come from; of a VOC-layout folder: csv, xml, masks, or auto: labels.csv, else XML; of any other: a
    table, COCO, LabelMe, CVAT or VOC files, or auto: what lies in the folder, else the names of its folders"""
    classes: Path | None = None
    """file of the classes' names, one a line in the order of the masks; by default those of the tags"""
    id_column: str | None = None
    """column of the pictures in a table of tags; guessed where not given"""
    tags_column: str | None = None
    """column of the tags; guessed where not given"""
    separator: str | None = None
    """what stands between the tags of a cell; guessed where not given"""
    mask_dir: str = "SegmentationClass"
    """folder of the true masks, such as SegmentationClassAug"""
    exif: Literal["upright", "leave"] = "upright"
    """whether pictures, and masks alike, are turned as EXIF says"""
    max_side: int | None = None
    """read pictures smaller whose longer side has more pixels; their masks have the full size again"""
    skip_broken: bool = False
    """leave out what cannot be used, and report it"""
    size: int
    """size of test pictures in pixels"""
    train_scenes: int = 600
    """made scenes to train on"""
    eval_scenes: int = 150
    """made scenes to evaluate on"""
    output: Path
    """folder of the run"""
    resume: bool = False
    """continue the run in --output where it stopped"""
    overwrite: bool = False
    """delete what stages that start anew left in --output before"""
    seed: int = 0
    """of everything that is drawn"""
    device: str = "auto"
    """auto, cpu, or whatever accelerate finds; 'cpu' forces the CPU"""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """mixed precision of what is trained"""
    workers: int = 0
    """processes that read pictures"""
    log_with: list[str] = dataclasses.field(default_factory=list)
    """trackers of accelerate that are told losses and scores, such as tensorboard or wandb"""
    stages: list[str]
    """stages to run"""


@dataclasses.dataclass(kw_only=True)
class MaskOptions(RunOptions):
    """What recipes ask for that go from maps to pseudo masks."""

    seed_map: str
    """map of the pseudo masks"""
    threshold: str = "otsu"
    """of the pseudo masks: otsu, sweep (uses masks), or a number"""
    refine: str = "pamr"
    """of the pseudo masks: pamr, none, or package.module:function"""
    crop: int
    """side of the training crops in pixels"""
    smallest_crop: float
    """smallest share of a picture's area in a crop"""
    epochs: int
    """of the training"""
    batch: int
    """pictures of a step, per process"""
    lr: float
    """learning rate"""


def read(
    kind: type[Options],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str | None,
    choosers: Sequence[str],
    preset: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> Options:
    """Read the options of a recipe.

    Args:
        kind: The dataclass.
        argv: The flags; those of the process where not given.
        prog: The command, for messages.
        description: What ``--help`` says first.
        choosers: Names of the options that decide on the preset.
        preset: Gives the defaults that the choosers' values ask for.

    Raises:
        SystemExit: A flag or the configuration is wrong, or help was asked for.
    """
    # What decides on the defaults is read first.
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    for name in ("config", *choosers):
        first.add_argument(f"--{name.replace('_', '-')}")
    given = {name: value for name, value in vars(first.parse_known_args(argv)[0]).items() if value is not None}

    stored = _stored(kind, Path(given["config"])) if "config" in given else {}
    chosen = {name: given.get(name, stored.get(name)) for name in choosers}
    defaults = kind(**{**preset(chosen), **stored})

    tyro = require("tyro", prog, "recipes")
    options: Options = tyro.cli(kind, prog=prog, description=description, args=argv, default=defaults)
    return options


def _stored(kind: type[DataclassInstance], path: Path) -> dict[str, Any]:
    """The options of a configuration file."""
    yaml = require("yaml", "--config", "recipes")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SystemExit(f"--config: {path} cannot be read ({error}); give a YAML or JSON file of options") from error
    if not isinstance(content, dict):
        raise SystemExit(f"--config: {path} must hold options by name, got {type(content).__name__}")

    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := [name for name in content if name not in fields]:
        near = near_names(str(unknown[0]), fields) or "see --help"
        raise SystemExit(f"--config: {path} has no option {unknown[0]!r} to give; near names: {near}")
    paths = {name for name, field in fields.items() if "Path" in str(field.type)}
    return {
        name: Path(value) if name in paths and value is not None else value
        for name, value in content.items()
        if name not in ("config", "resume", "overwrite")
    }


def plain(options: DataclassInstance) -> dict[str, Any]:
    """The options as they are written to ``config.json``."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}


def check_counts(options: RunOptions, names: Sequence[str]) -> None:
    """Stop where a number that has to be at least 1 is not."""
    for name in names:
        if getattr(options, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")


def check_scales(scales: Sequence[float]) -> None:
    """Stop where ``--scales`` has none, or one that is not above 0."""
    if not scales or min(scales) <= 0:
        raise SystemExit(f"--scales: expected one or more numbers above 0, got {list(scales)}")


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
