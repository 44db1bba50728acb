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

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from protoseg import ContextPrototypeBank
from protoseg.data import Sample, load_mask
from protoseg.functional import load_refiner
from protoseg.models.backbones import BankFeatures
from protoseg.models.mct import Fusion
from protoseg.models.segmentation import build_segmentation_network
from protoseg.recipes.cpal_heads import HEADS, begin, build, colors, encoder, first_masks, first_results, losses
from protoseg.recipes.cpal_stages import MAPS, SIDE, Network, score_segmentation, seeds
from protoseg.recipes.engine import train
from protoseg.recipes.files import keywords, load_checkpoint, write_json
from protoseg.recipes.flags import add_shared, check_counts, check_threshold
from protoseg.recipes.pictures import MEAN, STD, Crops, Pictures, open_pictures
from protoseg.recipes.progress import Plan, Progress
from protoseg.recipes.pseudo_masks import pseudo_mask, refine, report, true_mask

PACKAGES = ("protoseg", "torch", "numpy", "timm", "accelerate", "segmentation-models-pytorch")
PLAN = Plan(
    files={
        "classify": ("checkpoint/classify.pt", "checkpoint/fork.pt"),
        "seeds": ("seeds/*.npz",),
        "refine": ("pseudo_masks/*.png",),
        "segment": ("checkpoint/segment.pt", "checkpoint/ceiling.pt", "metrics.json", "report.html"),
    },
    results={"classify": (), "seeds": ("maps", "sweeps"), "refine": ("pseudo_masks",), "segment": ("segmentation",)},
    free=("output", "resume", "overwrite", "fork", "stages", "device", "workers", "skip_broken", "ceiling"),
    own={
        "seeds": ("maps", "bank_rounds"),
        "refine": ("seed_map", "threshold", "refine"),
        "segment": ("segmentation", "segmentation_epochs"),
    },
)
STAGES = PLAN.stages

# The paper states ResNet-50 and a bank of 1000; everything else in "paper-voc" and "paper-coco" is a guess after SIPE,
# marked as such in docs/cpal.md. "scratch" was chosen on the train and val pictures of MSRC-15. AMN's dilations are the
# published ones, and the same shares of the side of a smaller map. A preset's weights are its backbone's.
PRESETS: dict[str, dict[str, Any]] = {
    "scenes": {
        "backbone": "small:32", "size": 96, "crop": 96, "smallest_crop": 0.5, "epochs": 16, "batch": 16, "lr": 2e-3,
        "scales": [1.0], "segmentation": "unet:backbone", "segmentation_epochs": 5, "rates": [2, 4, 7, 9],
        # The loss at full weight pulls a classifier that is not done in 16 epochs down: 0.357 to 0.401 without it.
        "weight": 0.1,
        # Better by 0.04 here, and on none of the real pictures.
        "bank": ["score=whitened"],
    },
    "pretrained": {
        "backbone": "tf_efficientnet_lite0", "weights": "package:efficientnet-lite0", "size": 288, "crop": 224,
        "smallest_crop": 0.3, "epochs": 6, "batch": 16, "lr": 3e-4, "head_lr": 3.0, "prior": 0.08, "start": 0.6,
        "bank_features": "penultimate", "scales": [1.0, 1.75],
        "segmentation": "deeplabv3plus:backbone", "segmentation_epochs": 10, "rates": [3, 7, 10, 14],
    },
    "scratch": {
        "backbone": "small:32", "size": 157, "crop": 144, "smallest_crop": 0.3, "epochs": 100, "batch": 16, "lr": 2e-3,
        "scales": [1.0], "segmentation": "unet:backbone", "segmentation_epochs": 40, "rates": [3, 7, 10, 14],
    },
    "paper-voc": {
        "backbone": "resnet50", "weights": "timm", "size": 448, "crop": 512, "smallest_crop": 0.3, "epochs": 5,
        "batch": 16, "lr": 1e-4, "scales": [1.0, 0.5, 1.5, 2.0],
        "segmentation": "deeplabv3plus:resnet101", "segmentation_epochs": 20, "rates": [6, 12, 18, 24],
    },
    "paper-coco": {
        "backbone": "resnet50", "weights": "timm", "size": 512, "crop": 512, "smallest_crop": 0.3, "epochs": 5,
        "batch": 16, "lr": 1e-4, "scales": [1.0, 0.5, 1.5, 2.0],
        "segmentation": "deeplabv3plus:resnet101", "segmentation_epochs": 10, "rates": [6, 12, 18, 24],
    },
}  # fmt: skip
# What presets do not say.
REST: dict[str, Any] = {
    "weights": None, "stride": 16, "bank_features": "last", "head_lr": 1.0, "bank": [], "weight": 1.0,
    "affinity": False, "prior": None, "start": 0.75,
}  # fmt: skip
# What a head wants otherwise. On scenes, one seed, 10 epochs at a rate of 2e-3 gave MCTformer's maps 0.25 and at 5e-4
# 0.35 (the plain CAM has 0.33), and affinity flooded them (0.14). The published rate is 5e-4 for 512 pictures a step.
# AMN begins with a trained backbone, and so takes few epochs. Narrower networks keep to the minutes of the plain CAM.
HEAD_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "amn": {
        # Its weights are those of its first run's backbone, which had the preset's.
        "pretrained": {"weights": None, "first_epochs": 6, "epochs": 4, "prior": None},
        "scenes": {"backbone": "small:24", "first_epochs": 16, "epochs": 4, "segmentation_epochs": 3},
        "scratch": {"backbone": "small:24", "first_epochs": 60, "epochs": 20, "crop": 112},
    },
    "mct": {
        "pretrained": {"lr": 3e-4, "epochs": 8, "weight": 1.0, "prior": None},
        "scenes": {"backbone": "small:24", "lr": 5e-4, "epochs": 12, "weight": 1.0, "segmentation_epochs": 3},
        "scratch": {"backbone": "small:24", "lr": 5e-4, "epochs": 60, "crop": 112},
        "paper-voc": {"backbone": "deit_small_patch16_224", "lr": 2e-5, "affinity": True},
        "paper-coco": {"backbone": "deit_small_patch16_224", "lr": 2e-5, "affinity": True},
    },
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags and fill what was not given from the preset."""
    parser = argparse.ArgumentParser(
        prog="protoseg train cpal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_shared(parser, stages=STAGES, output="runs/cpal", eval_scenes=150)
    add = parser.add_argument
    add("--method", choices=("none", "cpal"), default="cpal")
    add("--preset", choices=tuple(PRESETS), help="default: 'scenes' for scenes, else 'pretrained'")
    group = parser.add_argument_group("network")
    group.add_argument("--head", choices=HEADS, default="cam", help="the plain CAM, AMN's or MCTformer's network")
    group.add_argument("--backbone", help="'small', 'small:WIDTH' or a timm name")
    group.add_argument(
        "--weights",
        help="what the backbone begins with: 'timm', 'package:efficientnet-lite0', a file (safetensors, a state dict, "
        "checkpoint/classify.pt of a run), or 'none'",
    )
    group.add_argument("--stride", type=int, choices=(8, 16, 32), help="pixels per feature of a timm backbone")
    group.add_argument("--size", type=int, help="test pictures get the area of a square of this side, in pixels")
    group.add_argument(
        "--scales", type=float, nargs="+", help="test scales, each also mirrored; maps have the grid of the first"
    )
    group.add_argument("--crop", type=int, help="side of the training crops in pixels")
    group.add_argument("--smallest-crop", type=float, help="smallest share of a picture's area in a crop")
    group.add_argument("--epochs", type=int)
    group.add_argument("--batch", type=int, help="per process")
    group.add_argument("--lr", type=float)
    group.add_argument("--prior", type=float, help="share of the pictures that a class is expected in (plain CAM)")
    group.add_argument("--head-lr", type=float, help="factor on --lr outside the backbone")
    group = parser.add_argument_group("heads of other papers")
    group.add_argument("--masks", type=Path, help="amn: folder of the masks to learn from, such as RUN/pseudo_masks")
    group.add_argument("--first-epochs", type=int, help="amn: of the run that makes its masks")
    group.add_argument("--smoothing", type=float, default=0.4, help="amn: of the labels")
    group.add_argument("--rates", type=int, nargs="+", help="amn: dilations")
    group.add_argument("--fusion", choices=get_args(Fusion), default="v2", help="mct: how its two maps become one")
    group.add_argument("--affinity", action=argparse.BooleanOptionalAction, help="mct: spread the map by attention")
    group = parser.add_argument_group("bank (see ContextPrototypeBank; defaults are its own)")
    group.add_argument(
        "--bank-features", choices=get_args(BankFeatures), help="the backbone's last map, or the one before it"
    )
    group.add_argument("--weight", type=float, help="of the bank's loss (default: 1, for scenes 0.1 but for mct 1)")
    group.add_argument("--start", type=float, help="share of the epochs before the bank's loss counts")
    group.add_argument("--bank-rounds", type=int, default=3, help="passes in which it is filled after the training")
    group.add_argument(
        "--fork",
        type=Path,
        help="checkpoint/fork.pt of a run of --method none with the same flags, to go on from there",
    )
    group.add_argument(
        "--bank",
        nargs="*",
        metavar="NAME=VALUE",
        help="arguments of ContextPrototypeBank, in the place of a preset's (for scenes: score=whitened)",
    )
    group = parser.add_argument_group("masks and segmentation")
    group.add_argument("--maps", nargs="+", choices=MAPS, default=list(MAPS), help="to make and score (default: all)")
    group.add_argument("--seed-map", choices=MAPS, help="map of the pseudo masks (default: pacam, or cam with 'none')")
    group.add_argument("--threshold", default="otsu", help="otsu, sweep (uses masks), or a number")
    group.add_argument("--refine", default="pamr", help="pamr, none, or package.module:function")
    group.add_argument(
        "--segmentation", help="ARCHITECTURE:ENCODER of segmentation_models_pytorch, or ARCHITECTURE:backbone"
    )
    group.add_argument("--segmentation-epochs", type=int)
    group.add_argument("--ceiling", action="store_true", help="also train on the true masks, to compare")

    args = parser.parse_args(argv)
    args.preset = args.preset or ("scenes" if args.data == "scenes" else "pretrained")
    preset = {**REST, **PRESETS[args.preset], **HEAD_PRESETS.get(args.head, {}).get(args.preset, {})}
    if args.masks is not None:  # there is no first run to begin with
        preset["weights"] = PRESETS[args.preset].get("weights")
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.weights = None if args.weights == "none" else args.weights
    if args.head == "amn" and args.fork is not None and args.masks is None:
        for name, path in first_results(args.fork / "first").items():
            setattr(args, name, path)
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
        crops,
        loss_of,
        args.epochs,
        args,
        accelerator,
        {"bank": net.bank},
        head_lr=args.head_lr,
        keep=filling if args.method == "none" else 0,
        fork=fork_of(args) if args.method == "cpal" and args.fork is not None else None,
    )


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
    outputs = len(pictures.classes) + 1
    weights: Literal["timm"] | None = "timm" if args.weights == "timm" else None
    model = build_segmentation_network(args.segmentation, outputs, backbone=encoder(net.cam), weights=weights)
    model = model.to(accelerator.device)
    # The encoders that segmentation_models_pytorch names want the colors of ImageNet.
    mean, std = colors(net.cam) if args.segmentation.endswith(":backbone") else (MEAN, STD)
    crop = args.crop // SIDE * SIDE
    share = (args.smallest_crop, 1.0)
    crops = Crops(pictures, crop, seed=args.seed, share=share, masks=masks, mean=mean, std=std)

    def loss_of(network: nn.Module, batch: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        # A mean over the pixels that are not void; a batch of nothing but void gives 0.
        target = batch["masks"]
        summed = F.cross_entropy(network(batch["images"]).float(), target, ignore_index=255, reduction="sum")
        return {name: summed / (target != 255).sum().clamp_min(1)}

    epochs = args.segmentation_epochs
    history = train(name, model, crops, loss_of, epochs, args, accelerator, {}, head_lr=args.head_lr)
    return score_segmentation(model, test, args, accelerator, mean, std), history


def check(args: argparse.Namespace) -> None:
    """Stop now, and not after hours, for what a later stage cannot use."""
    counts = ("size", "crop", "epochs", "batch", "segmentation_epochs", "train_scenes", "eval_scenes", "bank_rounds")
    check_counts(args, [*counts, *["first_epochs"] * (args.head == "amn")])
    if args.masks is not None and (args.head != "amn" or not args.masks.is_dir()):
        problem = f"no such folder: {args.masks}" if args.head == "amn" else "only --head amn learns from masks"
        raise SystemExit(f"--masks: {problem}")
    if args.seed_map not in args.maps:
        raise SystemExit(f"--seed-map: {args.seed_map} is not among --maps {' '.join(args.maps)}")
    named = args.weights is None or args.weights == "timm" or args.weights.startswith("package:")
    if not named and not Path(args.weights).is_file():
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
        check_fork(args)
    for flag in () if args.resume else ("fork", "masks", "weights"):
        given, output = Path(getattr(args, flag) or "nothing").resolve(), args.output.resolve()
        if given.is_relative_to(output) and given.relative_to(output).parts[:1] != ("first",):
            raise SystemExit(f"--{flag}: {given} is in --output, where this run begins anew; take another --output")
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


def check_fork(args: argparse.Namespace) -> None:
    """Stop where the run to take up did not keep its middle, or was made with other flags."""
    if args.method != "cpal":
        raise SystemExit("--fork: only --method cpal takes up another run")
    try:
        before = json.loads((args.fork / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--fork: {args.fork} is no run's folder: {error}") from error
    if before.get("method") != "none" or not fork_of(args).is_file():
        raise SystemExit(f"--fork: {args.fork} must be a run of --method none with its {fork_of(args).name}")

    if args.head == "amn" and before.get("masks") is None:  # those of its first run
        before |= {name: str(path) for name, path in first_results(args.fork / "first").items()}
    free = {*PLAN.free, "method", "weight", "bank", *(name for names in PLAN.own.values() for name in names)}
    now = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    changed = [key for key in now if key not in free and before.get(key) != now[key]]
    if changed:
        told = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed)
        raise SystemExit(f"--fork: {args.fork} is a run with other flags: {told}; give the same flags")


def fork_of(args: argparse.Namespace) -> Path:
    """The checkpoint of the run to take up."""
    return Path(args.fork) / "checkpoint" / "fork.pt"


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

    cam = build(args, len(pictures.classes)).to(accelerator.device)
    bank = ContextPrototypeBank(len(pictures.classes), cam.channels, **keywords("--bank", args.bank))
    net = Network(cam, bank.to(accelerator.device))
    progress = Progress(PLAN, args, accelerator, began)
    if progress.wants("classify"):
        first_masks(args, argv, lambda flags: run(parse(flags), flags, accelerator))
        begin(cam, args.weights)
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
