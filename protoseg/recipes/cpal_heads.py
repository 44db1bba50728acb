"""The networks of the recipe ``cpal``: by ``--head`` how they are built, what they learn from and what they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.models.amn import AMNNetwork, AMNOutput, activation_loss
from protoseg.models.backbones import Backbone, load_weights
from protoseg.models.cam import CAMNetwork, CAMOutput, build_cam_network
from protoseg.models.mct import (
    Hybrid,
    MCTNetwork,
    MCTOutput,
    TimmTransformer,
    class_token_contrast,
    is_plain_transformer,
)
from protoseg.recipes.cpal_options import CPALOptions, first_results
from protoseg.utils.colors import Color

HEADS = ("cam", "amn", "mct")
HYBRID = 192  # channels of the transformer blocks behind convolutions of timm
Head = CAMNetwork | AMNNetwork | MCTNetwork


def build(args: CPALOptions, num_classes: int) -> Head:
    """Make the network that ``--head`` and ``--backbone`` name, with random weights."""
    small = args.backbone.partition(":")[0] == "small"
    if args.head == "mct" and not small and is_plain_transformer(args.backbone):
        transformer = TimmTransformer(args.backbone)
        return MCTNetwork(transformer, num_classes, fusion=args.fusion, bank_features=args.bank_features)

    network = build_cam_network(
        args.backbone, num_classes, prior=args.prior, stride=args.stride, bank_features=args.bank_features
    )
    if args.head == "mct":
        hybrid = Hybrid(network.backbone, None if small else HYBRID)
        return MCTNetwork(hybrid, num_classes, fusion=args.fusion, bank_features=args.bank_features)
    if args.head == "amn":
        return AMNNetwork(network.backbone, num_classes, rates=args.rates, bank_features=args.bank_features)
    return network


def begin(network: Head, weights: str | None) -> None:
    """Load ``--weights`` into what comes before a head; the blocks of a hybrid are the head's own."""
    if weights is None:
        return

    try:
        if isinstance(network.backbone, TimmTransformer):
            network.backbone.load_weights(weights)
        else:
            backbone = network.backbone
            load_weights(backbone.network if isinstance(backbone, Hybrid) else backbone, weights)
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(f"--weights: {error}") from error


def encoder(network: Head) -> Backbone | None:
    """The convolutions that a segmentation network of ``ARCHITECTURE:backbone`` begins with."""
    backbone = network.backbone
    if isinstance(backbone, Hybrid):
        return backbone.network
    return None if isinstance(backbone, TimmTransformer) else backbone


def colors(network: Head) -> tuple[Color, Color]:
    """Mean and deviation of colors in 0..1, as the network's backbone wants them."""
    return network.backbone.mean, network.backbone.std


def losses(network: nn.Module, batch: dict[str, Tensor], args: CPALOptions) -> tuple[Any, dict[str, Tensor]]:
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


def first_masks(args: CPALOptions, argv: Sequence[str], run: Callable[[Sequence[str]], object]) -> None:
    """Where ``--head amn`` is given no masks to learn from, make them by ``--head cam`` in the folder ``first``.

    Without ``--weights`` the backbone of that run is then the beginning of this one.
    """
    if args.head == "amn" and args.masks is None:
        first = Path(args.output) / "first"
        same = ["--backbone", args.backbone, "--crop", str(args.crop), "--epochs", str(args.first_epochs)]
        own = ["--head", "cam", "--method", "none", "--maps", "cam", "--seed-map", "cam", "--output", str(first)]
        run([*argv, *same, *own, "--stages", "classify", "seeds", "refine"])
        results = first_results(first)
        args.masks = results["masks"]
        args.weights = args.weights or results["weights"]
