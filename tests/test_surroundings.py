"""What is no module works the same whatever the caller has set: default device and dtype, inference mode, autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from protoseg.functional import (
    attention_affinity,
    em,
    kmeans,
    match,
    max_normalize,
    multi_scale,
    otsu_threshold,
    pixel_adaptive_refine,
    quantile_threshold,
    refine_by_affinity,
    to_mask,
    with_background,
)
from protoseg.metrics import ConfusionMatrix, RegionContrast, ThresholdSweep, prototype_diagnostics
from protoseg.models.amn import activation_loss


def random(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)


def confusion() -> Any:
    matrix = ConfusionMatrix(2)
    mask = (random(4, 4) * 3).long()
    matrix.update(mask, mask.T.contiguous())
    return matrix.merge(matrix).result()


def sweep() -> Any:
    counts = ThresholdSweep(2, bins=10)
    counts.update(random(2, 4, 4), torch.tensor([1, 1], device="cpu"), (random(4, 4) * 3).long())
    result = counts.merge(counts).result()
    return [*result, result.best.miou, otsu_threshold(counts.score_histogram), counts.score_histogram]


def contrast() -> Any:
    counts = RegionContrast(2, bins=10)
    counts.update(random(5, 4, 4), random(2, 4, 4), torch.tensor([1, 0], device="cpu"))
    return [*counts.result()]


def thresholds() -> Any:
    histogram = torch.tensor([5, 1, 0, 3], device="cpu")
    return [otsu_threshold(histogram), quantile_threshold(histogram, 0.3)]


def maps() -> Any:
    cam = max_normalize(random(2, 3, 4, 4) - 0.3)
    labels = torch.ones(2, 3, device="cpu")
    whole = multi_scale(lambda x: (x * 2,), random(1, 3, 8, 8), scales=(1, 0.5), multiple=2)
    return [cam, with_background(cam), to_mask(cam, labels, 0.5), *whole]


def refinement() -> Any:
    affinity = attention_affinity(random(1, 16, 16))
    return [
        refine_by_affinity(random(1, 2, 4, 4), affinity),
        pixel_adaptive_refine(random(1, 2, 8, 8), random(1, 3, 8, 8)),
    ]


def clustering() -> Any:
    fitted = em(random(2, 9, 4), random(3, 4))
    return [*kmeans(random(2, 9, 4), num_clusters=2), *fitted, match(random(2, 3, 3)), match(random(2, 3, 3), "greedy")]


def others() -> Any:
    masks = torch.tensor([[[0, 1], [1, 255]]], device="cpu")
    return [*prototype_diagnostics(random(4, 6), random(9, 4)), activation_loss(random(1, 3, 2, 2), masks)]


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device("cpu")
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "default device": default_device,
    "default dtype": default_dtype,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize(
    "work",
    [confusion, sweep, contrast, thresholds, maps, refinement, clustering, others],
    ids=lambda work: work.__name__,
)
def test_results_do_not_depend_on_the_surroundings(work: Callable[[], Any], surrounding: str) -> None:
    want = list(work())
    with SURROUNDINGS[surrounding]():
        got = list(work())
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def test_counts_that_began_in_inference_mode_go_on_outside() -> None:
    with torch.inference_mode():
        matrix, counts, parted = ConfusionMatrix(2), ThresholdSweep(2), RegionContrast(2)
    mask, labels = torch.tensor([[0, 1], [2, 255]]), torch.tensor([1, 1])
    matrix.update(mask.clamp_max(2), mask)
    counts.update(random(2, 2, 2), labels, mask)
    parted.update(random(3, 2, 2), random(2, 2, 2), labels)
    assert matrix.matrix.sum() == 3


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_clip_does_not_depend_on_the_surroundings(surrounding: str) -> None:
    open_clip = pytest.importorskip("open_clip", reason="the extra clip is not installed")
    from protoseg.clip import FrozenCLIP, segment

    torch.manual_seed(0)
    sizes = {"width": 64, "layers": 2}
    model = open_clip.CLIP(32, {"image_size": 32, "patch_size": 8, **sizes}, {"heads": 2, **sizes})
    image = (random(3, 40, 48) * 255).to(torch.uint8)

    def work() -> list[Tensor]:
        clip = FrozenCLIP(model, open_clip.get_tokenizer("ViT-B-16"))
        classes, background = clip.text_prototypes(["cat", "dog"]), clip.text_prototypes(["sky"])
        maps = clip.grad_cam(clip.prepare(image), classes, background)
        return [classes, maps, segment(clip, image, classes, background, attentions=2).maps]

    want = work()
    with SURROUNDINGS[surrounding]():
        got = work()
    tolerance = 0.05 if surrounding == "autocast" else 1e-6
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=0, atol=tolerance)
