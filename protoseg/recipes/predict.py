"""Masks of new pictures, by the network and the bank of a run.

    protoseg predict RUN PICTURES                   the network says which classes are there
    protoseg predict RUN PICTURES --tags TABLE      a table says it

RUN is the folder of `protoseg masks` or `protoseg train cpal`; it may have been moved, and nothing is written to it.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from protoseg import ContextPrototypeBank
from protoseg.data import PictureFolder, Sample, TaggedPictures, save_mask, survey
from protoseg.data.files import read_classes
from protoseg.data.images import ENDINGS
from protoseg.data.names import PictureIndex, list_files
from protoseg.functional import load_refiner
from protoseg.models.amn import AMNNetwork
from protoseg.recipes.cpal_heads import build, colors
from protoseg.recipes.cpal_options import CPALOptions, parse
from protoseg.recipes.cpal_stages import Network, infer, picture_maps
from protoseg.recipes.files import keywords, load_checkpoint, write_classes
from protoseg.recipes.masks import MAX_SIDE
from protoseg.recipes.pictures import Pictures, scaled_image
from protoseg.recipes.pseudo_masks import mask_of, nearest
from protoseg.recipes.session import share, start_engine
from protoseg.utils.files import replacing

__all__ = ["load_run", "main", "predict_tags"]


def load_run(run: Path, device: str = "auto") -> tuple[Network, CPALOptions, tuple[str, ...]]:
    """Load the network and the bank of a run, its flags and the names of its classes.

    Args:
        run: The folder of the run.
        device: ``"cpu"``, or what accelerate finds.

    Raises:
        SystemExit: The folder holds no run of ``cpal``.
    """
    names = ("config.json", "classes.txt", "checkpoint/classify.pt", "checkpoint/bank.pt")
    needed = [run / name for name in names]
    if missing := [str(path) for path in needed if not path.is_file()]:
        raise SystemExit(f"protoseg predict: {run} is no folder of a finished run: no {', '.join(missing)}")
    args = parse(["--config", str(run / "config.json"), "--device", device])
    classes, _ = read_classes(run / "classes.txt")

    network = build(args, len(classes))
    bank = ContextPrototypeBank(len(classes), network.channels, **keywords("--bank", args.bank))
    network.load_state_dict(load_checkpoint(needed[2])["model"])
    bank.load_state_dict(load_checkpoint(needed[3])["bank"])
    return Network(network.eval(), bank.eval()), args, classes


@torch.no_grad()
def predict_tags(net: Network, image: Tensor, args: CPALOptions, device: torch.device) -> Tensor:
    """Probabilities ``[C]`` of the classes in a picture ``[3, H, W]`` uint8, the mean over it and its mirror image."""
    if isinstance(net.cam, AMNNetwork):
        raise SystemExit("protoseg predict: a network of --head amn is told the tags; give --tags")
    mean, std = colors(net.cam)
    views = scaled_image(image, args.size, net.cam.backbone.multiple, mean, std).to(device)
    logits: Tensor = net.cam(torch.cat([views, views.flip(-1)])).logits
    return logits.float().sigmoid().mean(0).cpu()


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, write the masks and say where they are."""
    parser = argparse.ArgumentParser(
        prog="protoseg predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("pictures", help="folder of pictures, sub-folders included")
    parser.add_argument("--tags", help="table of tags; without it the network decides")
    parser.add_argument("--probability", type=float, default=0.5, help="of a class to be there (default: %(default)s)")
    parser.add_argument("--threshold", type=float, help="of the maps; by default that of the run's masks")
    parser.add_argument("--output", type=Path, help="folder to write; by default runs/predict-PICTURES")
    parser.add_argument("--overwrite", action="store_true", help="replace masks that --output holds")
    parser.add_argument("--resume", action="store_true", help="keep masks that --output holds, and make the others")
    parser.add_argument("--skip-broken", action="store_true", help="leave out pictures that cannot be read")
    parser.add_argument("--max-side", type=int, default=MAX_SIDE, help="read larger pictures smaller (0: never)")
    parser.add_argument("--device", default="auto", help="auto or cpu")
    args = parser.parse_args(argv)

    net, options, classes = load_run(args.run, args.device)
    threshold = _threshold(args)
    folder = _open(args, classes)
    pictures = _checked(folder, args)
    output = args.output or Path("runs") / f"predict-{Path(args.pictures).resolve().name}"
    kept = {path.relative_to(output / "masks").with_suffix("").as_posix() for path in output.glob("masks/**/*.png")}
    if kept and not (args.overwrite or args.resume):
        raise SystemExit(f"--output: {output} holds {len(kept)} masks; take another, or say --resume or --overwrite")

    accelerator = start_engine(args.device)
    net.cam.to(accelerator.device)
    net.bank.to(accelerator.device)
    refiner = load_refiner(options.refine)
    (output / "masks").mkdir(parents=True, exist_ok=True)
    write_classes(output, classes)
    rows: list[tuple[str, str]] = []
    empty = 0
    for index in share(len(pictures), "predict", accelerator):
        if args.resume and pictures.ids[index] in kept:
            continue
        sample = pictures[index]
        if args.tags is None:
            found = predict_tags(net, sample.image, options, accelerator.device)
            sample = sample._replace(labels=(found > args.probability).float())
        mask = mask_of(_maps(net, sample, options, accelerator), sample, refiner, threshold, accelerator.device)
        path = output / "masks" / f"{sample.id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_mask(path, mask if sample.size is None else nearest(mask, sample.size))
        rows.append((sample.id, ";".join(classes[place] for place in sample.labels.nonzero().flatten().tolist())))
        empty += not mask.any()
    _write_tags(output / f"tags-{accelerator.process_index}.csv", rows)
    accelerator.print(
        f"{len(rows)} masks in {output / 'masks'} ({empty} empty), tags in {output}"
        + (f", {len(kept)} kept" if args.resume and kept else "")
        + (f", {len(pictures.broken)} left out" if pictures.broken else "")
    )


@torch.no_grad()
def _maps(net: Network, sample: Sample, options: CPALOptions, accelerator: Accelerator) -> Tensor:
    """Maps ``[P, h, w]`` of the classes that a picture has, in the precision in which a run keeps them."""
    features, cam = infer(net.cam, sample, options, accelerator)
    labels = sample.labels[None].to(features.device)
    maps = picture_maps(net.bank, features, cam, labels, [options.seed_map])[options.seed_map]
    return maps[labels[0].nonzero().flatten()].half().cpu()


def _threshold(args: argparse.Namespace) -> float:
    if args.threshold is not None:
        return float(args.threshold)
    path = args.run / "metrics.json"
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))["pseudo_masks"]["train"]["threshold"]
        return float(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--threshold: {path} has none ({error!r}); give a number in 0..1") from error


def _open(args: argparse.Namespace, classes: tuple[str, ...]) -> TaggedPictures:
    """The pictures, with tags from a table or without."""
    side = args.max_side or None
    root = Path(args.pictures)
    try:
        if args.tags is not None:
            return PictureFolder(root, args.tags, classes=classes, max_side=side)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; give the one that holds the pictures")
        index = PictureIndex(list_files(root, ENDINGS))
        if not len(index):
            raise FileNotFoundError(f"{root}: no pictures in it or below")
        return TaggedPictures("predict", root, index.names, index.paths, [()] * len(index), classes, max_side=side)
    except (OSError, ValueError) as error:
        raise SystemExit(f"protoseg predict: {error}") from error


def _checked(folder: TaggedPictures, args: argparse.Namespace) -> Pictures:
    """The pictures less those that cannot be read, if these may be left out."""
    found = survey({"pictures": folder})
    if found.faults and not args.skip_broken:
        faults = "\n".join(f"  {number}. {fault}" for number, fault in enumerate(found.faults, 1))
        raise SystemExit(f"{len(found.faults)} faults:\n{faults}\nmend these, or say --skip-broken")
    pictures = Pictures(folder, keep=0)
    if found.broken["pictures"]:
        pictures.leave_out(found.broken["pictures"])
    return pictures


def _write_tags(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    with replacing(path) as whole, whole.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([("id", "labels"), *rows])


if __name__ == "__main__":
    main(sys.argv[1:])
