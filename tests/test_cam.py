"""The CAM toolkit against plain loops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.functional import multi_scale, otsu_threshold, quantile_threshold, to_mask, with_background
from protoseg.metrics import ConfusionMatrix, ThresholdSweep


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# with_background


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_background_is_the_loop_s(power: float, leading: tuple[int, ...]) -> None:
    cam = torch.rand(*leading, 4, 3, 5, dtype=torch.float64)
    out = with_background(cam, power)
    assert out.shape == (*leading, 5, 3, 5)
    assert torch.equal(out[..., 1:, :, :], cam)
    for index in itertools.product(*map(range, leading), range(3), range(5)):
        *images, y, x = index
        scores = [float(cam[(*images, c, y, x)]) for c in range(4)]
        assert float(out[(*images, 0, y, x)]) == pytest.approx((1 - max(scores)) ** power, abs=1e-12)


def test_background_keeps_the_gradient_and_where_nothing_scores_it_is_sure() -> None:
    cam = torch.zeros(2, 1, 2, requires_grad=True)
    out = with_background(cam)
    assert out[0].tolist() == [[1.0, 1.0]]
    out[0].sum().backward()
    assert cam.grad is not None
    assert cam.grad.sum(0).tolist() == [[-1.0, -1.0]]


@pytest.mark.parametrize("power", [0.0, -1.0])
def test_background_needs_a_positive_power(power: float) -> None:
    with pytest.raises(ValueError, match=rf"with_background: power must be above 0, got {power}"):
        with_background(torch.rand(1, 2, 2), power)


# multi_scale


class Recorder:
    """A model of two maps, one of them at half the size, that knows left from right; and what it was given."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(images)
        ramp = torch.linspace(0, 1, images.shape[-1], dtype=images.dtype)
        return images.mean(1, keepdim=True) * ramp, F.avg_pool2d(images * ramp, 2)


def test_one_scale_without_mirror_is_the_model() -> None:
    images, model = torch.rand(2, 3, 16, 24), Recorder()
    maps = multi_scale(model, images, flip=False)
    (seen,) = model.seen
    assert seen is images
    for got, want in zip(maps, Recorder()(images), strict=True):
        assert torch.equal(got, want)


def test_a_mirrored_map_is_mirrored_back() -> None:
    images, model = torch.rand(1, 3, 8, 16), Recorder()
    full, half = multi_scale(model, images)
    straight, mirrored = Recorder()(images), Recorder()(images.flip(-1))
    assert [each.shape for each in model.seen] == [images.shape] * 2
    torch.testing.assert_close(full, (straight[0] + mirrored[0].flip(-1)) / 2)
    torch.testing.assert_close(half, (straight[1] + mirrored[1].flip(-1)) / 2)
    # By hand: with weights x / 15 and (15 - x) / 15 at column x the two views add up to the picture.
    torch.testing.assert_close(full, images.mean(1, keepdim=True) / 2)


def test_scales_are_averaged_on_the_grid_of_the_first() -> None:
    images, model = torch.rand(1, 3, 16, 24), Recorder()
    full, half = multi_scale(model, images, scales=(1.0, 2.0, 0.5))
    assert [tuple(each.shape[-2:]) for each in model.seen] == [(16, 24)] * 2 + [(32, 48)] * 2 + [(8, 16)] * 2
    total: list[Tensor] = [torch.zeros(1, 1, 16, 24), torch.zeros(1, 3, 8, 12)]
    for size in ((16, 24), (32, 48), (8, 16)):  # 0.5 * 24 = 12 is no multiple of 8: rounded to 16
        scaled = images
        if size != (16, 24):
            scaled = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        for each in (Recorder()(scaled), [m.flip(-1) for m in Recorder()(scaled.flip(-1))]):
            for sums, found in zip(total, each, strict=True):
                if found.shape[-2:] != sums.shape[-2:]:
                    found = F.interpolate(found, sums.shape[-2:], mode="bilinear", align_corners=False)
                sums += found
    torch.testing.assert_close(full, total[0] / 6)
    torch.testing.assert_close(half, total[1] / 6)


def test_raw_scores_are_averaged_before_clipping() -> None:
    sign = iter((1.0, -3.0))
    (mean,) = multi_scale(lambda images: (images[:, :1] * next(sign),), torch.ones(1, 3, 8, 8))
    assert mean.unique().tolist() == [-1.0]


@pytest.mark.parametrize(
    ("side", "scale", "multiple", "seen"),
    [(16, 0.1, 8, 8), (16, 0.7, 8, 8), (16, 0.8, 8, 16), (16, 1.6, 1, 26), (30, 1.0, 32, 32), (1, 1.0, 8, 8)],
)
def test_sides_are_multiples_and_never_0(side: int, scale: float, multiple: int, seen: int) -> None:
    model = Recorder()
    multi_scale(lambda x: model(x)[:1], torch.rand(1, 3, side, side), scales=[scale], flip=False, multiple=multiple)
    assert model.seen[0].shape == (1, 3, seen, seen)


def test_multi_scale_leaves_the_picture_and_the_model_s_output_alone() -> None:
    images = torch.rand(1, 3, 8, 8)
    before, output = images.clone(), torch.ones(1, 2, 8, 8)
    multi_scale(lambda _: (output,), images, scales=(1, 2))
    assert torch.equal(images, before)
    assert torch.equal(output, torch.ones(1, 2, 8, 8))


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1.0,)])
def test_scales_must_be_above_0(scales: Sequence[float]) -> None:
    with pytest.raises(ValueError, match=r"multi_scale: scales must be one or more numbers above 0, got \("):
        multi_scale(lambda x: (x,), torch.rand(1, 3, 8, 8), scales=scales)


def test_multi_scale_wants_a_batch() -> None:
    with pytest.raises(ValueError, match=r"multi_scale: images must have shape \(B, C, H, W\), got \(3, 8, 8\)"):
        multi_scale(lambda x: (x,), torch.rand(3, 8, 8))


# to_mask


def mask_by_loop(cam: Tensor, labels: Tensor, threshold: float) -> list[list[int]]:
    """One picture; the class of the highest score among those present, the lower one of equals."""
    rows = []
    for y in range(cam.shape[1]):
        row = []
        for x in range(cam.shape[2]):
            best, winner = -1.0, 0
            for c in range(cam.shape[0]):
                if labels[c] and float(cam[c, y, x]) > best:
                    best, winner = float(cam[c, y, x]), c + 1
            row.append(winner if best >= float(torch.tensor(threshold)) else 0)
        rows.append(row)
    return rows


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_mask_is_the_loop_s(threshold: float, dtype: torch.dtype) -> None:
    cam = (torch.rand(6, 4, 5, 7) * 8).round() / 8  # ties, and scores that equal a threshold
    labels = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]]).to(
        dtype
    )
    out = to_mask(cam, labels, threshold)
    assert out.dtype == torch.int64
    assert out.tolist() == [mask_by_loop(*each, threshold) for each in zip(cam, labels, strict=True)]
    assert torch.equal(to_mask(cam.view(2, 3, 4, 5, 7), labels.view(2, 3, 4), threshold), out.view(2, 3, 5, 7))
    assert torch.equal(to_mask(cam[2], labels[2], threshold), out[2])


def test_a_picture_without_a_class_is_background_even_at_0() -> None:
    assert to_mask(torch.ones(2, 1, 1), torch.zeros(2), 0.0).tolist() == [[0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_sweep_scores_these_masks_at_every_threshold(dtype: torch.dtype) -> None:
    """Also maps of other types, whose own rounding of a threshold would move pixels across it."""
    classes, bins = 3, 20
    sweep = ThresholdSweep(classes, bins=bins)
    grid = torch.arange(bins + 1, dtype=torch.float64) / bins
    pictures = []
    for labels in ([1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]):
        # On the thresholds themselves, beside them, and rounding errors outside 0..1.
        cam = grid[torch.randint(bins + 1, (classes, 9, 11))] + 1e-5 * torch.randint(-1, 2, (classes, 9, 11))
        mask = torch.randint(0, classes + 1, (9, 11))
        mask[torch.rand(9, 11) < 0.1] = 255
        pictures.append((cam.to(dtype), torch.tensor(labels), mask))
        sweep.update(*pictures[-1])
    result = sweep.result()
    for index, threshold in enumerate(grid.tolist()):
        confusion = ConfusionMatrix(classes)
        for cam, labels, mask in pictures:
            confusion.update(to_mask(cam.clamp_max(1), labels, threshold), mask)
        miou, per_class = confusion.result()
        torch.testing.assert_close(result.per_class[index], per_class, equal_nan=True, rtol=0, atol=0)
        assert float(result.miou[index]) == miou


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_the_mask_s_threshold_lies_in_0_1(threshold: float) -> None:
    with pytest.raises(ValueError, match=rf"to_mask: threshold must lie between 0 and 1, got {threshold}"):
        to_mask(torch.rand(1, 2, 2), torch.ones(1), threshold)


@pytest.mark.parametrize(("cam", "labels"), [((3, 2, 2), (2,)), ((1, 2, 2, 2), (2,)), ((2, 2), (2,))])
def test_the_mask_wants_foreground_only(cam: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"to_mask: cam .* must agree, got \(.*\) and \(2,\); leave the background"):
        to_mask(torch.rand(cam), torch.ones(labels), 0.5)


# thresholds without masks


def between_class_variance(counts: list[float], cut: int) -> float:
    """Otsu's criterion for scores below and from bin ``cut`` up, pixel by pixel."""
    scores = [index / (len(counts) - 1) for index, count in enumerate(counts) for _ in range(int(count))]
    low = [score for score in scores if score < cut / (len(counts) - 1)]
    high = [score for score in scores if score >= cut / (len(counts) - 1)]
    if not low or not high:
        return 0.0
    means = sum(low) / len(low), sum(high) / len(high)
    return len(low) * len(high) * (means[0] - means[1]) ** 2 / len(scores) ** 2


@pytest.mark.parametrize("bins", [1, 2, 7, 20])
@pytest.mark.parametrize("trial", range(6))
def test_otsu_is_the_best_of_all_cuts(bins: int, trial: int) -> None:
    torch.manual_seed(trial)
    histogram = torch.randint(0, 9, (bins + 1,)) * (torch.rand(bins + 1) < 0.7)
    histogram[0] += 1
    histogram[-1] += 1
    found = otsu_threshold(histogram)
    values = [between_class_variance(histogram.tolist(), cut) for cut in range(1, bins + 1)]
    cut = round(found * bins)
    assert found == cut / bins
    assert values[cut - 1] == pytest.approx(max(values), rel=1e-9)


def test_otsu_takes_the_middle_of_a_gap() -> None:
    histogram = torch.zeros(11)
    histogram[1], histogram[8] = 30, 10
    assert otsu_threshold(histogram) == 0.5  # 0.2, ..., 0.8 cut the same way


@pytest.mark.parametrize("histogram", [torch.zeros(5), torch.zeros(5, dtype=torch.int64)])
def test_otsu_of_nothing_is_one_half(histogram: Tensor) -> None:
    assert otsu_threshold(histogram) == 0.5


def test_otsu_of_one_score_is_a_threshold_all_the_same() -> None:
    assert 0 <= otsu_threshold(torch.tensor([0, 0, 7, 0, 0])) <= 1


def test_otsu_separates_two_populations_of_a_sweep() -> None:
    sweep = ThresholdSweep(1)
    scores = torch.cat([torch.rand(500) * 0.3, 0.7 + torch.rand(200) * 0.3])
    sweep.update(scores.view(1, 1, -1), torch.ones(1))
    assert 0.3 <= otsu_threshold(sweep.score_histogram) <= 0.7


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("trial", range(4))
def test_quantile_is_the_nearest_of_all_thresholds(share: float, trial: int) -> None:
    torch.manual_seed(trial)
    histogram = torch.randint(0, 20, (13,))
    histogram[3] += 1
    found = quantile_threshold(histogram, share)
    counts = histogram.tolist()
    misses = [abs(sum(counts[index:]) / sum(counts) - share) for index in range(13)]
    assert found == round(found * 12) / 12
    assert misses[round(found * 12)] == pytest.approx(min(misses), abs=1e-12)


def test_quantile_of_a_sweep_gives_that_share() -> None:
    sweep = ThresholdSweep(2, bins=100)
    cam = torch.rand(2, 40, 40)
    sweep.update(cam, torch.ones(2))
    mask = to_mask(cam, torch.ones(2), quantile_threshold(sweep.score_histogram, 0.3))
    assert float((mask > 0).float().mean()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("foreground", [-0.01, 1.01])
def test_quantile_s_share_lies_in_0_1(foreground: float) -> None:
    with pytest.raises(ValueError, match=rf"quantile_threshold: foreground must lie .* got {foreground}"):
        quantile_threshold(torch.ones(3), foreground)


def test_quantile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="quantile_threshold: histogram must hold at least one pixel"):
        quantile_threshold(torch.zeros(3), 0.5)


def test_histograms_are_checked() -> None:
    with pytest.raises(ValueError, match=r"otsu_threshold: histogram must have shape \(bins \+ 1\), got \(2, 3\)"):
        otsu_threshold(torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"quantile_threshold: histogram must be a torch.Tensor, got list"):
        quantile_threshold([1, 2, 3], 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"two or more counts of at least 0, got \[3.0\]"):
        otsu_threshold(torch.tensor([3.0]))
    with pytest.raises(ValueError, match=r"two or more counts of at least 0, got \[3.0, -1.0\]"):
        quantile_threshold(torch.tensor([3.0, -1.0]), 0.5)


def test_multi_scale_refuses_what_is_no_map() -> None:
    """Mirrored logits would be other classes, and a plain tensor would be taken for a sequence of pictures."""
    images = torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"must return maps of shape \(2, \?, h, w\), got \(2, 3\); leave logits"):
        multi_scale(lambda x: (x, x.mean((-2, -1))), images)
    with pytest.raises(TypeError, match=r"a sequence of maps, got one tensor \(2, 3, 16, 16\); put it in a"):
        multi_scale(lambda x: x, images)  # type: ignore[arg-type, return-value]


def test_each_class_may_have_a_threshold_of_its_own() -> None:
    cam = torch.rand(5, 3, 6, 7)
    labels = (torch.rand(5, 3) < 0.7).long()
    thresholds = torch.tensor([0.2, 0.5, 0.8])
    out = to_mask(cam, labels, thresholds)
    for b, y, x in itertools.product(range(5), range(6), range(7)):
        above = {c + 1: float(cam[b, c, y, x] - thresholds[c]) for c in range(3) if labels[b, c]}
        best = max(above, key=lambda c: above[c], default=0)
        assert int(out[b, y, x]) == (best if best and above[best] >= 0 else 0)
    assert torch.equal(to_mask(cam, labels, torch.full((3,), 0.5)), to_mask(cam, labels, 0.5))


@pytest.mark.parametrize(
    ("cam", "labels", "threshold", "message"),
    [
        (torch.rand(3, 2, 2), torch.tensor([2, 0, 1]), 0.5, "labels must hold only 0 and 1"),
        (torch.full((3, 2, 2), torch.nan), torch.ones(3), 0.5, "cam must lie between 0 and 1 without NaN"),
        (3 * torch.ones(3, 2, 2), torch.ones(3), 0.5, "cam must lie between 0 and 1 .* normalize maps"),
        (torch.rand(3, 2, 2), torch.ones(3), torch.rand(2), r"threshold must have shape \(3\), got \(2,\)"),
        (torch.rand(3, 2, 2), torch.ones(3), torch.tensor([0.1, 1.5, 0]), "threshold must lie between 0 and 1"),
    ],
)
def test_to_mask_refuses_indices_raw_scores_and_nan(cam: Any, labels: Any, threshold: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"to_mask: {message}"):
        to_mask(cam, labels, threshold)
    if not torch.isfinite(cam).all():  # what is absent is not looked at
        assert not to_mask(cam, torch.zeros(3), threshold).any()


def test_background_needs_a_class_axis() -> None:
    with pytest.raises(ValueError, match=r"with_background: cam must have shape \(\.\.\., C, H, W\), got \(4, 5\)"):
        with_background(torch.rand(4, 5))
