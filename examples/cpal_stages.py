"""The stages of ``train_cpal.py`` after training: seeds, pseudo masks, scores and the report."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from common import Pictures, replacing, scaled_image
from torch import Tensor, nn
from tqdm import tqdm

from protoseg import ContextPrototypeBank
from protoseg.cam import multi_scale, normalize, otsu_threshold, to_mask, with_background
from protoseg.data import Sample
from protoseg.data.voc import load_mask, save_mask
from protoseg.functional import prototype_cam
from protoseg.metrics import ConfusionMatrix, ThresholdSweep
from protoseg.models.heads import CAMNetwork
from protoseg.refine import load_refiner
from protoseg.report import Picture, write_report

MAPS = ("cam", "instance", "pacam")
SIDE = 32  # what the sides of a segmentation network's pictures must be multiples of


class Network(NamedTuple):
    """A CAM network and its bank."""

    cam: CAMNetwork
    bank: ContextPrototypeBank


def shard(length: int, accelerator: Accelerator) -> range:
    """The indices of this process."""
    return range(accelerator.process_index, length, accelerator.num_processes)


def infer(net: Network, sample: Sample, args: argparse.Namespace, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Features ``[1, D, h, w]`` and raw CAM ``[1, C, h, w]``, over scales and mirrored: the same for every map."""
    image = scaled_image(sample.image, args.size).to(accelerator.device)

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        out = net.cam(images)
        return out.features.float(), out.cam.float()

    features, cam = multi_scale(run, image, scales=args.scales)
    return features, cam


def picture_maps(bank: ContextPrototypeBank, features: Tensor, cam: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The three maps ``[C, h, w]`` in 0..1 of one picture, absent classes 0."""
    out = bank(features, cam, labels)
    # As in SIPE: every pixel against the picture's own prototype of the class.
    instance = normalize(prototype_cam(features, out.instances.unsqueeze(2))) * labels[:, :, None, None]
    return {"cam": out.cam[0, 1:], "instance": instance[0], "pacam": out.pacam[0, 1:]}


@torch.no_grad()
def fill(net: Network, pictures: Pictures, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Fill the bank anew with the instances that the final network sees in the training pictures, and cluster it."""
    net.bank.reset_parameters()
    net.bank.train()
    world, main = accelerator.num_processes, accelerator.is_main_process
    for first in tqdm(range(0, len(pictures), world), "fill bank", disable=not main, leave=False):
        index = first + accelerator.process_index
        sample = pictures[min(index, len(pictures) - 1)]
        # Every process must call the bank equally often: one without a picture left brings no label.
        labels = sample.labels * (index < len(pictures))
        net.bank(*infer(net, sample, args, accelerator), labels[None].to(accelerator.device))
    net.bank.refresh()
    net.bank.eval()


@torch.no_grad()
def seeds(
    net: Network,
    splits: Mapping[str, Pictures],
    args: argparse.Namespace,
    accelerator: Accelerator,
    names: Sequence[str] = MAPS,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write each training picture's maps and score those in ``names`` at every threshold, in one pass over a split."""
    net.cam.eval()
    fill(net, splits["train"], args, accelerator)
    scores: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for split, pictures in splits.items():
        sweeps = {name: ThresholdSweep(len(pictures.classes)) for name in names}
        for index in tqdm(shard(len(pictures), accelerator), f"{split} maps", disable=not accelerator.is_main_process):
            sample = pictures[index]
            features, cam = infer(net, sample, args, accelerator)
            maps = picture_maps(net.bank, features, cam, sample.labels[None].to(features.device))
            for name, sweep in sweeps.items():
                sweep.update(enlarge(maps[name], sample.image).cpu(), sample.labels, sample.mask)
            if split == "train":
                with replacing(seed_path(args, sample.id)) as file, file.open("wb") as stream:
                    np.savez(
                        stream, allow_pickle=False, **{key: each.half().cpu().numpy() for key, each in maps.items()}
                    )
        scores[split], curves[split] = {}, {}
        for name, sweep in sweeps.items():
            scores[split][name], curves[split][name] = score(sweep.all_reduce(), pictures.classes)
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
    return F.interpolate(maps[None].float(), image.shape[-2:], mode="bilinear", align_corners=False)[0].clamp(0, 1)


def seed_path(args: argparse.Namespace, name: str) -> Path:
    """File of a training picture's maps."""
    return Path(args.output) / "seeds" / f"{name}.npz"


def read_seeds(args: argparse.Namespace, name: str) -> dict[str, Tensor]:
    """Read a training picture's maps."""
    with np.load(seed_path(args, name), allow_pickle=False) as stored:
        return {key: torch.from_numpy(stored[key]) for key in MAPS}


def seed_threshold(maps: Mapping[str, Any], args: argparse.Namespace) -> float:
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
def refine(
    pictures: Pictures, found: Mapping[str, Any], args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Any]:
    """Refine the seeds by the pictures' colours, write the pseudo masks and score them where there are masks."""
    refiner, threshold = load_refiner(args.refine), seed_threshold(found["maps"], args)
    confusion = ConfusionMatrix(len(pictures.classes))
    by_picture: dict[str, float] = {}
    mask_path(args, "").parent.mkdir(parents=True, exist_ok=True)
    for index in tqdm(shard(len(pictures), accelerator), "refine", disable=not accelerator.is_main_process):
        sample = pictures[index]
        present = sample.labels.nonzero().flatten()
        maps = enlarge(read_seeds(args, sample.id)[args.seed_map][present], sample.image).to(accelerator.device)
        # Refiners take probabilities: bend the scale so that the threshold comes to lie at one half.
        below, above = maps / max(threshold, 1e-6) / 2, 0.5 + (maps - threshold) / max(1 - threshold, 1e-6) / 2
        maps = torch.where(maps < threshold, below, above)
        if refiner is not None and len(present):
            image = sample.image[None].to(accelerator.device)
            maps = refiner(with_background(maps)[None], image)[0]
            maps = maps[1:] / (maps[:1] + maps[1:].amax(0, keepdim=True)).clamp_min(1e-6)
        mask = torch.zeros(sample.image.shape[-2:], dtype=torch.uint8)
        if len(present):
            # A map per present class: their indices in the mask are the classes'.
            index_of = torch.cat([torch.zeros(1, dtype=torch.long), present + 1])
            mask = index_of[to_mask(maps.cpu(), torch.ones(len(present)), 0.5)].to(torch.uint8)
        save_mask(mask_path(args, sample.id), mask)
        if sample.mask is not None:
            confusion.update(mask, sample.mask)
            single = ConfusionMatrix(len(pictures.classes))
            single.update(mask, sample.mask)
            if not math.isnan(miou := single.result().miou):
                by_picture[sample.id] = miou
    by_picture = dict(sorted(pair for part in gather_object([by_picture]) for pair in part.items()))
    scored = named(confusion.all_reduce(), pictures.classes)
    return {**scored, "threshold": threshold, "map": args.seed_map, "pictures": by_picture}


def named(confusion: ConfusionMatrix, classes: tuple[str, ...]) -> dict[str, Any]:
    """Mean IoU and the IoU of each class by name."""
    miou, per_class = confusion.result()
    return {"miou": miou, "per_class": dict(zip(("background", *classes), per_class.tolist(), strict=True))}


def mask_path(args: argparse.Namespace, name: str) -> Path:
    """File of a training picture's pseudo mask."""
    return Path(args.output) / "pseudo_masks" / f"{name}.png"


def pseudo_mask(sample: Sample, args: argparse.Namespace) -> Tensor:
    """Read a training picture's pseudo mask."""
    return load_mask(mask_path(args, sample.id), len(sample.labels))


def true_mask(sample: Sample) -> Tensor:
    """A picture's mask; void throughout where it has none."""
    return torch.full(sample.image.shape[-2:], 255, dtype=torch.uint8) if sample.mask is None else sample.mask


@torch.no_grad()
def score_segmentation(
    model: nn.Module, test: Pictures, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Any]:
    """Scores of a segmentation network, with mirrored pictures and without tags; and of background everywhere."""
    model.eval()
    confusion, floor = ConfusionMatrix(len(test.classes)), ConfusionMatrix(len(test.classes))
    for index in tqdm(shard(len(test), accelerator), "score", disable=not accelerator.is_main_process, leave=False):
        sample = test[index]
        if sample.mask is None:
            continue
        image = scaled_image(sample.image, args.size, multiple=SIDE).to(accelerator.device)
        (logits,) = multi_scale(lambda images: (model(images).float().softmax(1),), image, multiple=SIDE)
        confusion.update(enlarge(logits[0], sample.image).argmax(0).cpu(), sample.mask)
        floor.update(torch.zeros_like(sample.mask), sample.mask)
    return {**named(confusion.all_reduce(), test.classes), "all_background": floor.all_reduce().result().miou}


def report(metrics: Mapping[str, Any], found: Mapping[str, Any], pictures: Pictures, args: argparse.Namespace) -> None:
    """Write ``report.html``."""
    history: dict[str, list[tuple[float, float]]] = {}
    for stage in found["stages"].values():
        for epoch, losses in enumerate(stage["history"]):
            for name, value in losses.items():
                history.setdefault(f"{name} loss", []).append((epoch + 1, value))
    write_report(
        args.output / "report.html",
        title=f"CPAL on {Path(args.data).name}: {args.method}, seed {args.seed}",
        metrics=metrics,
        history=history,
        sweeps=found.get("sweeps", {}),
        pictures=list(_shown(found, pictures, args)),
        classes=pictures.classes,
        config=json.loads((args.output / "config.json").read_text(encoding="utf-8")),
    )


def _shown(found: Mapping[str, Any], pictures: Pictures, args: argparse.Namespace) -> Iterator[Picture]:
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
        panels = {key: enlarge(each, sample.image).amax(0) for key, each in read_seeds(args, name).items()}
        if "refine" in found["stages"]:
            panels["pseudo mask"] = pseudo_mask(sample, args)
        tags = [tag for tag, present in zip(pictures.classes, sample.labels.tolist(), strict=True) if present]
        yield Picture(name, sample.image, sample.mask, panels, scores.get(name), tags)
