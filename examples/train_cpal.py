"""CPAL end to end: from pictures with image-level tags to masks and a segmentation network.

    python examples/train_cpal.py                                    # made scenes, two CPU cores, a few minutes
    python examples/train_cpal.py --data VOC2012 --preset paper-voc  # any VOC-layout folder
    accelerate launch examples/train_cpal.py --data VOC2012 --preset paper-voc
    python examples/train_cpal.py --head mct                         # the same on another paper's network

Stages: ``classify`` trains the CAM network, with the bank's loss under ``--method cpal``; ``seeds`` fills the bank with
the final network and writes and scores the maps ``cam``, ``instance`` and ``pacam``; ``refine`` turns one of them into
pseudo masks; ``segment`` trains a segmentation network on those. With ``--method none`` the bank is filled all the
same, so that its ``pacam`` shows what the memory does without the loss. ``--head amn`` learns from masks and not from
tags: those of ``--masks``, or of a run of ``--head cam`` that it makes itself in ``first/``, with whose backbone it
begins. ``--resume`` goes on with a stopped run; ``--stages`` without it runs these stages anew on what the earlier ones
left.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import (
    Crops,
    Pictures,
    keywords,
    load_checkpoint,
    open_pictures,
    write_json,
)
from cpal_heads import HEADS, build, encoder, first_masks, load_backbone, losses
from cpal_stages import MAPS, SIDE, Network, score_segmentation, seeds
from flags import add_shared, check_counts, check_threshold
from progress import Plan, Progress
from pseudo_masks import pseudo_mask, refine, report, true_mask
from torch import Tensor, nn
from training import train

from protoseg import ContextPrototypeBank
from protoseg.data import Sample
from protoseg.data.voc import load_mask
from protoseg.models.mct import Fusion
from protoseg.models.segmentation import build_segmentation_network
from protoseg.refine import load_refiner

PACKAGES = ("protoseg", "torch", "numpy", "timm", "accelerate", "segmentation-models-pytorch")
PLAN = Plan(
    files={
        "classify": ("checkpoint/classify.pt",),
        "seeds": ("seeds/*.npz",),
        "refine": ("pseudo_masks/*.png",),
        "segment": ("checkpoint/segment.pt", "checkpoint/ceiling.pt", "metrics.json", "report.html"),
    },
    results={"classify": (), "seeds": ("maps", "sweeps"), "refine": ("pseudo_masks",), "segment": ("segmentation",)},
    free=("output", "resume", "stages", "device", "workers", "skip_broken", "ceiling"),
    own={
        "seeds": ("maps",),
        "refine": ("seed_map", "threshold", "refine"),
        "segment": ("segmentation", "segmentation_epochs"),
    },
)
STAGES = PLAN.stages

# The paper states ResNet-50 and a bank of 1000; everything else in "paper-voc" and "paper-coco" is a guess after SIPE,
# marked as such in docs/cpal.md. "scratch" was chosen on the train and val pictures of MSRC-15. AMN's dilations are the
# published ones, and the same shares of the side of a smaller map.
PRESETS: dict[str, dict[str, Any]] = {
    "scenes": {
        "backbone": "small:32", "size": 96, "crop": 96, "smallest_crop": 0.5, "epochs": 16, "batch": 16, "lr": 2e-3,
        "scales": [1.0], "segmentation": "unet:backbone", "segmentation_epochs": 5, "rates": [2, 4, 7, 9],
        # Flat textures: measured on val, centring costs 0.03 to 0.05 here, and each scenery wants contexts of its own.
        # The loss at full weight pulls a classifier that is not done in 16 epochs down: 0.357 to 0.401 without it.
        "bank": ["centre=false", "background_contexts=20"], "weight": 0.1,
    },
    "scratch": {
        "backbone": "small:32", "size": 157, "crop": 144, "smallest_crop": 0.3, "epochs": 100, "batch": 16, "lr": 2e-3,
        "scales": [1.0], "segmentation": "unet:backbone", "segmentation_epochs": 40, "rates": [3, 7, 10, 14],
    },
    "paper-voc": {
        "backbone": "resnet50", "pretrained": True, "size": 448, "crop": 512, "smallest_crop": 0.3, "epochs": 5,
        "batch": 16, "lr": 1e-4, "scales": [1.0, 0.5, 1.5, 2.0],
        "segmentation": "deeplabv3plus:resnet101", "segmentation_epochs": 20, "rates": [6, 12, 18, 24],
    },
    "paper-coco": {
        "backbone": "resnet50", "pretrained": True, "size": 512, "crop": 512, "smallest_crop": 0.3, "epochs": 5,
        "batch": 16, "lr": 1e-4, "scales": [1.0, 0.5, 1.5, 2.0],
        "segmentation": "deeplabv3plus:resnet101", "segmentation_epochs": 10, "rates": [6, 12, 18, 24],
    },
}  # fmt: skip
# What a head wants otherwise. On scenes, one seed, 10 epochs at a rate of 2e-3 gave MCTformer's maps 0.25 and at 5e-4
# 0.35 (the plain CAM has 0.33), and affinity flooded them (0.14). The published rate is 5e-4 for 512 pictures a step.
# AMN begins with a trained backbone, and so takes few epochs. Narrower networks keep to the minutes of the plain CAM.
HEAD_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "amn": {
        "scenes": {"backbone": "small:24", "first_epochs": 16, "epochs": 4, "segmentation_epochs": 3},
        "scratch": {"backbone": "small:24", "first_epochs": 60, "epochs": 20, "crop": 112},
    },
    "mct": {
        "scenes": {"backbone": "small:24", "lr": 5e-4, "epochs": 12, "weight": 1.0, "segmentation_epochs": 3},
        "scratch": {"backbone": "small:24", "lr": 5e-4, "epochs": 60, "crop": 112},
        "paper-voc": {"backbone": "deit_small_patch16_224", "lr": 2e-5, "affinity": True},
        "paper-coco": {"backbone": "deit_small_patch16_224", "lr": 2e-5, "affinity": True},
    },
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags and fill what was not given from the preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared(parser, stages=STAGES, output="runs/cpal", eval_scenes=150)
    add = parser.add_argument
    add("--method", choices=("none", "cpal"), default="cpal")
    add("--preset", choices=tuple(PRESETS), help="default: 'scenes' for scenes, else 'scratch'")
    group = parser.add_argument_group("network")
    group.add_argument("--head", choices=HEADS, default="cam", help="the plain CAM, AMN's or MCTformer's network")
    group.add_argument("--backbone", help="'small', 'small:WIDTH' or a timm name")
    group.add_argument("--pretrained", action=argparse.BooleanOptionalAction)
    group.add_argument(
        "--weights", type=Path, help="checkpoint/classify.pt of a run whose backbone this one begins with"
    )
    group.add_argument("--size", type=int, help="test pictures get the area of a square of this side, in pixels")
    group.add_argument(
        "--scales", type=float, nargs="+", help="test scales, each also mirrored; maps have the grid of the first"
    )
    group.add_argument("--crop", type=int, help="side of the training crops in pixels")
    group.add_argument("--smallest-crop", type=float, help="smallest share of a picture's area in a crop")
    group.add_argument("--epochs", type=int)
    group.add_argument("--batch", type=int, help="per process")
    group.add_argument("--lr", type=float)
    group = parser.add_argument_group("heads of other papers")
    group.add_argument("--masks", type=Path, help="amn: folder of the masks to learn from, such as RUN/pseudo_masks")
    group.add_argument("--first-epochs", type=int, help="amn: of the run that makes its masks")
    group.add_argument("--smoothing", type=float, default=0.4, help="amn: of the labels")
    group.add_argument("--rates", type=int, nargs="+", help="amn: dilations")
    group.add_argument("--fusion", choices=get_args(Fusion), default="v2", help="mct: how its two maps become one")
    group.add_argument("--affinity", action=argparse.BooleanOptionalAction, help="mct: spread the map by attention")
    group = parser.add_argument_group("bank (see ContextPrototypeBank; defaults are its own)")
    group.add_argument("--weight", type=float, help="of the bank's loss (default: 1, for scenes 0.1 but for mct 1)")
    group.add_argument("--start", type=float, default=0.75, help="share of the epochs before the bank's loss counts")
    group.add_argument("--bank", nargs="*", metavar="NAME=VALUE", help="arguments of ContextPrototypeBank")
    group = parser.add_argument_group("masks and segmentation")
    group.add_argument("--maps", nargs="+", choices=MAPS, default=list(MAPS), help="to make and score (default: all)")
    group.add_argument("--seed-map", choices=MAPS, help="map of the pseudo masks (default: pacam, or cam with 'none')")
    group.add_argument("--threshold", default="otsu", help="otsu, sweep (uses masks), or a number")
    group.add_argument("--refine", default="pamr", help="pamr, none, or package.module:function")
    group.add_argument("--segmentation", help="ARCHITECTURE:ENCODER of segmentation_models_pytorch, or unet:backbone")
    group.add_argument("--segmentation-epochs", type=int)
    group.add_argument("--ceiling", action="store_true", help="also train on the true masks, to compare")
    args = parser.parse_args(argv)
    args.preset = args.preset or ("scenes" if args.data == "scenes" else "scratch")
    rest = {"pretrained": False, "bank": [], "weight": 1.0, "affinity": False}
    for name, value in {**rest, **PRESETS[args.preset], **HEAD_PRESETS.get(args.head, {}).get(args.preset, {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.seed_map = args.seed_map or ("pacam" if args.method == "cpal" else "cam")
    args.eval_data = args.eval_data or args.data
    if args.head == "amn" and args.first_epochs is None:
        args.first_epochs = args.epochs
    return args


def classify(
    net: Network, pictures: Pictures, args: argparse.Namespace, accelerator: Accelerator
) -> list[dict[str, float]]:
    """Train the network from tags, or AMN's from masks, with the bank's loss under ``cpal``."""
    masks = None if args.masks is None else partial(given_mask, args=args)
    crops = Crops(pictures, args.crop, seed=args.seed, share=(args.smallest_crop, 1.0), masks=masks)
    start = args.start * args.epochs

    def loss_of(network: nn.Module, batch: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        out, parts = losses(network, batch, args)
        if args.method == "cpal":
            weight = args.weight if epoch >= start else 0.0
            parts["self"] = weight * net.bank(out.features, out.cam, batch["labels"]).loss
        return parts

    net.bank.train()
    return train("classify", net.cam, crops, loss_of, args.epochs, args, accelerator, {"bank": net.bank})


def given_mask(sample: Sample, args: argparse.Namespace) -> Tensor:
    """Read the mask that AMN's network learns from."""
    return load_mask(args.masks / f"{sample.id}.png", len(sample.labels))


def segment(
    name: str,
    masks: Callable[[Sample], Tensor],
    net: Network,
    pictures: Pictures,
    test: Pictures,
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train a segmentation network on masks and score it on the test pictures, without tags."""
    set_seed(args.seed)
    outputs, backbone = len(pictures.classes) + 1, encoder(net.cam)
    model = build_segmentation_network(args.segmentation, outputs, backbone=backbone, pretrained=args.pretrained)
    model = model.to(accelerator.device)
    crop = args.crop // SIDE * SIDE
    crops = Crops(pictures, crop, seed=args.seed, share=(args.smallest_crop, 1.0), masks=masks)

    def loss_of(network: nn.Module, batch: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        # A mean over the pixels that are not void; a batch of nothing but void gives 0.
        target = batch["masks"]
        summed = F.cross_entropy(network(batch["images"]).float(), target, ignore_index=255, reduction="sum")
        return {name: summed / (target != 255).sum().clamp_min(1)}

    history = train(name, model, crops, loss_of, args.segmentation_epochs, args, accelerator, {})
    return score_segmentation(model, test, args, accelerator), history


def check(args: argparse.Namespace) -> None:
    """Stop now, and not after hours, for what a later stage cannot use."""
    counts = ("size", "crop", "epochs", "batch", "segmentation_epochs", "train_scenes", "eval_scenes")
    check_counts(args, [*counts, *["first_epochs"] * (args.head == "amn")])
    if args.masks is not None and (args.head != "amn" or not args.masks.is_dir()):
        problem = f"no such folder: {args.masks}" if args.head == "amn" else "only --head amn learns from masks"
        raise SystemExit(f"--masks: {problem}")
    if args.seed_map not in args.maps:
        raise SystemExit(f"--seed-map: {args.seed_map} is not among --maps {' '.join(args.maps)}")
    if args.weights is not None and not args.weights.is_file():
        raise SystemExit(f"--weights: no such file: {args.weights}")
    check_threshold(args.threshold)
    try:
        network = build(args, 1, pretrained=False)
    except ValueError as error:
        raise SystemExit(f"--backbone: {error}") from error
    if "refine" in args.stages:
        load_refiner(args.refine)
    if "segment" in args.stages:
        if args.crop < SIDE:
            raise SystemExit(f"--crop: the segmentation network needs at least {SIDE} pixels, got {args.crop}")
        try:
            build_segmentation_network(args.segmentation, 2, backbone=encoder(network))
        except ValueError as error:
            raise SystemExit(f"--segmentation: {error}") from error


def restore(net: Network, args: argparse.Namespace) -> None:
    """Load the trained network and bank, so that every process goes on with the same."""
    state = load_checkpoint(args.output / "checkpoint" / "classify.pt")
    net.cam.load_state_dict(state["model"])
    net.bank.load_state_dict(state["bank"])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the stages and write ``metrics.json``, ``report.html`` and ``pseudo_masks``; returns the metrics."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    check(args)
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=args.precision)
    if args.device not in ("auto", "cpu", accelerator.device.type):
        raise SystemExit(f"--device: accelerate found {accelerator.device}, not {args.device}; say 'auto' or 'cpu'")
    metrics = run(args, argv, accelerator)
    accelerator.end_training()
    return metrics


def run(args: argparse.Namespace, argv: Sequence[str], accelerator: Accelerator) -> dict[str, Any]:
    """Run the stages for flags that have been read; AMN's first network is such a run within one."""
    began = time.monotonic()
    set_seed(args.seed)
    pictures = open_pictures(args.data, args.train_split, args)
    test = open_pictures(args.eval_data, args.eval_split, args)
    if test.classes != pictures.classes:
        raise SystemExit(f"--eval-data: its classes {test.classes} are not the training data's {pictures.classes}")

    cam = build(args, len(pictures.classes), pretrained=args.pretrained).to(accelerator.device)
    bank = ContextPrototypeBank(len(pictures.classes), cam.channels, **keywords("--bank", args.bank))
    net = Network(cam, bank.to(accelerator.device))
    progress = Progress(PLAN, args, accelerator, began)
    if progress.wants("classify"):
        first_masks(args, argv, lambda flags: run(parse(flags), flags, accelerator))
        if args.weights is not None:
            load_backbone(cam, args.weights)
        progress.done("classify", {"history": classify(net, pictures, args, accelerator)})
    if progress.wants("seeds"):
        restore(net, args)
        maps, sweeps = seeds(net, {"train": pictures, "eval": test}, args, accelerator)
        progress.done("seeds", {"maps": maps, "sweeps": sweeps})
    if progress.wants("refine"):
        progress.done("refine", {"pseudo_masks": refine(pictures, progress.found, args, accelerator)})
    scored = progress.found.get("segmentation", {}).get("eval", {})
    if progress.wants("segment", complete="ceiling" in scored or not args.ceiling):
        restore(net, args)
        progress.done("segment", segmentation(net, pictures, test, args, accelerator))
    broken = {"train": pictures.broken, "eval": test.broken}
    metrics = progress.metrics(args.method, PACKAGES, head=args.head, broken=broken)
    if accelerator.is_main_process:
        write_json(args.output / "metrics.json", metrics)
        head = "" if args.head == "cam" else f" with head {args.head}"
        title = f"CPAL on {Path(args.data).name}: {args.method}{head}, seed {args.seed}"
        report(title, metrics, progress.found, pictures, args)
    return metrics


def segmentation(
    net: Network, pictures: Pictures, test: Pictures, args: argparse.Namespace, accelerator: Accelerator
) -> dict[str, Any]:
    """Train on the pseudo masks and, with ``--ceiling``, on the true ones."""
    scores, history = segment("segment", partial(pseudo_mask, args=args), net, pictures, test, args, accelerator)
    if args.ceiling:
        ceiling, _ = segment("ceiling", true_mask, net, pictures, test, args, accelerator)
        scores["ceiling"] = ceiling["miou"]
    return {"segmentation": {"eval": scores}, "history": history}


if __name__ == "__main__":
    main()
