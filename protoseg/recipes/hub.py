"""The folder ``model/`` of a run: network and bank as one model, to be loaded or shared by name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from protoseg.models.hub import PrototypeModel
from protoseg.recipes.cpal_heads import build, colors
from protoseg.recipes.cpal_options import CPALOptions
from protoseg.recipes.files import keywords, load_checkpoint
from protoseg.utils.files import replacing

__all__ = ["model_of", "save_model"]


def model_of(args: CPALOptions, classes: Sequence[str], threshold: float) -> PrototypeModel:
    """Make the model of a run of ``--head cam`` from its checkpoints.

    Args:
        args: The run's flags.
        classes: Names of its classes.
        threshold: Of its masks.
    """
    mean, std = colors(build(args, len(classes)))
    model = PrototypeModel(
        list(classes),
        args.backbone,
        size=args.size,
        mean=list(mean),
        std=list(std),
        threshold=threshold,
        map=args.seed_map,
        scales=list(args.scales),
        stride=args.stride,
        bank_features=args.bank_features,
        prior=args.prior,
        bank=keywords("--bank", args.bank),
    )
    folder = args.output / "checkpoint"
    model.network.load_state_dict(load_checkpoint(folder / "classify.pt")["model"])
    model.bank.load_state_dict(load_checkpoint(folder / "bank.pt")["bank"])
    return model.eval()


def save_model(args: CPALOptions, classes: Sequence[str], threshold: float) -> None:
    """Write ``model/``, each file in one step."""
    target = args.output / "model"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model_of(args, classes, threshold).save_pretrained(folder)
        for file in Path(folder).iterdir():
            with replacing(target / file.name) as whole:
                shutil.copyfile(file, whole)
