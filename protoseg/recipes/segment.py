"""Masks of a folder of pictures, for classes by name: nothing is trained, and no tags are needed.

    protoseg segment PICTURES --classes cat "traffic light"                 # the pocket model, from pip
    protoseg segment PICTURES --classes cat dog --clip ViT-B-16 --pretrained openai
    accelerate launch -m protoseg segment PICTURES --classes cat dog        # several processes share the pictures

Writes ``masks/NAME.png`` (an index per pixel, 0 = background, with PASCAL VOC's colors), ``classes.txt``,
``config.json``, ``summary.json`` and, with ``--overlays``, ``overlays/NAME.jpg``. Pictures that the model sees at one
size go through it together; which those are does not depend on the number of processes, so neither do the masks.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tyro.conf import Positional

from protoseg.clip import BACKGROUND, FrozenCLIP, background_names, readable, segment_batch
from protoseg.data import UnreadableFileError, load_image, save_mask
from protoseg.data.images import ENDINGS, is_picture, pillow, read_header
from protoseg.recipes.files import peak_memory_mb, to_replace, write_json
from protoseg.recipes.options import plain, read
from protoseg.recipes.session import share, start_engine
from protoseg.report import overlay
from protoseg.utils.files import replacing

__all__ = ["SegmentOptions", "main"]

FILES = ("config.json", "summary.json", "classes.txt", "masks/**/*.png", "overlays/**/*.jpg")  # what a run leaves


@dataclasses.dataclass(kw_only=True)
class SegmentOptions:
    """Options of ``protoseg segment``."""

    pictures: Positional[Path] = Path()
    """folder of the pictures; those in its folders count as well"""
    config: Path | None = None
    """file with options in YAML or JSON, such as config.json of another run; flags go before it"""
    classes: list[str] = dataclasses.field(default_factory=list)
    """names of the classes, as people write them; quote those with spaces"""
    output: Path = Path("runs/segment")
    """folder of the masks"""
    overlays: bool = False
    """also write the pictures with their masks laid over them"""
    overwrite: bool = False
    """delete what an earlier run left in --output"""

    clip: str = "pocket"
    """pocket, or open_clip's name, such as ViT-B-16"""
    pretrained: str | None = None
    """open_clip's tag, such as openai, or the path of a checkpoint"""
    clip_precision: str = "fp32"
    """fp32, fp16 or bf16, of open_clip's models"""
    size: int
    """shorter side in pixels that the model sees"""
    templates: list[str] = dataclasses.field(default_factory=list)
    """sentences with {} for a name; the model's first where none is given"""
    background: bool = True
    """compare with what else pictures show"""
    background_names: list[str] = dataclasses.field(default_factory=list)
    """what else pictures show; CLIP-ES's list where none is given"""
    threshold: float = 0.4
    """least score of a pixel that is not background, of 0..1"""
    presence: float
    """least probability of a class that is in a picture"""
    attentions: int
    """blocks whose attention makes the affinity; 0 leaves it out"""

    batch: int = 8
    """most pictures that go through the model together"""
    device: str = "auto"
    """auto, cpu, or whatever accelerate finds; 'cpu' forces the CPU"""


class Found(NamedTuple):
    """What a process made.

    Attributes:
        masks: How many.
        empty: Names of the pictures whose mask is background throughout.
        broken: Names of the pictures that could not be read, and why.
        classes: In how many masks each class is.
        peak: Most memory in MiB.
    """

    masks: int
    empty: list[str]
    broken: dict[str, str]
    classes: dict[str, int]
    peak: float


def defaults(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What the model asks for."""
    if chosen["clip"] in (None, "pocket"):
        return {"size": 288, "presence": 0.1, "attentions": 0}
    return {"size": 512, "presence": 0.1, "attentions": 8}


def find_pictures(folder: Path) -> list[Path]:
    """Paths of the pictures in a folder, from there; two that would have one mask are an error."""
    if not folder.is_dir():
        raise SystemExit(f"PICTURES: {folder} is no folder; give the one that holds the pictures")
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if is_picture(file.name))
    if not files:
        raise SystemExit(f"PICTURES: {folder} holds no picture ({', '.join(ENDINGS)})")
    times = Counter(file.with_suffix("") for file in files)
    if twice := [str(name) for name, count in times.items() if count > 1]:
        raise SystemExit(
            f"PICTURES: {folder} holds several pictures of the name {twice[0]}, which would have one mask; rename them"
        )
    return files


def check(args: SegmentOptions) -> None:
    """Stop for what cannot work, before the model is loaded."""
    if not args.classes:
        raise SystemExit('--classes: expected names, such as --classes cat "traffic light"')
    if twice := [name for name, count in Counter(map(readable, args.classes)).items() if count > 1]:
        raise SystemExit(f"--classes: {twice[0]!r} is named twice; name each class once")
    if len(args.classes) > 254:
        raise SystemExit(f"--classes: a mask of 8 bits has room for 254 classes, got {len(args.classes)}")
    for flag, value, low in (
        ("--batch", args.batch, 1),
        ("--size", args.size, 1),
        ("--attentions", args.attentions, 0),
    ):
        if value < low:
            raise SystemExit(f"{flag}: expected at least {low}, got {value}")
    if args.pretrained and args.clip == "pocket":
        raise SystemExit("--pretrained: needs --clip, the name of the model that these weights are of")
    if args.output.resolve().is_relative_to(args.pictures.resolve()):
        raise SystemExit(f"--output: {args.output} lies in PICTURES, whose masks would be pictures of the next run")


def prepare_output(args: SegmentOptions, accelerator: Accelerator) -> None:
    """Make room for the masks; what is not known to be an earlier run's is never deleted."""
    ours = (args.output / "config.json").exists() and (args.output / "classes.txt").exists()
    replaced = to_replace(args.output, FILES, overwrite=args.overwrite and ours, resumes=False)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for file in replaced:
            file.unlink()
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / "config.json", plain(args))
        with replacing(args.output / "classes.txt") as file:
            file.write_text("\n".join(["background", *args.classes]) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()


def plan(args: SegmentOptions, files: Sequence[Path]) -> list[list[Path]]:
    """Batches of pictures whose headers tell the same size; what tells none stands alone."""
    batches: list[list[Path]] = []
    by_size: dict[tuple[int, int], list[Path]] = {}
    for file in files:
        try:
            by_size.setdefault(read_header(args.pictures / file).upright, []).append(file)
        except UnreadableFileError:  # noqa: PERF203
            batches.append([file])  # where it is read, the error will say why it is none
    for some in by_size.values():
        batches += [some[first : first + args.batch] for first in range(0, len(some), args.batch)]
    return batches


def read_batch(args: SegmentOptions, batch: Sequence[Path], broken: dict[str, str]) -> list[list[tuple[Path, Tensor]]]:
    """The pictures of a batch that can be read, in groups of one size; the others are noted."""
    groups: dict[torch.Size, list[tuple[Path, Tensor]]] = {}
    for file in batch:
        try:
            image = load_image(args.pictures / file)
        except UnreadableFileError as error:
            broken[str(file)] = str(error)
            continue
        groups.setdefault(image.shape, []).append((file, image))
    return list(groups.values())


def prototypes(clip: FrozenCLIP, args: SegmentOptions, accelerator: Accelerator) -> tuple[Tensor, Tensor | None]:
    """What pictures are compared with: the classes, and what else they show."""
    classes = clip.text_prototypes([readable(name) for name in args.classes], args.templates or None)
    if not args.background:
        return classes, None
    others, left_out = background_names(args.classes, args.background_names or BACKGROUND)
    if left_out:
        accelerator.print(f"background prompts left out, as they are classes: {', '.join(left_out)}")
    return classes, clip.text_prototypes(others, args.templates or None) if others else None


def segment_pictures(
    clip: FrozenCLIP,
    classes: Tensor,
    background: Tensor | None,
    batches: Sequence[Sequence[Path]],
    args: SegmentOptions,
    accelerator: Accelerator,
) -> Found:
    """Write the masks of this process's batches."""
    empty: list[str] = []
    broken: dict[str, str] = {}
    there: Counter[str] = Counter()
    masks = 0
    for index in share(len(batches), "masks", accelerator):
        for pairs in read_batch(args, batches[index], broken):
            found = segment_batch(
                clip,
                [image for _, image in pairs],
                classes,
                background,
                threshold=args.threshold,
                presence=args.presence,
                attentions=args.attentions,
                short_side=args.size,
            )
            for (file, image), each in zip(pairs, found, strict=True):
                mask = each.mask.cpu()
                write(args, file, image, mask)
                masks += 1

                values = [value for value in torch.unique(mask).tolist() if value]
                there.update(args.classes[value - 1] for value in values)
                if not values:
                    empty.append(str(file))
    return Found(masks, empty, broken, dict(there), peak_memory_mb(accelerator.device))


def write(args: SegmentOptions, file: Path, image: Tensor, mask: Tensor) -> None:
    """Write a picture's mask and, where asked for, its overlay."""
    target = args.output / "masks" / file.with_suffix(".png")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_mask(target, mask)
    if not args.overlays:
        return
    target = args.output / "overlays" / file.with_suffix(".jpg")
    target.parent.mkdir(parents=True, exist_ok=True)
    pixels = overlay(image, mask).permute(1, 2, 0).contiguous().numpy()
    with replacing(target) as temporary:
        pillow().fromarray(pixels).save(temporary, "JPEG", quality=90)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Write the masks and say what there is; returns the summary."""
    args: SegmentOptions = read(
        SegmentOptions,
        argv,
        prog="protoseg segment",
        description=__doc__,
        choosers=("clip",),
        preset=defaults,
    )
    check(args)
    files = find_pictures(args.pictures)
    accelerator = start_engine(args.device)
    if args.clip == "pocket":
        clip = FrozenCLIP.pocket(device=accelerator.device)
    else:
        clip = FrozenCLIP.load(args.clip, args.pretrained, device=accelerator.device, precision=args.clip_precision)
    # Names that do not suit stop here, before an older run's files go.
    classes, background = prototypes(clip, args, accelerator)
    prepare_output(args, accelerator)

    began = time.monotonic()
    parts = gather_object([segment_pictures(clip, classes, background, plan(args, files), args, accelerator)])
    seconds = time.monotonic() - began

    broken = {name: reason for part in parts for name, reason in part.broken.items()}
    masks = sum(part.masks for part in parts)
    there = sum((Counter(part.classes) for part in parts), Counter[str]())
    summary = {
        "masks": masks,
        "empty": sorted(name for part in parts for name in part.empty),
        "broken": dict(sorted(broken.items())),
        "masks with": {name: there[name] for name in args.classes},
        "seconds": round(seconds, 2),
        "pictures per second": round(masks / seconds, 2),
        "processes": accelerator.num_processes,
        "peak_memory_mb": round(max(part.peak for part in parts), 1),
    }
    if accelerator.is_main_process:
        write_json(args.output / "summary.json", summary)
        print(
            f"{masks} masks in {args.output / 'masks'}, {len(summary['empty'])} empty, "
            f"{summary['pictures per second']} pictures per second"
        )
        print("masks with " + ", ".join(f"{name}: {count}" for name, count in summary["masks with"].items()))
        if never := [name for name, count in summary["masks with"].items() if not count and masks]:
            print(f"found nowhere: {', '.join(never)}; try other words, or a --presence below {args.presence}")
        if args.overlays:
            print(f"overlays in {args.output / 'overlays'}")
        for name, reason in summary["broken"].items():
            print(f"not read: {name}: {reason}")
    accelerator.end_training()
    return summary


if __name__ == "__main__":
    main()
