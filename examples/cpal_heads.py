"""The networks of ``train_cpal.py``: by ``--head`` how they are built, what they learn from and what they give."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from common import load_checkpoint
from torch import Tensor, nn

from protoseg.models.amn import AMNNetwork, AMNOutput, activation_loss
from protoseg.models.heads import CAMNetwork, CAMOutput, SmallResNet, TimmBackbone, build_cam_network
from protoseg.models.mct import MCTNetwork, MCTOutput, SmallHybrid, TimmTransformer, class_token_contrast

HEADS = ("cam", "amn", "mct")
Head = CAMNetwork | AMNNetwork | MCTNetwork


def build(args: argparse.Namespace, num_classes: int, *, pretrained: bool) -> Head:
    """Make the network that ``--head`` and ``--backbone`` name."""
    if args.head == "mct":
        kind, _, width = args.backbone.partition(":")
        if kind != "small":
            return MCTNetwork(TimmTransformer(args.backbone, pretrained=pretrained), num_classes, fusion=args.fusion)
        if width and not width.isdecimal():
            raise ValueError(f"expected something like 'small:32', got {args.backbone!r}")
        return MCTNetwork(SmallHybrid(int(width or 32)), num_classes, fusion=args.fusion)
    network = build_cam_network(args.backbone, num_classes, pretrained=pretrained)
    return AMNNetwork(network.backbone, num_classes, rates=args.rates) if args.head == "amn" else network


def encoder(network: Head) -> SmallResNet | TimmBackbone | None:
    """The convolutions that a segmentation network of ``unet:backbone`` may begin with."""
    backbone = network.backbone
    if isinstance(backbone, SmallHybrid):
        return backbone.network
    return None if isinstance(backbone, TimmTransformer) else backbone


def losses(network: nn.Module, batch: dict[str, Tensor], args: argparse.Namespace) -> tuple[Any, dict[str, Tensor]]:
    """Run a batch: the network's output, and the losses that it learns from without a bank."""
    images, labels = batch["images"], batch["labels"]
    if args.head == "amn":
        amn: AMNOutput = network(images, labels)
        return amn, {"activation": activation_loss(amn.logits, batch["masks"], args.smoothing)}
    out: CAMOutput | MCTOutput = network(images)
    parts = {"classify": F.multilabel_soft_margin_loss(out.logits.float(), labels)}
    if isinstance(out, MCTOutput):
        parts["tokens"] = F.multilabel_soft_margin_loss(out.token_logits.float(), labels)
        if args.fusion == "plus":
            parts["contrast"] = class_token_contrast(out.tokens, labels)
    return out, parts


def reader(network: Head, labels: Tensor, affinity: bool) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What turns pictures with the same tags ``[1, C]`` into features and raw CAM, as the head makes its own maps."""

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(network, AMNNetwork):
            amn: AMNOutput = network(images, labels.expand(len(images), -1))
            return amn.features.float(), amn.cam.float()
        out: CAMOutput | MCTOutput = network(images)
        cam = out.refined() if isinstance(out, MCTOutput) and affinity else out.cam
        return out.features.float(), cam.float()

    return run


def first_masks(args: argparse.Namespace, argv: Sequence[str], run: Callable[[Sequence[str]], object]) -> None:
    """Where ``--head amn`` is given no masks to learn from, make them by ``--head cam`` in the folder ``first``.

    The backbone of that run is then the beginning of this one, as published weights of ImageNet would be.
    """
    if args.head == "amn" and args.masks is None:
        first = Path(args.output) / "first"
        same = ["--backbone", args.backbone, "--crop", str(args.crop), "--epochs", str(args.first_epochs)]
        own = ["--head", "cam", "--method", "none", "--maps", "cam", "--seed-map", "cam", "--output", str(first)]
        run([*argv, *same, *own, "--stages", "classify", "seeds", "refine"])
        args.masks = first / "pseudo_masks"
        if args.weights is None and not args.pretrained:
            args.weights = first / "checkpoint" / "classify.pt"


def load_backbone(network: Head, path: Path) -> None:
    """Begin with the backbone of another run, whose head may be another one."""
    state = load_checkpoint(path)["model"]
    backbone = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    try:
        network.backbone.load_state_dict(backbone)
    except RuntimeError as error:
        raise SystemExit(f"--weights: {path} is of another backbone than this run's: {error}") from error
