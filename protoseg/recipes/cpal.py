"""CPAL end to end: from pictures with image-level tags to masks and a segmentation network.

    protoseg train cpal                                    # made scenes, two CPU cores, a few minutes
    protoseg train cpal --data VOC2012                     # any VOC-layout folder, weights from a package
    protoseg train cpal --data VOC2012 --preset paper-voc  # weights from timm's hub
    accelerate launch -m protoseg train cpal --data VOC2012 --preset paper-voc
    protoseg train cpal --head mct                         # the same on another paper's network

Stages: ``classify`` trains the CAM network, with the bank's loss under ``--method cpal``; ``seeds`` fills the bank with
the final network and writes and scores the maps ``cam``, ``instance`` and ``pacam``; ``refine`` turns one of them into
pseudo masks; ``segment`` trains a segmentation network on those. With ``--method none`` the bank is filled all the
same, so that its ``pacam`` shows what the memory does without the loss. ``--weights`` say what the backbone begins
with. ``--head amn`` learns from masks and not from tags: those of ``--masks``, or of a run of ``--head cam`` that it
makes itself in ``first/``, with whose backbone it begins. ``--resume`` goes on with a stopped run; ``--stages`` without
it runs these stages anew on what the earlier ones left.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from protoseg import ContextPrototypeBank
from protoseg.data import Sample, UnreadableFileError, load_mask
from protoseg.functional import load_refiner
from protoseg.models.segmentation import build_segmentation_network
from protoseg.recipes.cpal_heads import begin, build, colors, encoder, first_masks, losses
from protoseg.recipes.cpal_options import CPALOptions, first_results, parse
from protoseg.recipes.cpal_stages import SIDE, Network, score_segmentation, seeds
from protoseg.recipes.engine import crop_batches, train
from protoseg.recipes.files import keywords, load_checkpoint, save_checkpoint, write_classes, write_json
from protoseg.recipes.hub import save_model
from protoseg.recipes.options import check_counts, check_scales, check_threshold, plain
from protoseg.recipes.pictures import Crops, Pictures, open_splits, told_of
from protoseg.recipes.progress import FREE, Plan, Progress, conclude
from protoseg.recipes.pseudo_masks import baselines, nearest, pseudo_mask, refine, report, true_mask
from protoseg.recipes.session import as_line, launch, stoppable
from protoseg.utils.colors import IMAGENET_MEAN, IMAGENET_STD

PACKAGES = ("protoseg", "torch", "numpy", "timm", "accelerate", "segmentation-models-pytorch")
FOUND = ("maps", "sweeps", "counted", "trivial")
PLAN = Plan(
    files={
        "classify": ("checkpoint/classify.pt", "checkpoint/fork.pt"),
        "seeds": ("seeds/**/*.npz", "checkpoint/bank.pt"),
        "refine": ("pseudo_masks/**/*.png", "model/*"),
        "segment": ("checkpoint/segment.pt", "checkpoint/ceiling.pt"),
    },
    results={"classify": (), "seeds": FOUND, "refine": ("pseudo_masks",), "segment": ("segmentation",)},
    free=("fork", "ceiling"),
    own={
        "seeds": ("maps", "bank_rounds"),
        "refine": ("seed_map", "threshold", "refine"),
        "segment": ("segmentation", "segmentation_epochs"),
    },
    epochs={"classify": "epochs", "segment": "segmentation_epochs"},
)


def classify(net: Network, pictures: Pictures, args: CPALOptions, accelerator: Accelerator) -> list[dict[str, float]]:
    """Train the network from tags, or AMN's from masks, with the bank's loss under ``cpal``."""
    masks = None if args.masks is None else partial(given_mask, folder=args.masks)
    if masks is not None:
        check_masks(pictures, masks)
    multiple = net.cam.backbone.multiple
    crop = args.crop // multiple * multiple
    mean, std = colors(net.cam)
    share = (args.smallest_crop, 1.0)
    crops = Crops(pictures, crop, seed=args.seed, share=share, masks=masks, mean=mean, std=std)
    # Before its loss counts, the bank sees as many pictures as it remembers, in at most half of the epochs until then;
    # before that both methods do the same.
    start = math.ceil(args.start * args.epochs)
    filling = max(start // 2, start - math.ceil(net.bank.half_life / len(pictures)))

    def loss_of(network: nn.Module, batch: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        out, parts = losses(network, batch, args)
        if args.method == "cpal" and epoch >= filling:
            weight = args.weight if epoch >= start else 0.0
            parts["self"] = weight * net.bank(out.features, out.cam, batch["labels"]).loss
        return parts

    net.bank.train()
    return train(
        "classify",
        net.cam,
        crop_batches(crops, args.batch, args, accelerator),
        loss_of,
        args.epochs,
        args,
        accelerator,
        {"bank": net.bank},
        lr=args.lr,
        head_lr=args.head_lr,
        keep=filling if args.method == "none" else 0,
        fork=fork_of(args.fork) if args.method == "cpal" and args.fork is not None else None,
    )


def check_masks(pictures: Pictures, masks: Callable[[Sample], Tensor]) -> None:
    """Stop before the first step where masks to learn from are missing or do not fit, and name all of them."""
    faults = [f"  {fault}" for sample in pictures if (fault := fault_of(masks, sample))]
    if faults:
        raise SystemExit("\n".join([f"--masks: {len(faults)} of {len(pictures)} cannot be used:", *faults]))


def fault_of(masks: Callable[[Sample], Tensor], sample: Sample) -> str:
    """What is wrong with a picture's mask; empty where nothing is."""
    try:
        masks(sample)
    except UnreadableFileError as error:
        return str(error)
    return ""


def given_mask(sample: Sample, folder: Path) -> Tensor:
    """Read the mask that AMN's network learns from; one of the file's size where the picture is read smaller."""
    path = folder / f"{sample.id}.png"
    mask = load_mask(path, len(sample.labels))
    size = (sample.image.shape[-2], sample.image.shape[-1])
    if tuple(mask.shape) not in (size, sample.size):
        raise UnreadableFileError(path, f"the mask has (H, W) = {tuple(mask.shape)}, its picture {sample.size or size}")
    return mask if tuple(mask.shape) == size else nearest(mask, size)


def segment(
    name: str,
    masks: Callable[[Sample], Tensor],
    net: Network,
    pictures: Pictures,
    test: Pictures | None,
    args: CPALOptions,
    accelerator: Accelerator,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train a segmentation network on masks and score it on the test pictures, where there are some, without tags."""
    set_seed(args.seed)
    outputs = len(pictures.classes) + 1
    weights: Literal["timm"] | None = "timm" if args.weights == "timm" else None
    model = build_segmentation_network(args.segmentation, outputs, backbone=encoder(net.cam), weights=weights)
    model = model.to(accelerator.device)
    # The encoders that segmentation_models_pytorch names want the colors of ImageNet.
    mean, std = colors(net.cam) if args.segmentation.endswith(":backbone") else (IMAGENET_MEAN, IMAGENET_STD)
    crop = args.crop // SIDE * SIDE
    share = (args.smallest_crop, 1.0)
    crops = Crops(pictures, crop, seed=args.seed, share=share, masks=masks, mean=mean, std=std)

    def loss_of(network: nn.Module, batch: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        # A mean over the pixels that are not void; a batch of nothing but void gives 0.
        target = batch["masks"]
        summed = F.cross_entropy(network(batch["images"]).float(), target, ignore_index=255, reduction="sum")
        return {name: summed / (target != 255).sum().clamp_min(1)}

    epochs = args.segmentation_epochs
    batches = crop_batches(crops, args.batch, args, accelerator)
    history = train(name, model, batches, loss_of, epochs, args, accelerator, {}, lr=args.lr, head_lr=args.head_lr)
    if test is None:
        return {"miou": None}, history
    return score_segmentation(model, test, args, accelerator, mean, std), history


def check(args: CPALOptions) -> None:
    """Stop now, and not after hours, for what a later stage cannot use."""
    counts = ("size", "crop", "epochs", "batch", "segmentation_epochs", "train_scenes", "eval_scenes", "bank_rounds")
    check_counts(args, [*counts, *["first_epochs"] * (args.head == "amn")])
    if args.masks is not None and (args.head != "amn" or not args.masks.is_dir()):
        problem = f"no such folder: {args.masks}" if args.head == "amn" else "only --head amn learns from masks"
        raise SystemExit(f"--masks: {problem}")
    if args.seed_map not in args.maps:
        raise SystemExit(f"--seed-map: {args.seed_map} is not among --maps {' '.join(args.maps)}")
    weights = args.weights or "timm"
    named = weights == "timm" or weights.startswith("package:")
    if not named and not Path(weights).is_file():
        raise SystemExit(
            f"--weights: no such file: {args.weights}; say timm, package:NAME, none, or the path of a file"
        )
    if args.head_lr <= 0:
        raise SystemExit(f"--head-lr: expected a factor above 0, got {args.head_lr}")

    if not 0 <= args.start < 1:
        raise SystemExit(f"--start: expected a share of at least 0 and below 1, got {args.start}")
    if args.prior is not None and (args.head != "cam" or not 0 < args.prior < 1):
        problem = (
            f"expected a share above 0 and below 1, got {args.prior}" if args.head == "cam" else "is of --head cam"
        )
        raise SystemExit(f"--prior: {problem}")
    if args.fork is not None:
        check_fork(args, args.fork)
    for flag in () if args.resume else ("fork", "masks", "weights"):
        given, output = Path(getattr(args, flag) or "nothing").resolve(), args.output.resolve()
        if given.is_relative_to(output) and given.relative_to(output).parts[:1] != ("first",):
            raise SystemExit(f"--{flag}: {given} is in --output, where this run begins anew; take another --output")
    check_scales(args.scales)
    check_threshold(args.threshold)

    try:
        network = build(args, 1)
    except ValueError as error:
        raise SystemExit(f"--backbone: {error}") from error
    if args.weights != "timm" or args.backbone.partition(":")[0] == "small":  # a download can wait
        begin(network, args.weights)
    if args.crop < network.backbone.multiple:
        raise SystemExit(f"--crop: {args.backbone} needs at least {network.backbone.multiple} pixels, got {args.crop}")

    if "refine" in args.stages:
        load_refiner(args.refine)
    if "segment" in args.stages:
        if args.crop < SIDE:
            raise SystemExit(f"--crop: the segmentation network needs at least {SIDE} pixels, got {args.crop}")
        try:
            build_segmentation_network(args.segmentation, 2, backbone=encoder(network))
        except ValueError as error:
            raise SystemExit(f"--segmentation: {error}") from error


def check_fork(args: CPALOptions, fork: Path) -> None:
    """Stop where the run to take up did not keep its middle, or was made with other flags."""
    if args.method != "cpal":
        raise SystemExit("--fork: only --method cpal takes up another run")
    try:
        before = json.loads((fork / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--fork: {fork} is no run's folder: {error}") from error
    if before.get("method") != "none" or not fork_of(fork).is_file():
        raise SystemExit(f"--fork: {fork} must be a run of --method none with its {fork_of(fork).name}")

    if args.head == "amn" and before.get("masks") is None:  # those of its first run
        before |= {name: str(path) for name, path in first_results(fork / "first").items()}
    free = {*FREE, *PLAN.free, "method", "weight", "bank", *(name for names in PLAN.own.values() for name in names)}
    now = plain(args)
    changed = [key for key in now if key not in free and before.get(key) != now[key]]
    if changed:
        told = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed)
        raise SystemExit(f"--fork: {fork} is a run with other flags: {told}; give the same flags")


def fork_of(folder: Path) -> Path:
    """The checkpoint of the run to take up."""
    return folder / "checkpoint" / "fork.pt"


def restore(net: Network, args: CPALOptions) -> None:
    """Load the trained network and bank, so that every process goes on with the same."""
    state = load_checkpoint(args.output / "checkpoint" / "classify.pt")
    net.cam.load_state_dict(state["model"])
    net.bank.load_state_dict(state["bank"])


def main(argv: Sequence[str] | None = None, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the stages and write ``metrics.json``, ``report.html`` and ``pseudo_masks``; returns the metrics.

    Args:
        argv: The flags.
        command: The words that the user typed, where they are others.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv, __doc__)
    check(args)
    accelerator = launch(args)
    with stoppable(args):
        metrics = run(args, argv, accelerator, command)
    conclude(metrics, args.output, accelerator)
    return metrics


def run(
    args: CPALOptions, argv: Sequence[str], accelerator: Accelerator, command: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run the stages for flags that have been read; AMN's first network is such a run within one."""
    began = time.monotonic()
    set_seed(args.seed)
    splits = open_splits(args, accelerator.print)
    pictures, test = splits["train"], splits.get("eval")

    cam = build(args, len(pictures.classes)).to(accelerator.device)
    bank = ContextPrototypeBank(len(pictures.classes), cam.channels, **keywords("--bank", args.bank))
    net = Network(cam, bank.to(accelerator.device))
    progress = Progress(PLAN, args, accelerator, began)
    if accelerator.is_main_process:
        write_classes(args.output, pictures.classes)
    if progress.wants("classify"):
        first_masks(args, argv, lambda flags: run(parse(flags), flags, accelerator))
        begin(cam, args.weights)
        progress.done("classify", {"history": classify(net, pictures, args, accelerator)})
    if progress.wants("seeds"):
        restore(net, args)
        scores = seeds(net, splits, args, accelerator)
        if accelerator.is_main_process:  # the bank as the maps were made with it, for other pictures
            save_checkpoint(args.output / "checkpoint" / "bank.pt", {"bank": net.bank.state_dict()})
        plain_scores = baselines(splits, scores.counted, accelerator)
        progress.done("seeds", {**scores._asdict(), "trivial": plain_scores})
    if progress.wants("refine"):
        made = refine(pictures, progress.found, args, accelerator)
        if accelerator.is_main_process and args.head == "cam":
            save_model(args, pictures.classes, made["threshold"])
        progress.done("refine", {"pseudo_masks": made})
    scored = progress.found.get("segmentation", {}).get("eval", {})
    if progress.wants("segment", complete="ceiling" in scored or not args.ceiling):
        restore(net, args)
        progress.done("segment", segmentation(net, pictures, test, args, accelerator))
    broken = {split: each.broken for split, each in splits.items()}
    told = told_of(splits)
    metrics = progress.metrics(args.method, PACKAGES, head=args.head, broken=broken, survey=told)
    if accelerator.is_main_process:
        write_json(args.output / "metrics.json", metrics)
        head = "" if args.head == "cam" else f" with head {args.head}"
        title = f"CPAL on {Path(args.data).name}: {args.method}{head}, seed {args.seed}"
        if command is not None:
            title = f"Masks of {Path(args.data).resolve().name}"
        words = command or ("protoseg", "train", "cpal", *argv)
        report(title, metrics, progress.found, pictures, args, as_line(words))
    return metrics


def segmentation(
    net: Network, pictures: Pictures, test: Pictures | None, args: CPALOptions, accelerator: Accelerator
) -> dict[str, Any]:
    """Train on the pseudo masks and, with ``--ceiling``, on the true ones."""
    scores, history = segment("segment", partial(pseudo_mask, args=args), net, pictures, test, args, accelerator)
    if args.ceiling:
        ceiling, _ = segment("ceiling", true_mask, net, pictures, test, args, accelerator)
        scores["ceiling"] = ceiling["miou"]
    return {"segmentation": {"eval": scores}, "history": history}


if __name__ == "__main__":
    main()
