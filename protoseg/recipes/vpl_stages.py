"""The stages of the recipe ``vpl``: features and prototypes, maps, the decoder with regional contrast, final masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from protoseg import RegionalSemanticContrast, VisionPrototypeLearner
from protoseg.clip import BACKGROUND, FrozenCLIP, background_names, readable
from protoseg.data import Sample, save_mask
from protoseg.functional import (
    attention_affinity,
    feature_attention,
    max_normalize,
    multi_scale,
    refine_by_affinity,
)
from protoseg.metrics import ConfusionMatrix
from protoseg.models.decoder import Decoded, FrozenDecoder, affinity_loss, balanced_cross_entropy
from protoseg.recipes.pictures import Pictures
from protoseg.recipes.pseudo_masks import enlarge, named
from protoseg.recipes.session import share
from protoseg.recipes.vpl_options import VPLOptions

MAPS = ("text", "text_centered", "vision", "vision_affinity")


class Prototypes(NamedTuple):
    """What pictures are compared with: classes, each ``[C, E]``, and background ``[K, E]``, 0 rows where left out."""

    text: Tensor
    text_centered: Tensor
    vision: Tensor
    background: Tensor


def texts(
    clip: FrozenCLIP, classes: Sequence[str], args: VPLOptions, say: Callable[[str], object] | None = None
) -> tuple[Tensor, Tensor]:
    """Text prototypes of the classes and of background, by the strategy that the flags ask for.

    ``say`` is told which background prompts are left out, as they are classes.
    """
    templates: Sequence[str] = args.templates or clip.templates
    if args.prompts == "single":
        templates = templates[:1]
    synonyms = args.other_names()
    names = [[readable(each) for each in (name, *synonyms.get(name, ()))] for name in classes]
    background, left_out = background_names(names, args.background_names or BACKGROUND)
    if left_out and args.background and say is not None:
        say(f"background prompts left out, as they are classes: {', '.join(left_out)}")
    text = clip.text_prototypes(names, templates)
    return text, clip.text_prototypes(background, templates) if args.background and background else text[:0]


@torch.no_grad()
def learn(
    clip: FrozenCLIP, pictures: Pictures, args: VPLOptions, accelerator: Accelerator
) -> tuple[Prototypes, dict[str, float]]:
    """Phase 1: vision prototypes from the training pictures' features and, with ``--fit-tags``, their tags."""
    text, background = texts(clip, pictures.classes, args)
    features, labels = [text[:0]], [torch.zeros(0, len(text))]
    for index in share(len(pictures), "features", accelerator):
        sample = pictures[index]
        features.append(clip.encode(clip.prepare(sample.image, args.size), pooling=args.pooling).pooled)
        labels.append(sample.labels[None])
    learner = VisionPrototypeLearner(
        text,
        text_temperature=clip.temperature,
        vision_temperature=args.ratio * clip.temperature,
        balance=args.balance,
    )
    learner.fit(torch.cat(features), torch.cat(labels).to(text) if args.fit_tags else None)
    fit, vision = learner.last_fit, learner.prototypes.detach()
    assert fit is not None
    found = {"kl_start": fit.start, "kl_end": fit.end, "steps": float(fit.iterations)}
    found["cosine_text_vision"] = float((learner.text * vision).sum(-1).mean())
    return Prototypes(text, learner.centered_text, vision, background), found


def picture_maps(
    clip: FrozenCLIP, prototypes: Prototypes, sample: Sample, args: VPLOptions
) -> tuple[dict[str, Tensor], Tensor]:
    """The maps ``[C, h, w]`` in 0..1 of one picture, absent classes 0, and its features ``[D, h, w]``.

    They are means over ``--scales``, on the grid of the first.
    """
    labels = sample.labels[None]
    attentions = min(args.attentions, clip.blocks) if clip.attends else 0

    def look(pixels: Tensor) -> list[Tensor]:
        seen = clip.encode(pixels, attentions=attentions, pooling=args.pooling)
        maps = {}
        for name in ("text", "text_centered", "vision"):
            vectors = getattr(prototypes, name)
            found = clip.grad_cam(pixels, vectors, prototypes.background, labels, pooling=args.pooling, seen=seen)
            maps[name] = max_normalize(found)

        attention = feature_attention(seen.features) if seen.attention is None else seen.attention
        spread = refine_by_affinity(maps["vision"], attention_affinity(attention), args.box_threshold)
        maps["vision_affinity"] = max_normalize(spread)
        return [*(maps[name] for name in MAPS), seen.features]

    pixels = clip.prepare(sample.image, args.size)
    *maps, features = multi_scale(look, pixels, scales=args.scales, flip=False, multiple=clip.patch)
    return {name: each[0] for name, each in zip(MAPS, maps, strict=True)}, features[0]


def build_decoder(clip: FrozenCLIP, pictures: Pictures, args: VPLOptions) -> FrozenDecoder:
    """Make the decoder for the layers that ``--layers`` names."""
    pixels = clip.prepare(pictures[0].image, args.size)
    seen = clip.encode(pixels, layers=args.layers)
    widths = [each.shape[1] for each in seen.layers]
    sizes = {"dim": args.decoder_dim, "depth": args.decoder_depth, "heads": max(1, args.decoder_dim // 32)}
    return FrozenDecoder(widths, len(pictures.classes), seen.pooled.shape[-1], **sizes)


def decoder_losses(
    clip: FrozenCLIP, prototypes: Prototypes, args: VPLOptions
) -> Callable[[nn.Module, dict[str, Tensor], int], dict[str, Tensor]]:
    """Phase 2: how the decoder learns from pseudo masks and, with ``--rsc``, from prototypes."""
    contrast = RegionalSemanticContrast(temperature=args.rsc_temperature, suppression=args.rsc_suppression)
    vectors, background = prototypes.vision, prototypes.background

    def losses(network: nn.Module, batch: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        masks, labels = batch["masks"], batch["labels"]
        out: Decoded = network(clip.encode(batch["images"], layers=args.layers).layers)
        logits = F.interpolate(out.logits.float(), masks.shape[-2:], mode="bilinear", align_corners=False)
        grid = F.interpolate(masks[:, None].float(), out.logits.shape[-2:], mode="nearest-exact")[:, 0].long()
        parts = {
            "segment": balanced_cross_entropy(logits, masks),
            "affinity": args.affinity_weight * affinity_loss(out.affinity, grid),
        }
        if args.rsc:
            # Regions of present classes by the pseudo masks; of absent ones by what the decoder takes for them.
            seeds = F.one_hot(grid.masked_fill(grid == 255, 0), out.logits.shape[1])[..., 1:].movedim(-1, 1).float()
            absent = (1 - labels)[:, :, None, None].to(seeds)
            regions = seeds * (1 - absent) + out.logits.float().softmax(1)[:, 1:] * absent
            found = contrast(out.features, regions, vectors, labels, background)
            parts["contrast"] = args.rsc_weight * found.loss
        return parts

    return losses


@torch.no_grad()
def score_decoder(
    clip: FrozenCLIP,
    decoder: FrozenDecoder,
    splits: dict[str, Pictures],
    args: VPLOptions,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Scores of the decoder's masks; those of the training pictures, made with tags, are kept in ``masks/``.

    ``miou`` is with tags on the training pictures, and without them on others, where ``miou_tagged`` is with them.
    """
    decoder.eval()
    scores = {}
    (args.output / "masks").mkdir(parents=True, exist_ok=True)
    for split, pictures in splits.items():
        free, tagged, floor = (ConfusionMatrix(len(pictures.classes)) for _ in range(3))
        for index in share(len(pictures), f"{split} masks", accelerator):
            sample = pictures[index]
            pixels = clip.prepare(sample.image, args.size)
            both = torch.cat([pixels, pixels.flip(-1)])
            logits = decoder(clip.encode(both, layers=args.layers).layers).logits.float().softmax(1)
            shares = enlarge((logits[0] + logits[1].flip(-1)) / 2, sample.image).cpu()

            mask = shares.argmax(0).to(torch.uint8)
            shares[1:][sample.labels == 0] = 0
            known = shares.argmax(0).to(torch.uint8)
            if split == "train":
                save_mask(final_mask_path(args, sample.id), known)

            if sample.mask is not None:
                free.update(mask, sample.mask)
                tagged.update(known, sample.mask)
                floor.update(torch.zeros_like(mask), sample.mask)

        with_tags = tagged.all_reduce()
        scores[split] = named(with_tags if split == "train" else free.all_reduce(), pictures.classes)
        if split != "train":
            scores[split]["miou_tagged"] = with_tags.result().miou
        scores[split]["all_background"] = floor.all_reduce().result().miou
    return scores


def final_mask_path(args: VPLOptions, name: str) -> Path:
    """File of a training picture's final mask."""
    return Path(args.output) / "masks" / f"{name}.png"
