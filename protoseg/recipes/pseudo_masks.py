"""From maps to masks, as the recipes ``cpal`` and ``vpl`` do it: seeds, scores, pseudo masks, the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from protoseg.data import Sample, load_mask, save_mask
from protoseg.functional import Refiner, load_refiner, otsu_threshold, to_mask, with_background
from protoseg.metrics import ConfusionMatrix, RegionContrast, ThresholdSweep
from protoseg.recipes.options import MaskOptions
from protoseg.recipes.pictures import Pictures
from protoseg.recipes.session import share
from protoseg.report import Picture, write_report
from protoseg.utils.files import replacing


@torch.no_grad()
def score_maps(
    splits: Mapping[str, Pictures],
    maps_of: Callable[[Sample], tuple[Mapping[str, Tensor], Tensor]],
    names: Sequence[str],
    args: MaskOptions,
    accelerator: Accelerator,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write each training picture's maps and score those in ``names`` at every threshold, in one pass over a split.

    Args:
        splits: ``train`` and others.
        maps_of: Gives a picture's maps ``[C, h, w]`` in 0..1 by name, absent classes 0, and its features ``[D, h, w]``.
        names: Of the maps to score.
        args: The flags.
        accelerator: The engine.

    Returns:
        Entries of ``metrics.json``, and curves over the thresholds, by split and map.
    """
    scores: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    seed_path(args, "").parent.mkdir(parents=True, exist_ok=True)
    for split, pictures in splits.items():
        sweeps = {name: ThresholdSweep(len(pictures.classes)) for name in names}
        contrasts = {name: RegionContrast(len(pictures.classes)) for name in names}
        for index in share(len(pictures), f"{split} maps", accelerator):
            sample = pictures[index]
            maps, features = maps_of(sample)

            # Of many classes a picture has few, and the maps of the others are 0.
            present = sample.labels.nonzero().flatten()
            for name in names:
                own = maps[name][present.to(maps[name].device)]
                sweeps[name].update(enlarge(own, sample.image).cpu(), sample.labels, sample.mask)
                contrasts[name].update(features, maps[name], sample.labels)

            if split == "train":
                write_seeds(seed_path(args, sample.id), maps, present)

        scores[split], curves[split] = {}, {}
        for name in names:
            scores[split][name], curves[split][name] = score(sweeps[name].all_reduce(), pictures.classes)
            contrast, _ = contrasts[name].all_reduce().result().best
            scores[split][name]["contrast"] = None if math.isnan(contrast) else contrast
    accelerator.wait_for_everyone()
    return scores, curves


def score(sweep: ThresholdSweep, classes: tuple[str, ...]) -> tuple[dict[str, Any], tuple[list[float], list[float]]]:
    """One map's entry of ``metrics.json`` and its curve over the thresholds; without masks the mIoU is null."""
    result, free = sweep.result(), otsu_threshold(sweep.score_histogram)
    entry: dict[str, Any] = {
        "miou": None,
        "threshold": None,
        "per_class": {},
        "miou_mask_free": None,
        "threshold_mask_free": free,
    }
    if not result.miou.isnan().all():
        best = result.best
        per_class = dict(zip(("background", *classes), best.per_class.tolist(), strict=True))
        entry |= {"miou": best.miou, "threshold": best.threshold, "per_class": per_class}
        entry["miou_mask_free"] = result.at(free).miou
    return entry, (result.thresholds.tolist(), result.miou.tolist())


def enlarge(maps: Tensor, image: Tensor) -> Tensor:
    """Resize maps ``[C, h, w]`` to the picture."""
    if not len(maps):
        return maps.new_zeros(0, *image.shape[-2:])
    return F.interpolate(maps[None].float(), image.shape[-2:], mode="bilinear", align_corners=False)[0].clamp(0, 1)


def seed_path(args: MaskOptions, name: str) -> Path:
    """File of a training picture's maps."""
    return Path(args.output) / "seeds" / f"{name}.npz"


def write_seeds(path: Path, maps: Mapping[str, Tensor], present: Tensor) -> None:
    """Write the maps of the classes that a picture has, and ``classes``, their places."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {name: each[present.to(each.device)].half().cpu().numpy() for name, each in maps.items()}
    with replacing(path) as file, file.open("wb") as stream:
        np.savez(stream, allow_pickle=False, classes=present.cpu().numpy(), **stored)


def read_seeds(args: MaskOptions, name: str) -> dict[str, Tensor]:
    """Read a training picture's maps ``[P, h, w]`` of the classes that it has."""
    with np.load(seed_path(args, name), allow_pickle=False) as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files if key != "classes"}


def seed_threshold(maps: Mapping[str, Any], args: MaskOptions) -> float:
    """The threshold of the pseudo masks, as ``--threshold`` says."""
    entry = maps["train"][args.seed_map]
    if args.threshold == "otsu":
        return float(entry["threshold_mask_free"])
    if args.threshold == "sweep":
        if entry["threshold"] is None:
            raise SystemExit("--threshold sweep: the training pictures have no masks; take otsu or a number")
        return float(entry["threshold"])
    return float(args.threshold)


@torch.no_grad()
def refine(pictures: Pictures, found: Mapping[str, Any], args: MaskOptions, accelerator: Accelerator) -> dict[str, Any]:
    """Refine the seeds by the pictures' colors, write the pseudo masks and score them where there are masks."""
    refiner, threshold = load_refiner(args.refine), seed_threshold(found["maps"], args)
    confusion = ConfusionMatrix(len(pictures.classes))
    by_picture: dict[str, float] = {}
    empty = torch.zeros(1, dtype=torch.long, device=accelerator.device)
    mask_path(args, "").parent.mkdir(parents=True, exist_ok=True)

    for index in share(len(pictures), "refine", accelerator):
        sample = pictures[index]
        maps = read_seeds(args, sample.id)[args.seed_map]
        mask = mask_of(maps, sample, refiner, threshold, accelerator.device)
        whole = mask if sample.size is None else nearest(mask, sample.size)
        path = mask_path(args, sample.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_mask(path, whole)
        empty += not mask.any()
        if sample.mask is not None:
            confusion.update(mask, sample.mask)
            single = ConfusionMatrix(len(pictures.classes))
            single.update(mask, sample.mask)
            if not math.isnan(miou := single.result().miou):
                by_picture[sample.id] = miou
    by_picture = dict(sorted(pair for part in gather_object([by_picture]) for pair in part.items()))
    scored = named(confusion.all_reduce(), pictures.classes)
    counted = int(accelerator.reduce(empty))
    return {**scored, "threshold": threshold, "map": args.seed_map, "empty": counted, "pictures": by_picture}


def mask_of(maps: Tensor, sample: Sample, refiner: Refiner | None, threshold: float, device: torch.device) -> Tensor:
    """Make a picture's mask ``[H, W]`` from the maps ``[P, h, w]`` of the classes that it has."""
    present = sample.labels.nonzero().flatten()
    if not len(present):
        return torch.zeros(sample.image.shape[-2:], dtype=torch.uint8)
    maps = enlarge(maps, sample.image).to(device)

    # Refiners take probabilities: bend the scale so that the threshold comes to lie at one half.
    below, above = maps / max(threshold, 1e-6) / 2, 0.5 + (maps - threshold) / max(1 - threshold, 1e-6) / 2
    maps = torch.where(maps < threshold, below, above)
    if refiner is not None:
        image = sample.image[None].to(device)
        maps = refiner(with_background(maps)[None], image)[0]
        maps = maps[1:] / (maps[:1] + maps[1:].amax(0, keepdim=True)).clamp_min(1e-6)

    # A map per present class: their indices in the mask are the classes'.
    index_of = torch.cat([torch.zeros(1, dtype=torch.long), present + 1]).to(torch.uint8)
    return index_of[to_mask(maps.cpu(), torch.ones(len(present)), 0.5)]


def named(confusion: ConfusionMatrix, classes: tuple[str, ...]) -> dict[str, Any]:
    """Mean IoU and the IoU of each class by name."""
    miou, per_class = confusion.result()
    return {"miou": miou, "per_class": dict(zip(("background", *classes), per_class.tolist(), strict=True))}


def mask_path(args: MaskOptions, name: str) -> Path:
    """File of a training picture's pseudo mask."""
    return Path(args.output) / "pseudo_masks" / f"{name}.png"


def pseudo_mask(sample: Sample, args: MaskOptions) -> Tensor:
    """Read a training picture's pseudo mask, at the size of the picture."""
    mask = load_mask(mask_path(args, sample.id), len(sample.labels))
    size = (sample.image.shape[-2], sample.image.shape[-1])
    return mask if sample.size is None else nearest(mask, size)


def nearest(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a mask ``[H, W]`` without making new indices."""
    return F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]


def true_mask(sample: Sample) -> Tensor:
    """A picture's mask; void throughout where it has none."""
    return torch.full(sample.image.shape[-2:], 255, dtype=torch.uint8) if sample.mask is None else sample.mask


def report(
    title: str, metrics: Mapping[str, Any], found: Mapping[str, Any], pictures: Pictures, args: MaskOptions
) -> None:
    """Write ``report.html``."""
    history: dict[str, list[tuple[float, float]]] = {}
    for stage in found["stages"].values():
        for epoch, losses in enumerate(stage["history"]):
            for name, value in losses.items():
                history.setdefault(f"{name} loss", []).append((epoch + 1, value))
    write_report(
        args.output / "report.html",
        title=title,
        metrics=metrics,
        history=history,
        sweeps=found.get("sweeps", {}),
        pictures=list(_shown(found, pictures, args)),
        classes=pictures.classes,
        config=json.loads((args.output / "config.json").read_text(encoding="utf-8")),
    )


def _shown(found: Mapping[str, Any], pictures: Pictures, args: MaskOptions) -> Iterator[Picture]:
    """The best and the worst pictures by their pseudo masks, or the first ones, with every map."""
    if "seeds" not in found["stages"]:
        return
    scores = found.get("pseudo_masks", {}).get("pictures", {})
    ranked = sorted(scores, key=scores.__getitem__) or pictures.ids[:6]
    wanted = {*ranked[:6], *ranked[-6:]}
    for index, name in enumerate(pictures.ids):
        if name not in wanted:
            continue
        sample = pictures[index]
        stored = read_seeds(args, name)
        blank = torch.zeros(sample.image.shape[-2:])  # of a picture without a class
        panels = {key: enlarge(each, sample.image).amax(0) if len(each) else blank for key, each in stored.items()}
        if "refine" in found["stages"]:
            panels["pseudo mask"] = pseudo_mask(sample, args)
        tags = [tag for tag, present in zip(pictures.classes, sample.labels.tolist(), strict=True) if present]
        yield Picture(name, sample.image, sample.mask, panels, scores.get(name), tags)


def trivial(tune: Pictures, test: Pictures, regions: int = 8) -> dict[str, float]:
    """Score masks that know nothing of the picture, which a network has to beat.

    ``background`` is background everywhere; ``regions`` cuts a picture at random and gives each part a random class;
    ``tag`` gives every pixel a true tag of the picture; ``disc`` puts that into a centered disc, in pictures that are
    not square an ellipse, of the radius that is best on the tuning pictures.
    """
    classes, generator = len(test.classes), torch.Generator().manual_seed(0)

    def score(pictures: Pictures, kind: str, radius: float = 0.0) -> float:
        confusion = ConfusionMatrix(classes)
        for sample in pictures:
            if sample.mask is None:
                continue
            height, width = sample.mask.shape
            y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
            mask = torch.zeros_like(sample.mask)
            if kind == "regions":
                centers = 2 * torch.rand(2, regions, 1, 1, generator=generator) - 1
                owner = ((y - centers[0]).square() + (x - centers[1]).square()).argmin(0)
                mask = torch.randint(classes + 1, (regions,), generator=generator)[owner].to(mask.dtype)
            elif kind == "disc" and sample.labels.any():
                tags = sample.labels.nonzero().flatten()
                tag = tags[torch.randint(len(tags), (1,), generator=generator)] + 1
                mask = torch.where(y.square() + x.square() < radius**2, tag.to(mask.dtype), mask)
            confusion.update(mask, sample.mask)
        return confusion.result().miou

    tuned = {radius: score(tune, "disc", radius) for radius in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5)}
    radius = max(tuned, key=lambda key: tuned[key])
    return {
        "background": score(test, "background"),
        "regions": score(test, "regions"),
        "tag": score(test, "disc", 2.0),
        "disc": score(test, "disc", radius),
        "disc radius": radius,
    }
