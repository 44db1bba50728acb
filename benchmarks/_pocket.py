"""VPL with the pocket model, whose Grad-CAM needs no network once the features are there: many settings in minutes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accuracy import table
from torch import Tensor

from protoseg import VisionPrototypeLearner
from protoseg.clip import Dense, FrozenCLIP, background_names, linear_cam, readable
from protoseg.functional import attention_affinity, feature_attention, max_normalize, refine_by_affinity
from protoseg.metrics import ThresholdSweep
from protoseg.recipes.pictures import Pictures
from protoseg.recipes.pseudo_masks import enlarge, trivial
from protoseg.utils.files import replacing
from protoseg.utils.numeric import unit

# What VOC's and MSRC's classes are called besides; all of them are in common use.
SYNONYMS = {
    "aeroplane": ["airplane", "plane"], "bicycle": ["bike"], "boat": ["ship"], "bus": ["coach"], "car": ["automobile"],
    "chair": ["seat"], "cow": ["cattle"], "dog": ["puppy"], "face": ["head"], "flower": ["blossom"],
    "motorbike": ["motorcycle"], "person": ["man", "woman", "people"], "sofa": ["couch"], "body": ["person"],
    "train": ["railway train"], "tvmonitor": ["television", "screen"], "sign": ["road sign"],
}  # fmt: skip
KINDS = ("text", "text_centered", "vision", "mean")


class Setting(NamedTuple):
    """What a map is made with.

    Attributes:
        kind: Of the prototypes, one of :data:`KINDS`.
        temperature: Of the texts and of Grad-CAM.
        ratio: The vision temperature over that.
        prompts: ``"single"``, ``"ensemble"`` or ``"synonyms"``.
        background: How many background prompts, of CLIP-ES's list, and not the classes' own names.
        balance: Rounds of Sinkhorn.
        scales: Of the pictures' own size; maps of several are averaged.
        affinity: Whether the affinity of features refines the map.
    """

    kind: str = "vision"
    temperature: float = 0.05
    ratio: float = 2.0
    prompts: str = "single"
    background: int = 25
    balance: int = 0
    scales: tuple[float, ...] = (1.0,)
    affinity: bool = False


# Around the defaults, one at a time; then the best of each on the training pictures together.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "temperature": (0.02, 0.05, 0.1),
    "ratio": (1.0, 2.0, 4.0),
    "prompts": ("single", "ensemble", "synonyms"),
    "background": (0, 10, 25),
    "balance": (0, 20),
    "affinity": (False, True),
    "scales": ((1.0,), (1.25,), (1.5,), (1.0, 1.5)),
}


class Bench:
    """Features of both splits, read once and kept, and what settings make of them.

    Args:
        clip: The pocket model.
        splits: ``train`` and ``eval``.
        folder: Where features are kept.
    """

    def __init__(self, clip: FrozenCLIP, splits: dict[str, Pictures], folder: Path) -> None:
        self.clip, self.splits, self.folder = clip, splits, folder
        self.classes = splits["train"].classes
        self.labels = {split: torch.stack([each.labels for each in pictures]) for split, pictures in splits.items()}
        self._pooled: dict[str, Tensor] = {}

    @torch.no_grad()
    def features(self, split: str, index: int, scale: float) -> Tensor:
        """The map ``[E, h, w]`` of a picture, kept in half precision."""
        path = self.folder / f"{split}-{scale}" / f"{index}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                pixels = self.pixels(self.splits[split][index].image, scale)
                torch.save(self.clip.encode(pixels).features[0].half().contiguous(), file)
        found: Tensor = torch.load(path, weights_only=True)
        return found.float()

    def pixels(self, image: Tensor, scale: float) -> Tensor:
        """A picture at a scale of its own size, sides multiples of 32, the classifier's whole stride."""
        sides = [max(1, round(side * scale / 32)) * 32 for side in image.shape[-2:]]
        large = F.interpolate(image[None].float(), sides, mode="bicubic", antialias=True).clamp(0, 255) / 255
        mean, std = (torch.tensor(each)[:, None, None] for each in (self.clip.mean, self.clip.std))
        return (large - mean) / std

    def pooled(self, split: str) -> Tensor:
        """Unit features of whole pictures at their own size, ``[n, E]``."""
        if split not in self._pooled:
            count = len(self.splits[split])
            means = [self.features(split, index, 1.0).mean((-2, -1)) for index in range(count)]
            self._pooled[split] = unit(torch.stack(means))
        return self._pooled[split]

    def texts(self, prompts: str, background: int) -> tuple[Tensor, Tensor]:
        """Text prototypes of classes and background."""
        templates = self.clip.templates if prompts == "ensemble" else self.clip.templates[:1]
        synonyms = SYNONYMS if prompts == "synonyms" else {}
        names = [
            [readable(name), *(each for each in synonyms.get(name, []) if each not in self.classes)]
            for name in self.classes
        ]
        others = background_names(names)[0][:background]
        text = self.clip.text_prototypes(names, templates)
        return text, self.clip.text_prototypes(others, templates) if others else text[:0]

    def prototypes(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """Prototypes of the classes and of background."""
        text, background = self.texts(setting.prompts, setting.background)
        if setting.kind == "text":
            return text, background
        if setting.kind == "text_centered":
            return unit(text - text.mean(0)), background

        pooled, labels = self.pooled("train"), self.labels["train"]
        if setting.kind == "mean":
            return unit(labels.T @ pooled / labels.sum(0)[:, None]), background
        learner = VisionPrototypeLearner(
            text,
            text_temperature=setting.temperature,
            vision_temperature=setting.ratio * setting.temperature,
            balance=setting.balance,
        )
        return learner.fit(pooled, labels).prototypes, background

    def maps(self, split: str, index: int, setting: Setting, found: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """Maps ``[C, H, W]`` of a picture in 0..1, absent classes 0."""
        every = torch.cat(found)
        there = labels.nonzero().flatten()
        total: Tensor | None = None
        for scale in setting.scales:
            features = self.features(split, index, scale)[None]
            seen = Dense(features, unit(features.mean((-2, -1))), None)
            maps = max_normalize(linear_cam(seen, every, len(self.classes), setting.temperature))
            if setting.affinity:
                maps = max_normalize(refine_by_affinity(maps, attention_affinity(feature_attention(features))))
            larger = enlarge(maps[0, there], self.splits[split][index].image)
            total = larger if total is None else total + larger
        assert total is not None
        full = torch.zeros(len(self.classes), *total.shape[1:])
        full[there] = (total / len(setting.scales)).clamp(0, 1)
        return full

    def score(self, setting: Setting, every: int = 1) -> dict[str, float]:
        """Mean IoU with tags, at the best threshold; on unseen pictures also at the training pictures'.

        Args:
            setting: What the map is made with.
            every: Score each so manieth of the training pictures only.
        """
        found = self.prototypes(setting)
        entry: dict[str, float] = {}
        for split, pictures in self.splits.items():
            sweep = ThresholdSweep(len(self.classes))
            for index in range(0, len(pictures), every if split == "train" else 1):
                sample = pictures[index]
                sweep.update(self.maps(split, index, setting, found, sample.labels), sample.labels, sample.mask)
            result = sweep.result()
            entry[split] = result.best.miou
            if split == "train":
                entry["threshold"] = result.best.threshold
            else:
                entry["eval at the threshold"] = result.at(entry["threshold"]).miou
        return entry

    def score_untagged(
        self, setting: Setting, every: int = 1, presences: Sequence[float] = (0.03, 0.1, 0.3)
    ) -> dict[str, Any]:
        """Mean IoU where the model itself says what is there, at the training pictures' best presence and threshold."""
        classes, background = self.prototypes(setting)
        best: dict[str, Any] = {}
        vectors = torch.cat([classes, background])
        for split, pictures in self.splits.items():
            pooled = self.pooled(split)
            shares = (pooled @ unit(vectors).T / setting.temperature).softmax(-1)[:, : len(self.classes)]
            wanted = presences if split == "train" else [best["presence"]]
            for presence in wanted:
                sweep = ThresholdSweep(len(self.classes))
                for index in range(0, len(pictures), every if split == "train" else 1):
                    sample = pictures[index]
                    there = (shares[index] >= presence).float()
                    maps = self.maps(split, index, setting, (classes, background), there)
                    sweep.update(maps, there, sample.mask)
                result = sweep.result()
                if split == "eval":
                    best["eval"] = result.at(best["threshold"]).miou
                elif result.best.miou > best.get("train", 0.0):
                    best |= {"train": result.best.miou, "presence": presence, "threshold": result.best.threshold}
        return best

    def top1(self, setting: Setting) -> dict[str, float]:
        """Share of the pictures whose nearest prototype is that of one of their tags."""
        classes, _ = self.prototypes(setting)
        found = {}
        for split, labels in self.labels.items():
            tagged = labels.any(1)
            nearest = (self.pooled(split) @ classes.T).argmax(1, keepdim=True)
            found[split] = float(labels.gather(1, nearest)[tagged].mean())
        return found


def run(
    clip: FrozenCLIP,
    splits: dict[str, Pictures],
    command: str,
    folder: Path,
    options: bool,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """All tables of a data set; ``save`` is told after each of them."""
    bench = Bench(clip, splits, folder / "features")
    summary: dict[str, Any] = {"command": command, "trivial": trivial(splits["eval"], splits["eval"])}
    # A quarter of a large set is enough to score and choose on.
    every = 4 if len(splits["train"]) > 1000 else 1
    summary["train, every"] = every

    default = Setting()
    summary["kinds"] = {}
    for kind in KINDS:
        setting = default._replace(kind=kind)
        summary["kinds"][kind] = {**bench.score(setting, every), "top1": bench.top1(setting)}
        save(summary)

    summary["options"], best = {}, default
    for option, values in OPTIONS.items() if options else ():
        rows = {str(each): bench.score(default._replace(**{option: each}), every) for each in values}
        summary["options"][option] = rows
        chosen = max(values, key=lambda each, rows=rows: rows[str(each)]["train"])  # type: ignore[misc]
        best = best._replace(**{option: chosen})
        save(summary)
    if options:
        summary["best"] = {"setting": best._asdict()}
        for kind in ("vision", "mean", "text"):
            summary["best"][kind] = bench.score(best._replace(kind=kind), every)
            save(summary)

    summary["untagged"] = {}
    for kind in ("text", "vision"):
        summary["untagged"][kind] = bench.score_untagged(best._replace(kind=kind), every)
        save(summary)
    return summary


def markdown(name: str, summary: dict[str, Any]) -> str:
    """The tables as a page."""
    text = f"# VPL on {name}, with the pocket model\n\n`{summary['command']}`; nothing is random. Grad-CAM with tags, "
    text += "mIoU with background at the best threshold of each split; in brackets on the unseen pictures at the "
    text += "training pictures' threshold. Zero-shot: share of the pictures whose nearest prototype is one of their "
    text += "tags. Prototypes are learnt from all training pictures.\n\n"
    text += "Masks that know nothing of the unseen pictures but their tags: "
    text += f"one everywhere {summary['trivial']['tag']:.3f}, one in a centered ellipse of the size that is best there "
    text += f"{summary['trivial']['disc']:.3f}.\n"
    rows = [
        [kind, *_cells(each), *(f"{each['top1'][split]:.3f}" for split in ("train", "eval"))]
        for kind, each in summary["kinds"].items()
    ]
    head = ["prototypes", "train", "unseen", "threshold", "zero-shot train", "zero-shot unseen"]
    part = "the training pictures"
    if summary["train, every"] > 1:
        part = f"every {summary['train, every']}th of {part}"
    text += f"\n## Kinds of prototypes\n\nTrain: {part}.\n\n" + table(head, rows)

    for option, values in summary.get("options", {}).items():
        rows = [[value, *_cells(each)] for value, each in values.items()]
        text += f"\n## {option}\n\nTrain: {part}.\n\n" + table([option, "train", "unseen", "threshold"], rows)
    if "best" in summary:
        rows = [[kind, *_cells(each)] for kind, each in summary["best"].items() if kind != "setting"]
        text += f"\n## The best of each, chosen on {part}\n\n`{json.dumps(summary['best']['setting'])}`\n\n"
        text += table(["prototypes", "train", "unseen", "threshold"], rows)

    rows = []
    for kind, each in summary.get("untagged", {}).items():
        rows.append([kind, *(f"{each[key]:.3f}" for key in ("train", "eval", "presence", "threshold"))])
    text += f"\n## Without tags\n\nThe prototypes say what is there; presence and threshold are the best on {part}.\n\n"
    text += table(["prototypes", "train", "unseen", "presence", "threshold"], rows)
    return text


def _cells(entry: dict[str, float]) -> list[str]:
    unseen = f"{entry['eval']:.3f} ({entry['eval at the threshold']:.3f})"
    return [f"{entry['train']:.3f}", unseen, f"{entry['threshold']:.2f}"]
