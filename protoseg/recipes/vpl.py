"""VPL end to end: from pictures with image-level tags to masks, by a frozen CLIP and prototypes in its vision space.

    protoseg train vpl                                                   # made scenes, two CPU cores, minutes
    protoseg train vpl --data VOC2012 --clip pocket                      # ImageNet and a sentence encoder, from pip
    protoseg train vpl --data VOC2012 --clip ViT-B-16 --pretrained openai  # any VOC-layout folder
    accelerate launch -m protoseg train vpl --data VOC2012 --clip ViT-B-16 --pretrained openai

Stages: ``prototypes`` learns them from the training pictures' features and tags; ``seeds`` writes and scores the maps
of Grad-CAM with text prototypes (``text``), with these less their mean (``text_centered``, which any gain has to be
compared with), with vision prototypes (``vision``) and that refined by affinity (``vision_affinity``); ``refine`` turns
one of them into pseudo masks; ``segment`` trains a decoder on CLIP's frozen features with them and, with ``--rsc``,
regional semantic contrast, and writes the final masks. Without ``--clip`` a small CLIP is first trained on made scenes
with captions, and kept in ``--cache``.

``--resume`` goes on with a stopped run; ``--stages`` without it runs these stages anew on what the earlier ones left.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from protoseg.clip import FrozenCLIP
from protoseg.functional import load_refiner
from protoseg.recipes.engine import crop_batches, train
from protoseg.recipes.files import load_checkpoint, save_checkpoint, write_json
from protoseg.recipes.options import check_counts, check_scales, check_threshold
from protoseg.recipes.pictures import Crops, Pictures, open_pictures, told_of
from protoseg.recipes.progress import Plan, Progress, conclude
from protoseg.recipes.pseudo_masks import baselines, pseudo_mask, refine, report, score_maps
from protoseg.recipes.session import as_line, launch, stoppable
from protoseg.recipes.vpl_options import VPLOptions, parse
from protoseg.recipes.vpl_stages import (
    MAPS,
    Prototypes,
    build_decoder,
    decoder_losses,
    learn,
    picture_maps,
    score_decoder,
    texts,
)

PACKAGES = ("protoseg", "torch", "numpy", "timm", "open_clip_torch", "accelerate")
RSC = ("rsc", "rsc_weight", "rsc_temperature", "rsc_suppression")
DECODER = (
    "layers",
    "decoder_dim",
    "decoder_depth",
    "affinity_weight",
    "epochs",
    "batch",
    "lr",
    "crop",
    "smallest_crop",
)
PLAN = Plan(
    files={
        "prototypes": ("checkpoint/prototypes.pt",),
        "seeds": ("seeds/*.npz",),
        "refine": ("pseudo_masks/**/*.png",),
        "segment": ("checkpoint/decoder.pt", "masks/*.png"),
    },
    results={
        "prototypes": ("prototypes",),
        "seeds": ("maps", "sweeps", "counted", "trivial"),
        "refine": ("pseudo_masks",),
        "segment": ("segmentation",),
    },
    free=("cache",),
    own={"refine": ("seed_map", "threshold", "refine", *RSC, *DECODER), "segment": (*RSC, *DECODER)},
    epochs={"segment": "epochs"},
)


def check(args: VPLOptions) -> None:
    """Stop now, and not after hours, for what a later stage cannot use."""
    check_counts(args, ("size", "crop", "epochs", "batch", "train_scenes", "eval_scenes", "clip_steps", "clip_scenes"))
    check_scales(args.scales)
    check_threshold(args.threshold)
    if args.pretrained and args.clip in (None, "pocket"):
        raise SystemExit("--pretrained: needs --clip, the name of the model that these weights are of")
    load_refiner(args.refine)


def open_clip_model(args: VPLOptions, accelerator: Accelerator) -> FrozenCLIP:
    """Load the model that ``--clip`` names, or the small one."""
    if args.clip == "pocket":
        return FrozenCLIP.pocket(device=accelerator.device)
    if args.clip:
        precision = args.clip_precision
        return FrozenCLIP.load(args.clip, args.pretrained, device=accelerator.device, precision=precision)
    from protoseg.recipes import small_clip

    return small_clip.load(args, accelerator)


def segment(
    clip: FrozenCLIP,
    prototypes: Prototypes,
    splits: dict[str, Pictures],
    args: VPLOptions,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Train the decoder on the pseudo masks and score its own."""
    set_seed(args.seed)
    decoder = build_decoder(clip, splits["train"], args).to(accelerator.device)
    masks = partial(pseudo_mask, args=args)
    share = (args.smallest_crop, 1.0)
    crops = Crops(splits["train"], args.crop, seed=args.seed, share=share, masks=masks, mean=clip.mean, std=clip.std)
    losses = decoder_losses(clip, prototypes, args)
    batches = crop_batches(crops, args.batch, args, accelerator)
    history = train("decoder", decoder, batches, losses, args.epochs, args, accelerator, {}, lr=args.lr)
    return {"segmentation": score_decoder(clip, decoder, splits, args, accelerator), "history": history}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the stages and write ``metrics.json``, ``report.html`` and the masks; returns the metrics."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv, __doc__)
    check(args)
    accelerator = launch(args)
    with stoppable(args):
        metrics = run(args, argv, accelerator)
    conclude(metrics, args.output, accelerator)
    return metrics


def run(args: VPLOptions, argv: Sequence[str], accelerator: Accelerator) -> dict[str, Any]:
    """Run the stages for flags that have been read."""
    began = time.monotonic()
    splits = {
        "train": open_pictures(args.data, args.train_split, args),
        "eval": open_pictures(args.eval_data or args.data, args.eval_split, args),
    }
    if splits["eval"].classes != splits["train"].classes:
        raise SystemExit(
            f"--eval-data: its classes {splits['eval'].classes} are not the training data's {splits['train'].classes}"
        )

    if args.shift == "channels":
        for each in splits.values():
            each.channels = [1, 2, 0]

    clip = open_clip_model(args, accelerator)
    # Names, layers or sizes that do not suit stop here, before an older run's files go.
    texts(clip, splits["train"].classes, args, say=accelerator.print)
    build_decoder(clip, splits["train"], args)

    progress = Progress(PLAN, args, accelerator, began)
    set_seed(args.seed)

    path = args.output / "checkpoint" / "prototypes.pt"
    if progress.wants("prototypes"):
        learnt, found = learn(clip, splits["train"], args, accelerator)
        if accelerator.is_main_process:
            save_checkpoint(path, learnt._asdict())
        progress.done("prototypes", {"prototypes": found})
    prototypes = Prototypes(**{key: each.to(accelerator.device) for key, each in load_checkpoint(path).items()})

    if progress.wants("seeds"):
        maps_of = partial(picture_maps, clip, prototypes, args=args)
        scores = score_maps(splits, maps_of, MAPS, args, accelerator)
        plain_scores = baselines(splits, scores.counted, accelerator)
        progress.done("seeds", {**scores._asdict(), "trivial": plain_scores})
    if progress.wants("refine"):
        progress.done("refine", {"pseudo_masks": refine(splits["train"], progress.found, args, accelerator)})
    if progress.wants("segment"):
        progress.done("segment", segment(clip, prototypes, splits, args, accelerator))

    method = "with regional contrast" if args.rsc else "without regional contrast"
    metrics = progress.metrics(
        method,
        PACKAGES,
        prototypes=progress.found.get("prototypes", {}),
        broken={split: each.broken for split, each in splits.items()},
        survey=told_of(splits),
    )
    if accelerator.is_main_process:
        write_json(args.output / "metrics.json", metrics)
        title = f"VPL on {Path(args.data).name}: {method}, seed {args.seed}"
        line = as_line(("protoseg", "train", "vpl", *argv))
        report(title, metrics, progress.found, splits["train"], args, line)
    return metrics


if __name__ == "__main__":
    main()
