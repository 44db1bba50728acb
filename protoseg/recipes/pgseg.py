"""PGSeg end to end: from pictures with sentences to masks for classes that are given by name.

    protoseg train pgseg                                       # made scenes, two CPU cores, minutes
    protoseg train pgseg --data pairs.csv --eval-data FOLDER   # your pictures, masks to score by
    protoseg train pgseg --preset lite0 --data VOC2012         # real pictures: tokens of a trained backbone, MiniLM
    protoseg train pgseg --preset vit-s --data "shards/{000000..000331}.tar" --shard-pairs 700000

Many processes: ``accelerate launch -m protoseg train pgseg ...`` (torchrun takes ``--npr`` for its own unless two
dashes stand before ``protoseg``).

``--data`` is ``scenes``, a CSV with the columns ``path`` and ``caption``, a folder in the layout of PASCAL VOC
(sentences are made of its tags), or webdataset shards. ``--npr`` says which prototypes regularize the groups: those of
image tokens, of words, both, or none. ``--resume`` goes on with a stopped run after its last whole epoch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from protoseg.clip import readable
from protoseg.data import Broken, ShardPairs
from protoseg.models.pgseg.network import PRESETS as NETWORKS
from protoseg.models.pgseg.network import PGSeg, PGSegConfig
from protoseg.models.pgseg.text import vocabulary
from protoseg.recipes.engine import Schedule, train
from protoseg.recipes.files import keywords, load_checkpoint, write_json
from protoseg.recipes.pgseg_data import View, Views, nouns_of, open_views, view_batches
from protoseg.recipes.pgseg_eval import Setting, diagnose, groups, panels, zero_shot
from protoseg.recipes.pgseg_options import PGSegOptions, parse
from protoseg.recipes.pictures import Pictures, open_pictures
from protoseg.recipes.progress import Plan, Progress, conclude
from protoseg.recipes.pseudo_masks import trivial
from protoseg.recipes.session import launch, stoppable
from protoseg.report import Picture, write_report

PLAN = Plan(
    files={"train": ("checkpoint/train.pt", "broken/*"), "score": ()},
    results={"train": ("words",), "score": ("maps", "sweeps", "groups", "trivial")},
    free=("eval_every",),
    own={"score": ("background", "score", "eval_data", "tune_split", "eval_split", "eval_scenes")},
    epochs={"train": "epochs"},
)
PACKAGES = ("protoseg", "torch", "numpy", "timm", "open_clip_torch", "accelerate", "webdataset")


def configure(args: PGSegOptions, words: tuple[str, ...]) -> PGSegConfig:
    """Set up the network's sizes from preset and flags."""
    config = NETWORKS[args.preset]
    changes: tuple[dict[str, Any], dict[str, Any]] = {}, {}

    for name, value in keywords("--network", args.network).items():
        place = next((place for place in (config, config.image) if hasattr(place, name)), None)
        if place is None:
            raise SystemExit(f"--network: neither PGSegConfig nor ImageConfig has a field {name!r}")
        if isinstance(getattr(place, name), tuple):
            value = tuple(int(part) for part in str(value).split(","))
        changes[place is config.image][name] = value

    image = dataclasses.replace(
        config.image,
        **{"image_size": args.size, "npr": _options(config.image.npr, args, "image"), **changes[1]},
    )

    sizes = {
        "test_side": config.test_side * args.size // config.image.image_size,
        "npr_text": _options(config.npr_text, args, "text"),
        "vocabulary": words,
        "nouns": words if args.weight_nouns else (),
    }
    return dataclasses.replace(config, image=image, **{**sizes, **changes[0]})


def _options(preset: Any, args: PGSegOptions, source: str) -> dict[str, Any] | None:
    """The regularizer's options, or None where ``--npr`` leaves it out."""
    return {**preset, **keywords("--npr-options", args.npr_options)} if args.npr in (source, "both") else None


def learn(
    model: PGSeg, views: Views | ShardPairs[View], args: PGSegOptions, accelerator: Accelerator, evaluate: Any
) -> list[dict[str, Any]]:
    """Train and save after each epoch; returns the history: losses, prototypes and, where asked for, the score."""
    last: dict[str, Any] = {}

    def loss_of(network: nn.Module, batch: tuple[Tensor, list[str]], epoch: int) -> dict[str, Tensor]:
        images, captions = batch
        out = network(images.to(accelerator.device), model.text.tokenize(captions).to(accelerator.device))
        last["out"] = out
        npr = float(epoch >= args.npr_start * args.epochs)
        return {
            "contrast": out.contrast,
            "image prototypes": npr * args.weight_image * out.image_prototypes,
            "text prototypes": npr * args.weight_text * out.text_prototypes,
            "nouns": args.weight_nouns * out.nouns,
        }

    def end_epoch(epoch: int, losses: dict[str, float]) -> dict[str, Any]:
        out = last.pop("out")
        entry: dict[str, Any] = {"losses": losses, "prototypes": dict(diagnose(out.encoded.stages, out.words))}
        if args.eval_every and (epoch + 1) % args.eval_every == 0 and epoch + 1 < args.epochs:
            entry["zeroshot"] = evaluate()[0]["miou"]
        return entry

    history: list[dict[str, Any]] = train(
        "train",
        model,
        view_batches(views, args),
        loss_of,
        args.epochs,
        args,
        accelerator,
        {},
        lr=args.lr,
        schedule=Schedule(args.warmup, args.final_lr),
        clip_grad=args.clip_grad,
        end_epoch=end_epoch,
    )
    return history


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, score and write ``metrics.json``, ``report.html`` and ``checkpoint/``; returns the metrics."""
    args = parse(argv, __doc__)
    accelerator = launch(args)
    with stoppable(args):
        metrics = run(args, accelerator)
    conclude(metrics, args.output, accelerator)
    return metrics


def run(args: PGSegOptions, accelerator: Accelerator) -> dict[str, Any]:
    """Run the stages for flags that have been read."""
    began = time.monotonic()
    progress = Progress(PLAN, args, accelerator, began)
    set_seed(args.seed)
    broken = args.output / "broken"
    views = open_views(args, broken)
    pictures: list[Pictures] = []
    if args.eval_data:
        pictures = [open_pictures(args.eval_data, split, args) for split in (args.tune_split, args.eval_split)]

    words = tuple(progress.found.get("words", ())) or words_of(views, args)
    if text_of(args) == "words" and pictures and "train" not in progress.found["stages"]:
        # A network of words can be asked for those alone that it has.
        never = [word for word in vocabulary(map(readable, pictures[1].classes)) if word not in words]
        if never:
            accelerator.print(f"--data: no caption has {', '.join(never)}; masks of these classes will mean nothing")
            words = (*words, *never)
    model = PGSeg(configure(args, words)).to(accelerator.device)

    def evaluate() -> tuple[dict[str, Any], tuple[list[float], list[float]]]:
        tune, test = pictures
        return zero_shot(model, tune, test, setting_of(args, test), accelerator)

    if progress.wants("train"):
        progress.done("train", {"history": learn(model, views, args, accelerator, evaluate), "words": words})
    if progress.wants("score") and pictures:
        model.load_state_dict(load_checkpoint(args.output / "checkpoint" / "train.pt")["model"])
        entry, curve = evaluate()
        results = {
            "maps": {"eval": {"zeroshot": entry}},
            "sweeps": {"eval": {"zeroshot": curve}},
            "groups": groups(model, pictures[1], accelerator),
            "trivial": {"eval": trivial(pictures[0], pictures[1])},
        }
        progress.done("score", results)

    history = progress.found["stages"]["train"]["history"]
    metrics = progress.metrics(
        f"npr {args.npr}",
        PACKAGES,
        groups=progress.found.get("groups", {}),
        prototypes=history[-1]["prototypes"],
        history=history,
        broken=dict(Broken.read(broken).counts) if broken.exists() else {},
    )
    if accelerator.is_main_process:
        write_json(args.output / "metrics.json", metrics)
        show(model, metrics, progress.found, pictures, args)
    return metrics


def text_of(args: PGSegOptions) -> str:
    """The text side that preset and flags ask for."""
    found: str = keywords("--network", args.network).get("text", NETWORKS[args.preset].text)
    return found


def setting_of(args: PGSegOptions, pictures: Pictures) -> Setting:
    """How pictures are segmented."""
    return Setting([readable(name) for name in pictures.classes], args.background, args.score)


def words_of(views: Views | ShardPairs[View], args: PGSegOptions) -> tuple[str, ...]:
    """The nouns of the captions; where the text side is a bag of words, they are all that it knows."""
    text = text_of(args)
    if text == "transformer":
        return tuple(args.nouns)
    if isinstance(views, Views):
        # Adjectives in the bag cost mIoU: measured on scenes, 0.30 with them and 0.36 without, after 3 epochs.
        return nouns_of(args.data, vocabulary(views.captions(), least=2), args.nouns)
    if not args.nouns and (text == "words" or args.weight_nouns):
        raise SystemExit(
            f"--preset {args.preset}: nobody reads all captions of shards for their words; give them by --nouns"
        )
    return tuple(args.nouns)


def show(
    model: PGSeg, metrics: dict[str, Any], found: dict[str, Any], pictures: Sequence[Pictures], args: PGSegOptions
) -> None:
    """Write ``report.html``."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for epoch, entry in enumerate(metrics["history"]):
        for name, value in (*entry["losses"].items(), *entry["prototypes"].items()):
            if math.isfinite(value):
                curves.setdefault(name, []).append((epoch + 1, value))

    shown: list[Picture] = []
    if "score" in found["stages"]:
        threshold = metrics["maps"]["eval"]["zeroshot"]["threshold"]
        shown = panels(model, pictures[1], setting_of(args, pictures[1]), threshold)

    write_report(
        args.output / "report.html",
        title=f"PGSeg on {Path(args.data).name}: prototypes {args.npr}, seed {args.seed}",
        metrics=metrics,
        history={name: points for name, points in curves.items() if any(value for _, value in points)},
        sweeps=found.get("sweeps", {}),
        pictures=shown,
        classes=pictures[1].classes if pictures else (),
        config=json.loads((args.output / "config.json").read_text(encoding="utf-8")),
    )


if __name__ == "__main__":
    main()
