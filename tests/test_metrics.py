import math
import pickle
from typing import Any

import pytest
import torch
from scipy.stats import f_oneway
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import Tensor

from protoseg.metrics import ConfusionMatrix, RegionContrast, SweepResult, ThresholdSweep, prototype_diagnostics

C = 4


def picture(seed: int, size: tuple[int, int] = (13, 17), bins: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of which half sit exactly on a threshold, tags with at least one class, a mask with void."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.rand(C, *size, generator=generator)
    edges = torch.randint(0, bins + 1, (C, *size), generator=generator) / bins
    maps = torch.where(torch.rand(C, *size, generator=generator) < 0.5, edges, random)
    labels = (torch.rand(C, generator=generator) < 0.5).long()
    labels[seed % C] = 1
    mask = torch.randint(0, C + 1, size, generator=generator)
    mask[torch.rand(size, generator=generator) < 0.2] = 255
    return maps, labels, mask


def threshold_alone(maps: Tensor, labels: Tensor, threshold: Tensor) -> Tensor:
    """The prediction rule, pixel by pixel."""
    prediction = torch.zeros(maps.shape[1:], dtype=torch.long)
    for y in range(maps.shape[1]):
        for x in range(maps.shape[2]):
            best, winner = -1.0, -1
            for c in range(len(labels)):
                if labels[c] and maps[c, y, x] > best:
                    best, winner = maps[c, y, x].item(), c
            if winner >= 0 and maps[winner, y, x] >= threshold:
                prediction[y, x] = winner + 1
    return prediction


class TestConfusionMatrix:
    def test_hand_case(self) -> None:
        confusion = ConfusionMatrix(2)
        confusion.update(torch.tensor([[0, 1, 2], [2, 2, 0]]), torch.tensor([[0, 1, 1], [2, 255, 255]]))
        assert confusion.matrix.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
        assert confusion.matrix.dtype == torch.int64
        result = confusion.result()
        assert result.per_class.tolist() == [1.0, 0.5, 0.5]
        assert result.miou == pytest.approx(2 / 3)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_equals_sklearn(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        prediction = torch.randint(0, C + 1, (3, 9, 7), generator=generator)
        mask = torch.randint(0, C + 1, (3, 9, 7), generator=generator)
        mask[torch.rand(mask.shape, generator=generator) < 0.3] = 255
        confusion = ConfusionMatrix(C)
        confusion.update(prediction.to(dtype), mask.to(dtype))
        truth, predicted = mask[mask != 255].numpy(), prediction[mask != 255].numpy()
        assert (confusion.matrix.numpy() == confusion_matrix(truth, predicted, labels=range(C + 1))).all()
        expected = jaccard_score(truth, predicted, labels=range(C + 1), average=None)
        torch.testing.assert_close(confusion.result().per_class, torch.from_numpy(expected))
        assert confusion.result().miou == pytest.approx(expected.mean())

    def test_pictures_one_by_one_equal_a_batch(self) -> None:
        generator = torch.Generator().manual_seed(1)
        prediction, mask = torch.randint(0, C + 1, (2, 3, 5, 6), generator=generator)
        batch, single, half = ConfusionMatrix(C), ConfusionMatrix(C), ConfusionMatrix(C)
        batch.update(prediction, mask)
        single.update(prediction[0], mask[0])
        for p, m in zip(prediction[1:], mask[1:], strict=True):
            half.update(p, m)
        assert single.merge(half) is single
        assert torch.equal(single.matrix, batch.matrix)
        assert single.all_reduce() is single
        assert torch.equal(single.matrix, batch.matrix), "identity outside a group"
        assert torch.equal(pickle.loads(pickle.dumps(batch)).matrix, batch.matrix)

    def test_class_neither_true_nor_predicted_is_left_out(self) -> None:
        confusion = ConfusionMatrix(3)
        confusion.update(torch.tensor([[0, 1, 3]]), torch.tensor([[0, 1, 1]]))
        result = confusion.result()
        assert result.per_class[[0, 1, 3]].tolist() == [1.0, 0.5, 0.0], "predicted and never true: zero"
        assert math.isnan(result.per_class[2])
        assert result.miou == pytest.approx(0.5)

    def test_all_void_and_nothing(self) -> None:
        confusion = ConfusionMatrix(2)
        confusion.update(torch.ones(2, 2, dtype=torch.long), torch.full((2, 2), 255))
        confusion.update(torch.ones(0, 2, dtype=torch.long), torch.ones(0, 2, dtype=torch.long))
        assert confusion.matrix.sum() == 0
        assert math.isnan(confusion.result().miou)
        assert confusion.result().per_class.isnan().all()

    def test_errors(self) -> None:
        good = torch.zeros(2, 2, dtype=torch.long)
        confusion = ConfusionMatrix(3)
        for classes in (0, 255, 2.0):
            with pytest.raises(ValueError, match=f"num_classes, without background.*got {classes}"):
                ConfusionMatrix(classes)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"prediction must be an integer tensor, got torch.float32; call"):
            confusion.update(good.float(), good)
        with pytest.raises(TypeError, match="mask must be an integer tensor, got list"):
            confusion.update(good, [[0, 0], [0, 0]])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"prediction must have shape \(B, H, W\), got \(1, 1, 2, 2\)"):
            confusion.update(good[None, None], good)
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 2\), got \(2, 1\); resize"):
            confusion.update(good, good[:, :1])
        with pytest.raises(ValueError, match=r"mask must hold 0 .* to 3, or 255 .*got \[4\]"):
            confusion.update(good, good + 4)
        with pytest.raises(ValueError, match=r"mask must hold .*got \[-1\]"):
            confusion.update(good, good - 1)
        with pytest.raises(ValueError, match=r"prediction must hold 0 .* to 3, got 255 to 255; void"):
            confusion.update(good + 255, good)
        with pytest.raises(ValueError, match="merge: other must have num_classes=3, got 2"):
            confusion.merge(ConfusionMatrix(2))
        assert confusion.matrix.sum() == 0, "a rejected picture is not counted"


class TestThresholdSweep:
    def test_maps_of_absent_classes_may_be_left_out(self) -> None:
        whole, part = ThresholdSweep(C), ThresholdSweep(C)
        for seed in range(8):
            maps, labels, mask = picture(seed)
            labels = labels if seed else torch.zeros_like(labels)
            for truth in (mask, None):
                whole.update(maps, labels, truth)
                part.update(maps[labels.nonzero().flatten()], labels, truth)
        assert all(torch.equal(a, b) for a, b in zip(whole._counts(), part._counts(), strict=True))

    def test_equals_each_threshold_alone(self) -> None:
        sweep = ThresholdSweep(C, bins=20)
        pictures = [picture(seed) for seed in range(3)]
        for maps, labels, mask in pictures:
            sweep.update(maps, labels, mask)
        result = sweep.result()
        assert result.thresholds.shape == (21,)
        for i, threshold in enumerate(result.thresholds):
            alone = ConfusionMatrix(C)
            for maps, labels, mask in pictures:
                alone.update(threshold_alone(maps, labels, threshold), mask)
            miou, per_class = alone.result()
            assert torch.equal(result.per_class[i].nan_to_num(-1), per_class.nan_to_num(-1)), threshold
            assert result.miou[i].item() == miou

    @pytest.mark.parametrize("bins", [1, 7, 10, 200, 1000])
    def test_every_threshold_counts_as_foreground_at_itself(self, bins: int) -> None:
        sweep = ThresholdSweep(1, bins=bins)
        below = torch.nextafter(sweep.thresholds, torch.tensor(-1.0))[1:]
        for scores in (sweep.thresholds, below):
            sweep.score_histogram.zero_()
            sweep.update(scores.view(1, 1, -1), torch.tensor([1]))
            reached = sweep.score_histogram.flip(0).cumsum(0).flip(0)
            expected = [(scores >= threshold).sum().item() for threshold in sweep.thresholds]
            assert reached.tolist() == expected

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions_are_compared_in_float32(self, dtype: torch.dtype) -> None:
        maps, labels, mask = picture(5)
        one, two = ThresholdSweep(C), ThresholdSweep(C)
        one.update(maps.to(dtype), labels, mask)
        two.update(maps.to(dtype).float(), labels.float(), mask.to(torch.uint8))
        assert torch.equal(one.result().miou, two.result().miou)

    def test_absent_classes_are_never_looked_at(self) -> None:
        maps = torch.tensor([[[0.6, 0.1]], [[math.nan, 7.0]]])
        sweep = ThresholdSweep(2, bins=10)
        sweep.update(maps, torch.tensor([True, False]), torch.tensor([[1, 0]]))
        result = sweep.result()
        assert result.per_class[:, 2].isnan().all()
        assert result.best.threshold == 0.2
        assert result.best.miou == 1.0

    def test_class_is_nan_only_where_neither_true_nor_predicted(self) -> None:
        sweep = ThresholdSweep(1, bins=2)
        sweep.update(torch.tensor([[[0.6, 0.6]]]), torch.tensor([1]), torch.tensor([[0, 0]]))
        assert sweep.result().per_class.nan_to_num(-1).tolist() == [[0, 0], [0, 0], [1, -1]]
        assert sweep.result().miou.tolist() == [0, 0, 1]

    def test_no_class_is_all_background(self) -> None:
        sweep = ThresholdSweep(2, bins=4)
        sweep.update(torch.ones(2, 1, 3), torch.zeros(2), torch.tensor([[0, 1, 255]]))
        assert sweep.result().per_class.nan_to_num(-1).tolist() == [[0.5, 0.0, -1.0]] * 5
        assert sweep.score_histogram.sum() == 0

    def test_histogram_needs_no_mask(self) -> None:
        maps, labels, mask = picture(3)
        blind, seeing, void = (ThresholdSweep(C, bins=20) for _ in range(3))
        blind.update(maps, labels)
        seeing.update(maps, labels, mask)
        void.update(maps, labels, torch.full_like(mask, 255))
        assert blind.score_histogram.sum() == mask.numel()
        assert torch.equal(blind.score_histogram, seeing.score_histogram)
        assert torch.equal(blind.score_histogram, void.score_histogram)
        for sweep in (blind, void):
            assert sweep.result().miou.isnan().all()
            assert math.isnan(sweep.result().best.miou)

    def test_at_and_best(self) -> None:
        miou = torch.tensor([0.1, 0.4, 0.4, 0.2, 0.0], dtype=torch.float64)
        result = SweepResult(torch.linspace(0, 1, 5), miou, torch.rand(5, 3))
        assert result.best[:2] == (0.4, 0.25), "the lowest of equals"
        assert result.at(0.7)[:2] == (0.2, 0.75)
        assert torch.equal(result.at(1).per_class, result.per_class[4])
        with pytest.raises(ValueError, match=r"threshold must lie between 0 and 1, got 1\.5"):
            result.at(1.5)

    def test_merge_and_order(self) -> None:
        whole, left, right = (ThresholdSweep(C) for _ in range(3))
        for seed in range(4):
            whole.update(*picture(seed))
            (left, right)[seed % 2].update(*picture(seed))
        merged = right.merge(left).all_reduce()
        assert merged is right
        assert torch.equal(merged.result().per_class.nan_to_num(-1), whole.result().per_class.nan_to_num(-1))
        assert torch.equal(merged.score_histogram, whole.score_histogram)

    def test_rounding_is_forgiven(self) -> None:
        sweep = ThresholdSweep(1, bins=4)
        sweep.update(torch.tensor([[[-1e-5, 1 + 1e-5]]]), torch.tensor([1]))
        assert sweep.score_histogram.tolist() == [1, 0, 0, 0, 1]

    def test_errors(self) -> None:
        maps, labels, mask = picture(0)
        sweep = ThresholdSweep(C, bins=20)
        with pytest.raises(ValueError, match="bins must be an integer of at least 1, got 0"):
            ThresholdSweep(C, bins=0)
        with pytest.raises(ValueError, match="ThresholdSweep: num_classes"):
            ThresholdSweep(0)
        with pytest.raises(ValueError, match=r"maps must have shape \(4, H, W\), got \(2, 13, 17\); background"):
            sweep.update(maps[:2], labels, mask)
        with pytest.raises(TypeError, match=r"maps must be floating point, got torch\.int64"):
            sweep.update(maps.long(), labels, mask)
        with pytest.raises(ValueError, match=r"labels must have shape \(4\), got \(3,\)"):
            sweep.update(maps, labels[:3], mask)
        with pytest.raises(ValueError, match="labels must hold only 0 and 1"):
            sweep.update(maps, labels * 2, mask)
        with pytest.raises(ValueError, match=r"mask must have shape \(13, 17\), got \(12, 17\)"):
            sweep.update(maps, labels, mask[1:])
        with pytest.raises(ValueError, match=r"mask must hold 0 .*got \[9\]"):
            sweep.update(maps, labels, torch.full_like(mask, 9))
        with pytest.raises(ValueError, match=r"without NaN, got nan to nan.*normalize the maps"):
            sweep.update(maps * math.nan, labels, mask)
        with pytest.raises(ValueError, match=r"must lie between 0 and 1 .*got 1 to 2"):
            sweep.update(maps.clamp(0, 1) * 0 + torch.tensor([1.0, 2, 2, 2]).view(C, 1, 1), labels * 0 + 1, mask)
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            sweep.update(maps - 1, labels, mask)
        with pytest.raises(ValueError, match="merge: other must have num_classes=4 and bins=20, got 4 and 10"):
            sweep.merge(ThresholdSweep(C, bins=10))
        assert sweep.score_histogram.sum() == 0, "a rejected picture is not counted"
        assert sweep.result().miou.isnan().all()


def correlation_ratio(features: Tensor, regions: Tensor) -> float:
    """Fisher's, by scipy's analysis of variance: F = (between / (R - 1)) / (within / (n - R)), a mean over channels."""
    groups = [features[:, regions == r].double().numpy() for r in regions.unique()]
    if len(groups) == 1:
        return 0.0
    odds = f_oneway(*groups, axis=1).statistic * (len(groups) - 1) / (regions.numel() - len(groups))
    return float((odds / (1 + odds)).mean())


class TestRegionContrast:
    def features(self, seed: int) -> Tensor:
        return torch.randn(6, 13, 17, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, 7)[:, None, None]

    def test_equals_an_analysis_of_variance_at_each_threshold(self) -> None:
        contrast, expected = RegionContrast(C, bins=20), torch.zeros(21, dtype=torch.float64)
        for seed in range(3):
            maps, labels, _ = picture(seed)
            contrast.update(self.features(seed), maps, labels)
            for i, threshold in enumerate(contrast.thresholds):
                expected[i] += correlation_ratio(self.features(seed), threshold_alone(maps, labels, threshold)) / 3
        result = contrast.result()
        assert contrast.pictures == 3
        torch.testing.assert_close(result.contrast, expected, rtol=1e-9, atol=1e-12)
        assert result.best == (expected.max().item(), pytest.approx(expected.argmax().item() / 20))

    def test_a_map_of_the_object_has_more_than_one_of_its_part_or_of_too_much(self) -> None:
        contrasts = {}
        for width in (1, 3, 6):
            contrasts[width] = RegionContrast(1)
            features, maps = torch.zeros(2, 8, 8), torch.zeros(1, 8, 8)
            features[0, :, :3] = 1.0
            maps[0, :, :width] = 0.7
            contrasts[width].update(features, maps, torch.tensor([1]))
        best = {width: each.result().best[0] for width, each in contrasts.items()}
        assert best[3] == pytest.approx(1.0)
        assert max(best[1], best[6]) < 0.5

    def test_scale_and_offset_of_a_channel_do_not_matter_nor_do_dead_channels(self) -> None:
        maps, labels, _ = picture(1)
        plain, other = RegionContrast(C), RegionContrast(C)
        plain.update(self.features(1), maps, labels)
        other.update(torch.cat([self.features(1) * 1e3 + 5, torch.full((2, 13, 17), 7.0)]), maps, labels)
        torch.testing.assert_close(other.result().contrast, plain.result().contrast, rtol=1e-4, atol=1e-6)

    def test_maps_of_another_size_are_resized(self) -> None:
        maps, labels, _ = picture(2)
        one, two = RegionContrast(C), RegionContrast(C)
        large = torch.nn.functional.interpolate(maps[None], (26, 30), mode="bilinear", align_corners=False)[0]
        small = torch.nn.functional.interpolate(large[None], (13, 17), mode="bilinear", align_corners=False)[0]
        one.update(self.features(2), large, labels)
        two.update(self.features(2), small, labels)
        assert torch.equal(one.result().contrast, two.result().contrast)

    def test_what_says_nothing_is_not_counted(self) -> None:
        maps, labels, _ = picture(0)
        contrast = RegionContrast(C)
        contrast.update(self.features(0), maps, torch.zeros(C))
        contrast.update(torch.ones(6, 13, 17), maps, labels)
        assert contrast.pictures == 0
        assert contrast.result().contrast.isnan().all()
        assert math.isnan(contrast.result().best[0])

    def test_errors(self) -> None:
        maps, labels, _ = picture(0)
        contrast, features = RegionContrast(C), self.features(0)
        with pytest.raises(ValueError, match=r"RegionContrast: num_classes must be .* got 0"):
            RegionContrast(0)
        with pytest.raises(ValueError, match="RegionContrast: bins must be an integer of at least 1, got 0"):
            RegionContrast(C, bins=0)
        with pytest.raises(ValueError, match=r"features must have shape \(D, h, w\), got \(1, 6, 13, 17\)"):
            contrast.update(features[None], maps, labels)
        with pytest.raises(TypeError, match="features must be floating point"):
            contrast.update(features.long(), maps, labels)
        with pytest.raises(ValueError, match="features must be finite"):
            contrast.update(features * math.inf, maps, labels)
        with pytest.raises(ValueError, match=r"maps must have shape \(4, H, W\), got \(3, 13, 17\); background"):
            contrast.update(features, maps[:3], labels)
        with pytest.raises(ValueError, match=r"without NaN, got nan to nan.*normalize the maps"):
            contrast.update(features, maps * math.nan, labels)
        with pytest.raises(ValueError, match="labels must hold only 0 and 1"):
            contrast.update(features, maps, labels * 2)
        assert contrast.pictures == 0, "a rejected picture is not counted"


def _everything(seeds: range) -> list[Tensor]:
    """What all metrics found on these pictures, over all ranks."""
    sweep, confusion, contrast = ThresholdSweep(C), ConfusionMatrix(C), RegionContrast(C)
    for seed in seeds:
        maps, labels, mask = picture(seed)
        sweep.update(maps, labels, mask)
        confusion.update(maps.argmax(0), mask)
        contrast.update(maps * torch.arange(1.0, C + 1)[:, None, None], maps, labels)
    sweep.all_reduce()
    confusion.all_reduce()
    contrast.all_reduce()
    exact = [sweep.score_histogram, sweep.result().per_class, sweep.result().miou, confusion.matrix]
    return [*exact, contrast.result().contrast]


def _rank(rank: int) -> Any:
    return _everything(range(rank, 5, 2))


def test_two_processes_equal_one(two_processes: Any) -> None:
    both = two_processes(_rank)
    *expected, contrast = _everything(range(5))
    for *found, theirs in both:
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(theirs, contrast, rtol=1e-12, atol=0)


class TestPrototypeDiagnostics:
    def test_equals_loops(self) -> None:
        generator = torch.Generator().manual_seed(0)
        prototypes = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)
        assignment = torch.rand(2, 3, 11, 5, generator=generator).double()
        assignment[..., 1] = 0
        out = prototype_diagnostics(prototypes, assignment)
        for index in [(0, 0), (1, 2)]:
            p, a = prototypes[index], assignment[index]
            pairs = [torch.cosine_similarity(p[i], p[j], dim=0).item() for i in range(5) for j in range(5) if i != j]
            usage = [a[:, k].sum().item() / a.sum().item() for k in range(5)]
            entropy = -sum(u * math.log(u) for u in usage if u > 0)
            assert out.cosine[index].item() == pytest.approx(sum(pairs) / 20, abs=1e-6)
            assert out.effective[index].item() == pytest.approx(math.exp(entropy), rel=1e-5)
            assert out.dead[index].item() == pytest.approx(0.2)

    def test_limits(self) -> None:
        collapsed = prototype_diagnostics(torch.ones(4, 3), torch.full((6, 4), 0.25))
        assert collapsed.cosine.item() == pytest.approx(1)
        assert collapsed.effective.item() == pytest.approx(4)
        assert collapsed.dead.item() == 0

    def test_unknown_is_nan(self) -> None:
        one = prototype_diagnostics(torch.ones(1, 3))
        assert all(field.isnan() for field in one)
        unused = prototype_diagnostics(torch.eye(3), torch.zeros(5, 3))
        assert unused.cosine == 0
        assert unused.effective.isnan()
        assert unused.dead.isnan()

    def test_errors(self) -> None:
        with pytest.raises(TypeError, match="prototypes must be floating point"):
            prototype_diagnostics(torch.ones(2, 2, dtype=torch.long))
        with pytest.raises(ValueError, match=r"prototypes must have shape \(\.\.\., K, D\), got \(3,\)"):
            prototype_diagnostics(torch.ones(3))
        with pytest.raises(ValueError, match=r"assignment must have shape \(L, 4\), got \(5, 3\); one column"):
            prototype_diagnostics(torch.eye(4), torch.ones(5, 3))
        with pytest.raises(ValueError, match="not be negative or NaN, got a minimum of -1"):
            prototype_diagnostics(torch.eye(3), -torch.ones(5, 3))
