"""How the recipe ``pgseg`` scores: zero-shot masks, and what the groups are like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from protoseg.data import Sample
from protoseg.metrics import ConfusionMatrix, ThresholdSweep, prototype_diagnostics
from protoseg.models.pgseg.grouping import StageOutput
from protoseg.models.pgseg.network import PGSeg
from protoseg.models.pgseg.zeroshot import Score, class_embeddings, group_maps, normalized, segment
from protoseg.recipes.pictures import Pictures
from protoseg.recipes.session import share
from protoseg.report import Picture


class Setting(NamedTuple):
    """How pictures are segmented: names in the order of the classes, names of background, and the score."""

    names: Sequence[str]
    background: Sequence[str]
    score: Score

    def read_by(self, model: PGSeg) -> dict[str, Any]:
        """Read the names, once for all pictures: arguments of :func:`segment`."""
        found = {"class_names": class_embeddings(model, self.names), "score": self.score}
        if self.background:
            found["background_names"] = class_embeddings(model, self.background)
        return found


def zero_shot(
    model: PGSeg, tune: Pictures, test: Pictures, setting: Setting, accelerator: Accelerator
) -> tuple[dict[str, Any], tuple[list[float], list[float]]]:
    """Score the masks of the test pictures with the threshold that is best on the tuning pictures."""
    found = sweep(model, tune, setting, accelerator).result()
    known = not math.isnan(float(found.miou.max()))
    scored = sweep(model, test, setting, accelerator).result()
    point = scored.at(found.best.threshold) if known else scored.best
    entry = {
        "miou": point.miou,
        "threshold": point.threshold,
        "threshold_from": "other pictures" if known else "the same pictures",
        "per_class": dict(zip(("background", *test.classes), point.per_class.tolist(), strict=True)),
    }
    return entry, (scored.thresholds.tolist(), scored.miou.tolist())


@torch.no_grad()
def sweep(model: PGSeg, pictures: Pictures, setting: Setting, accelerator: Accelerator) -> ThresholdSweep:
    """Count the masks of every threshold; no tag is used."""
    model.eval()
    counted, every = ThresholdSweep(len(pictures.classes)), torch.ones(len(pictures.classes))
    names = setting.read_by(model)
    for index in share(len(pictures), "zero-shot", accelerator):
        sample = pictures[index]
        found = segment(model, sample.image, background_threshold=0.0, **names)
        counted.update((found.scores * (found.mask > 0)).cpu(), every, sample.mask)
    return counted.all_reduce()


@torch.no_grad()
def groups(model: PGSeg, pictures: Pictures, accelerator: Accelerator) -> dict[str, float]:
    """What the last groups are like, as means over pictures.

    ``oracle`` is the mIoU of masks in which every group has its true majority class; ``used`` the groups that own a
    pixel; ``redundancy`` the mean cosine of two used groups; ``compactness`` the mean cosine of the tokens of a used
    group with their mean, on the tokens that came into the first stage.
    """
    model.eval()
    confusion = ConfusionMatrix(len(pictures.classes))
    rows: list[dict[str, float]] = []
    for index in share(len(pictures), "groups", accelerator):
        sample = pictures[index]
        side = model.config.test_side
        pixels = normalized(sample.image.to(accelerator.device), (side, side))
        _, encoded = model.encode_image(pixels)
        if sample.mask is not None:
            owner = group_maps(encoded, sample.mask.shape)[0].argmax(0).cpu()
            confusion.update(_majority(owner, sample), sample.mask)

        owner = group_maps(encoded)[0].argmax(0).flatten()
        used: list[int] = owner.unique().tolist()  # type: ignore[no-untyped-call]
        vectors = F.normalize(model.image_projector(encoded.groups)[0, used].float(), dim=-1)
        tokens = F.normalize(encoded.stages[0].sources[0].float(), dim=-1)
        compact = [float((tokens[owner == g] @ F.normalize(tokens[owner == g].mean(0), dim=0)).mean()) for g in used]
        pairs = len(used) * (len(used) - 1)
        cosine = (float((vectors @ vectors.T).sum()) - len(used)) / pairs if pairs else math.nan
        rows.append({"used": float(len(used)), "redundancy": cosine, "compactness": sum(compact) / len(compact)})

    rows = gather_object(rows)
    result = {key: _mean([row[key] for row in rows]) for key in ("used", "redundancy", "compactness")}
    return {"oracle": confusion.all_reduce().result().miou, **result}


def _majority(owner: Tensor, sample: Sample) -> Tensor:
    """Give each group the class that most of its pixels truly have."""
    assert sample.mask is not None
    mask = torch.zeros_like(sample.mask)
    for group in owner.unique().tolist():  # type: ignore[no-untyped-call]
        true = sample.mask[(owner == group) & (sample.mask != 255)]
        if len(true):
            mask[owner == group] = true.long().bincount().argmax().to(mask.dtype)
    return mask


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def panels(model: PGSeg, pictures: Pictures, setting: Setting, threshold: float, most: int = 100) -> list[Picture]:
    """Draw the masks and groups of the first pictures, for the report."""
    found = []
    names = setting.read_by(model)
    for index in range(min(most, len(pictures))):
        sample = pictures[index]
        mask = segment(model, sample.image, background_threshold=threshold, **names).mask.cpu()
        side = model.config.test_side
        with torch.no_grad():
            _, encoded = model.encode_image(normalized(sample.image.to(mask.device), (side, side)))
        group = group_maps(encoded, sample.image.shape[-2:])[0].argmax(0).cpu()
        score = None
        if sample.mask is not None:
            confusion = ConfusionMatrix(len(pictures.classes))
            confusion.update(mask, sample.mask)
            score = confusion.result().miou
        tags = [name for name, there in zip(pictures.classes, sample.labels.tolist(), strict=True) if there]
        shown = {"mask": mask, "groups": (group + 1).to(torch.uint8)}
        found.append(Picture(sample.id, sample.image, sample.mask, shown, score, tags))
    return found


def diagnose(stages: Sequence[StageOutput], words: Any) -> Mapping[str, float]:
    """Numbers of one training step: acceptance, how alike the prototypes are, how many are in use."""
    found: dict[str, float] = {}
    regularized = [(f"image {place + 1}", stage.regularized) for place, stage in enumerate(stages)]
    for name, out in (*regularized, ("text", words)):
        if out is None:
            continue
        health = prototype_diagnostics(out.prototypes.float(), out.responsibilities.float())
        found[f"{name} accepted"] = float(out.accept_rate)
        found[f"{name} prototype cosine"] = float(out.prototype_cosine)
        found[f"{name} prototypes in use"] = _mean(health.effective.tolist())
    return found
