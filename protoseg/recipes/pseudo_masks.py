"""From maps to masks, as the recipes ``cpal`` and ``vpl`` do it: seeds, scores, pseudo masks, the report."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from protoseg.data import Sample, load_mask, save_mask
from protoseg.functional import Refiner, load_refiner, otsu_threshold, to_mask, with_background
from protoseg.metrics import ConfusionMatrix, RegionContrast, ThresholdSweep
from protoseg.recipes.options import MaskOptions
from protoseg.recipes.pictures import Pictures, seeded
from protoseg.recipes.session import share
from protoseg.report import Picture, write_report
from protoseg.utils.files import replacing

SHOWN = 12  # pictures that the report shows large, and one for each class where there are more of them
MOST = 24
EMPTIES = 3  # of them, empty masks

RADII = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5)


class Scores(NamedTuple):
    """What :func:`score_maps` found.

    Attributes:
        maps: Entries of ``metrics.json`` by split and map.
        sweeps: Curves over the thresholds, likewise.
        counted: By split: ``pictures``, and of how many of them there are masks to score against.
    """

    maps: dict[str, Any]
    sweeps: dict[str, Any]
    counted: dict[str, dict[str, int]]


class Made(NamedTuple):
    """A picture's mask in numbers.

    Attributes:
        name: Of the picture.
        tags: Indices of the classes that it has by its tags, 0..C-1.
        pixels: ``{index in the mask: share of the mask}``, background included.
        score: Mean IoU against the true mask; None where there is none.
    """

    name: str
    tags: list[int]
    pixels: dict[int, float]
    score: float | None

    @property
    def empty(self) -> bool:
        """Whether all of it is background."""
        return set(self.pixels) <= {0}


@torch.no_grad()
def score_maps(
    splits: Mapping[str, Pictures],
    maps_of: Callable[[Sample], tuple[Mapping[str, Tensor], Tensor]],
    names: Sequence[str],
    args: MaskOptions,
    accelerator: Accelerator,
) -> Scores:
    """Write each training picture's maps and score those in ``names`` at every threshold, in one pass over a split.

    Args:
        splits: ``train`` and others.
        maps_of: Gives a picture's maps ``[C, h, w]`` in 0..1 by name, absent classes 0, and its features ``[D, h, w]``.
        names: Of the maps to score.
        args: The flags.
        accelerator: The engine.
    """
    scores: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    counted: dict[str, dict[str, int]] = {}
    seed_path(args, "").parent.mkdir(parents=True, exist_ok=True)
    for split, pictures in splits.items():
        sweeps = {name: ThresholdSweep(len(pictures.classes)) for name in names}
        contrasts = {name: RegionContrast(len(pictures.classes)) for name in names}
        masked = torch.zeros(1, dtype=torch.long, device=accelerator.device)
        for index in share(len(pictures), f"{split} maps", accelerator):
            sample = pictures[index]
            maps, features = maps_of(sample)
            masked += sample.mask is not None

            # Of many classes a picture has few, and the maps of the others are 0.
            present = sample.labels.nonzero().flatten()
            for name in names:
                own = maps[name][present.to(maps[name].device)]
                sweeps[name].update(enlarge(own, sample.image).cpu(), sample.labels, sample.mask)
                contrasts[name].update(features, maps[name], sample.labels)

            if split == "train":
                write_seeds(seed_path(args, sample.id), maps, present)

        counted[split] = {"pictures": len(pictures), "scored": int(accelerator.reduce(masked))}
        scores[split], curves[split] = {}, {}
        for name in names:
            scores[split][name], curves[split][name] = score(sweeps[name].all_reduce(), pictures.classes)
            contrast, _ = contrasts[name].all_reduce().result().best
            scores[split][name]["contrast"] = None if math.isnan(contrast) else contrast
    accelerator.wait_for_everyone()
    return Scores(scores, curves, counted)


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
    made: list[Made] = []
    mask_path(args, "").parent.mkdir(parents=True, exist_ok=True)

    for index in share(len(pictures), "refine", accelerator):
        sample = pictures[index]
        maps = read_seeds(args, sample.id)[args.seed_map]
        mask = mask_of(maps, sample, refiner, threshold, accelerator.device)
        whole = mask if sample.size is None else nearest(mask, sample.size)
        path = mask_path(args, sample.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_mask(path, whole)

        score = None
        if sample.mask is not None:
            confusion.update(mask, sample.mask)
            single = ConfusionMatrix(len(pictures.classes))
            single.update(mask, sample.mask)
            score = single.result().miou
        made.append(measured(sample, mask, score))

    every = sorted(entry for part in gather_object([made]) for entry in part)
    scored = named(confusion.all_reduce(), pictures.classes)
    return {**scored, "threshold": threshold, "map": args.seed_map, **summary(every, pictures.classes)}


def measured(sample: Sample, mask: Tensor, score: float | None) -> Made:
    """A picture's mask in numbers."""
    counts = mask.flatten().long().bincount().tolist()
    shares = {value: count / mask.numel() for value, count in enumerate(counts) if count}
    tags = sample.labels.nonzero().flatten().tolist()
    known = None if score is None or math.isnan(score) else score
    return Made(sample.id, tags, shares, known)


def summary(made: Sequence[Made], classes: Sequence[str]) -> dict[str, Any]:
    """What ``metrics.json`` says of all masks, and which the report shows.

    Args:
        made: All masks, by name.
        classes: Names of the classes.
    """
    empties = [entry for entry in made if entry.empty]
    by_class = {}
    for place, name in enumerate(classes):
        shares = [share for entry in made if (share := entry.pixels.get(place + 1))]
        tagged = sum(place in entry.tags for entry in made)
        mean = sum(shares) / len(shares) if shares else None
        by_class[name] = {"tagged": tagged, "found": len(shares), "share": mean}

    return {
        "count": len(made),
        "empty": len(empties),
        "untagged": sum(not entry.tags for entry in made),
        "empties": [entry.name for entry in empties if entry.tags][:20],
        "foreground": sum(1 - entry.pixels.get(0, 0.0) for entry in made) / len(made),
        "classes": by_class,
        "shown": over_classes(made, len(classes)),
        "pictures": {entry.name: entry.score for entry in made if entry.score is not None},
    }


def over_classes(made: Sequence[Made], num_classes: int) -> list[str]:
    """Names of pictures to look at: one after another of each class in turn, and a few whose masks are empty."""
    drawn = list(made)
    # Neighbors by name are often alike.
    random.Random(0).shuffle(drawn)
    count = min(MOST, max(SHOWN, num_classes))

    shown: list[str] = []
    waiting = {place: [entry for entry in drawn if place + 1 in entry.pixels] for place in range(num_classes)}
    while any(waiting.values()) and len(shown) < count:
        for entries in waiting.values():
            while entries and entries[0].name in shown:
                entries.pop(0)
            if entries and len(shown) < count:
                shown.append(entries.pop(0).name)

    lost = [entry.name for entry in drawn if entry.empty and entry.tags]
    return [*shown, *lost[:EMPTIES]]


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
    title: str,
    metrics: Mapping[str, Any],
    found: Mapping[str, Any],
    pictures: Pictures,
    args: MaskOptions,
    command: str | None = None,
) -> None:
    """Write ``report.html``; ``command`` is the line that made the run."""
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
        config={"command": command, **json.loads((args.output / "config.json").read_text(encoding="utf-8"))},
    )


def _shown(found: Mapping[str, Any], pictures: Pictures, args: MaskOptions) -> Iterator[Picture]:
    """Pictures over all classes with their masks, and the best and the worst ones, or the first, with every map."""
    if "seeds" not in found["stages"]:
        return
    masks = found.get("pseudo_masks", {})
    scores = masks.get("pictures", {})
    ranked = sorted(scores, key=scores.__getitem__) or masks.get("shown", pictures.ids)[:6]
    with_maps = {*ranked[:6], *ranked[-6:]}
    large = masks.get("shown", [])
    index_of = {name: index for index, name in enumerate(pictures.ids)}

    # Those that are shown large come in their order.
    for name in dict.fromkeys([*large, *ranked[:6], *ranked[-6:]]):
        sample = pictures[index_of[name]]
        mask = pseudo_mask(sample, args) if "refine" in found["stages"] else None
        tags = [tag for tag, present in zip(pictures.classes, sample.labels.tolist(), strict=True) if present]
        panels = _panels(name, sample, args) if name in with_maps else {}
        yield Picture(name, sample.image, sample.mask, panels, scores.get(name), tags, mask, large=name in large)


def _panels(name: str, sample: Sample, args: MaskOptions) -> dict[str, Tensor]:
    """A picture's maps, each the highest of its classes."""
    stored = read_seeds(args, name)
    blank = torch.zeros(sample.image.shape[-2:])  # of a picture without a class
    return {key: enlarge(each, sample.image).amax(0) if len(each) else blank for key, each in stored.items()}


def baselines(
    splits: Mapping[str, Pictures], counted: Mapping[str, Mapping[str, int]], accelerator: Accelerator
) -> dict[str, Any]:
    """By split, where there are true masks: the scores of :func:`trivial`. One process looks, once."""
    found: list[dict[str, Any]] = [{}]
    if accelerator.is_main_process:
        scored = {split: _blind(pictures) for split, pictures in splits.items() if counted[split]["scored"]}
        found = [{split: _best_disc(scored.get("train", tested), tested) for split, tested in scored.items()}]
    return dict(broadcast_object_list(found)[0])


def trivial(tune: Pictures, test: Pictures) -> dict[str, float]:
    """Score masks that know nothing of the picture, which a network has to beat.

    ``background`` is background everywhere; ``regions`` cuts a picture at random and gives each part a random class;
    ``tag`` gives every pixel a true tag of the picture; ``disc`` puts that into a centered disc, in pictures that are
    not square an ellipse, of the radius that is best on the tuning pictures.
    """
    tested = _blind(test)
    tuned = tested if tune is test else _blind(tune)
    return _best_disc(tuned, tested)


def _best_disc(tuned: Mapping[str, float], tested: Mapping[str, float]) -> dict[str, float]:
    """Of the scores of :func:`_blind` those of the disc that is best on the tuning pictures, and the others."""
    radius = max(RADII, key=lambda each: tuned[f"disc {each}"])
    return {
        "background": tested["background"],
        "regions": tested["regions"],
        "tag": tested["tag"],
        "disc": tested[f"disc {radius}"],
        "disc radius": radius,
    }


def _blind(pictures: Pictures, regions: int = 8) -> dict[str, float]:
    """Scores of the masks of :func:`trivial`, of discs of every radius, in one pass over the pictures."""
    classes = len(pictures.classes)
    kinds = ("background", "regions", "tag", *(f"disc {radius}" for radius in RADII))
    confusions = {kind: ConfusionMatrix(classes) for kind in kinds}

    for index, sample in enumerate(pictures):
        if sample.mask is None:
            continue
        generator = seeded(index)
        height, width = sample.mask.shape
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        distance = y.square() + x.square()
        nothing = torch.zeros_like(sample.mask)

        # A random class for each part, and one of the picture's own.
        centers = 2 * torch.rand(2, regions, 1, 1, generator=generator) - 1
        owner = ((y - centers[0]).square() + (x - centers[1]).square()).argmin(0)
        parts = torch.randint(classes + 1, (regions,), generator=generator)[owner].to(nothing.dtype)
        tags = sample.labels.nonzero().flatten()
        tag = 0
        if len(tags):
            tag = int(tags[torch.randint(len(tags), (1,), generator=generator)]) + 1

        confusions["background"].update(nothing, sample.mask)
        confusions["regions"].update(parts, sample.mask)
        confusions["tag"].update(torch.full_like(nothing, tag), sample.mask)
        for radius in RADII:
            disc = nothing.masked_fill(distance < radius**2, tag)
            confusions[f"disc {radius}"].update(disc, sample.mask)

    return {kind: confusion.result().miou for kind, confusion in confusions.items()}
