from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from scipy.special import softmax
from torch import Tensor
from torch.autograd import gradcheck

from protoseg import functional as P
from protoseg.utils.numeric import full_precision, masked_mean, unit

METRICS: tuple[P.Metric, ...] = ("dot", "cosine", "l1", "l2")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def gradient(value: Tensor, x: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(value.sum(), x)
    return result


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class TestPrecision:
    @pytest.mark.parametrize(("given", "inside"), [("float16", "float32"), ("float64", "float64")])
    def test_full_precision(self, given: str, inside: str) -> None:
        assert full_precision(torch.ones(2, dtype=getattr(torch, given))).dtype == getattr(torch, inside)

    # What each function makes of one [1, 3, 4, 4] tensor.
    FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
        P.max_normalize,
        lambda x: P.masked_average_pooling(x, x > 0)[0],
        *(lambda x, metric=metric: P.similarity(x, x, metric) for metric in METRICS),
        *(lambda x, metric=metric: P.metric_scale(x, x[..., 0] > 0, metric) for metric in ("dot", "l1", "l2")),
        lambda x: P.positiveness(x, x > 0),
        lambda x: P.mean_direction(x),
        lambda x: P.mean_direction(x, x[..., 0].abs()),
        lambda x: P.cosine_map(x, x[:, :, :3, 0]),
        lambda x: P.prototype_cam(x, x[:, :, :, :3]),
        lambda x: P.prototype_shift(x[0], x[0, ..., 0] > 0, -x[0], x[0, ..., 1] > 0),
        lambda x: masked_mean(x, x[..., 0] > 0),
        lambda x: P.margin_map(x, x[:, :1]),
        lambda x: P.kmeans(x[0], num_clusters=2).centers,
    )

    @pytest.mark.parametrize("function", FUNCTIONS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_computes_in_float32_under_half_input_and_autocast(
        self, function: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        half = torch.randn(1, 3, 4, 4).to(dtype)
        expected = function(half.float())
        assert expected.dtype == torch.float32
        assert torch.equal(function(half), expected)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(function(half), expected)
            assert torch.equal(function(half.float()), expected)


class TestUnit:
    def test_equals_normalize(self) -> None:
        x = double(3, 5)
        torch.testing.assert_close(unit(x), F.normalize(x, dim=-1))
        torch.testing.assert_close(unit(x, 0), F.normalize(x, dim=0))
        assert gradcheck(unit, (x,))

    def test_zero_stays_zero_and_its_gradient_small(self) -> None:
        x = torch.zeros(2, 3, requires_grad=True)
        value = unit(x)
        assert not value.any()
        assert gradient(value, x).abs().max() <= 1


class TestMaxNormalize:
    def test_equals_loop(self) -> None:
        cam = torch.randn(2, 3, 4, 5)
        got = P.max_normalize(cam)
        for b in range(2):
            for c in range(3):
                peak = max(cam[b, c].flatten().tolist())
                torch.testing.assert_close(got[b, c], cam[b, c].clamp_min(0) / peak)

    def test_ignores_scale(self) -> None:
        cam = torch.randn(1, 3, 4, 4)
        torch.testing.assert_close(P.max_normalize(64 * cam), P.max_normalize(cam), rtol=0, atol=0)

    @pytest.mark.parametrize("value", [0.0, -1.0])
    def test_no_positive_score(self, value: float) -> None:
        cam = torch.full((1, 2, 3, 3), value, requires_grad=True)
        out = P.max_normalize(cam)
        assert not out.any()
        assert not gradient(out, cam).any()

    def test_one_pixel(self) -> None:
        assert P.max_normalize(torch.tensor([[[[0.3]], [[-0.3]]]])).flatten().tolist() == [1, 0]

    def test_maximum_is_a_constant_in_the_gradient(self) -> None:
        cam = double(2, 3, 3)
        for c, got in zip(cam.detach(), gradient(P.max_normalize(cam), cam), strict=True):
            torch.testing.assert_close(got, (c > 0) / c.max())


class TestMaskedAverage:
    def test_equals_loop(self) -> None:
        features, weights = torch.randn(2, 4, 3, 5), torch.rand(2, 3, 3, 5)
        average, valid = P.masked_average_pooling(features, weights)
        assert valid.all()
        for b in range(2):
            for n in range(3):
                total, summed = 0.0, torch.zeros(4)
                for y in range(3):
                    for x in range(5):
                        total += weights[b, n, y, x].item()
                        summed += weights[b, n, y, x] * features[b, :, y, x]
                torch.testing.assert_close(average[b, n], summed / total)

    def test_mask_of_one_pixel_and_of_none(self) -> None:
        features = torch.randn(1, 4, 3, 3)
        masks = torch.zeros(1, 2, 3, 3, dtype=torch.bool)
        masks[0, 0, 1, 2] = True
        average, valid = P.masked_average_pooling(features, masks)
        assert valid.tolist() == [[True, False]]
        torch.testing.assert_close(average[0], torch.stack([features[0, :, 1, 2], torch.zeros(4)]))

    def test_gradient(self) -> None:
        features, masks = double(2, 3, 2, 3), torch.rand(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda f, m: P.masked_average_pooling(f, m)[0], (features, masks))
        empty = torch.zeros(2, 1, 2, 3, dtype=torch.float64)
        assert not gradient(P.masked_average_pooling(features, empty)[0], features).any()


class TestSimilarity:
    @pytest.mark.parametrize("metric", METRICS)
    def test_equals_scipy(self, metric: P.Metric) -> None:
        a, p = double(2, 3, 5), double(2, 4, 5)
        got = P.similarity(a, p, metric)
        for i in range(2):
            x, y = a[i].detach().numpy(), p[i].detach().numpy()
            want = {
                "dot": x @ y.T,
                "cosine": 1 - cdist(x, y, "cosine"),
                "l1": -cdist(x, y, "cityblock"),
                "l2": -cdist(x, y),
            }[metric]
            np.testing.assert_allclose(got[i].detach().numpy(), want, rtol=1e-12, atol=1e-12)
        assert gradcheck(lambda a, p: P.similarity(a, p, metric), (a, p))

    @pytest.mark.parametrize("metric", METRICS)
    def test_same_and_zero_points_have_finite_gradients(self, metric: P.Metric) -> None:
        a = torch.stack([torch.ones(4), torch.zeros(4)]).requires_grad_()
        p = a.detach().clone().requires_grad_()
        for point in (a, p):
            assert gradient(P.similarity(a, p, metric), point).abs().max() < 100

    def test_l2_of_close_points_far_from_the_origin(self) -> None:
        a = torch.full((1, 8), 1000.0)
        p = a + 0.01
        want = -(a - p).double().norm()
        torch.testing.assert_close(P.similarity(a, p, "l2").squeeze().double(), want, rtol=1e-5, atol=0)

    def test_unknown_metric(self) -> None:
        x = torch.ones(1, 2)
        with pytest.raises(ValueError, match="similarity: metric must be one of 'dot', 'cosine', 'l1', 'l2', got 'L2'"):
            P.similarity(x, x, "L2")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"metric_scale: metric must be one of .* got 'L2'"):
            P.metric_scale(x, x[:, 0] > 0, "L2")  # type: ignore[arg-type]


class TestMetricScale:
    @pytest.mark.parametrize(("metric", "want"), [("dot", 13.0), ("cosine", 1.0), ("l1", 4.0), ("l2", 3.0)])
    def test_hand_case(self, metric: P.Metric, want: float) -> None:
        # Lengths 5 and 1, of which the third counts for nothing.
        prototypes = torch.tensor([[3.0, 4.0], [0.0, 1.0], [9.0, 9.0]])
        assert P.metric_scale(prototypes, torch.tensor([True, True, False]), metric).item() == pytest.approx(want)

    @pytest.mark.parametrize("metric", METRICS)
    def test_is_above_zero_over_nothing(self, metric: P.Metric) -> None:
        assert P.metric_scale(torch.zeros(2, 3), torch.tensor([False, False]), metric) > 0


class TestPositiveness:
    def test_equals_scipy_over_the_valid(self) -> None:
        scores, valid = torch.randn(6, 5), torch.rand(6, 5) < 0.6
        got = P.positiveness(scores, valid, 0.4)
        for row, keep, weights in zip(scores, valid, got, strict=True):
            want = np.zeros(5)
            want[keep.numpy()] = softmax(row[keep].numpy() / 0.4)
            np.testing.assert_allclose(weights.numpy(), want, rtol=1e-5, atol=1e-7)

    def test_nothing_valid(self) -> None:
        scores = torch.randn(2, 3, requires_grad=True)
        weights = P.positiveness(scores, torch.tensor([[False] * 3, [True] * 3]))
        assert weights[0].tolist() == [0, 0, 0]
        steps = gradient(weights * torch.arange(3.0), scores)
        assert steps[0].tolist() == [0, 0, 0]
        assert steps[1].any()

    def test_large_scores(self) -> None:
        weights = P.positiveness(torch.tensor([-1e30, 1e30]), torch.tensor([True, True]))
        assert weights.tolist() == [0, 1]

    def test_gradient(self) -> None:
        valid = torch.tensor([True, False, True, True])
        assert gradcheck(lambda s: P.positiveness(s, valid, 0.3), (double(3, 4),))


class TestSelectTopK:
    @pytest.mark.parametrize("k", [1, 2, 5, 9])
    def test_equals_sorting(self, k: int) -> None:
        weights = torch.rand(4, 5)
        values, indices = P.select_top_k(weights, k)
        for row, value, index in zip(weights.tolist(), values.tolist(), indices.tolist(), strict=True):
            assert index == sorted(range(5), key=lambda i, row=row: -row[i])[:k]  # type: ignore[misc]
            assert value == [row[i] for i in index]


class TestPrototypeCam:
    def test_equals_mean_of_cosines(self) -> None:
        features, prototypes, weights = double(2, 4, 3, 2), double(2, 3, 5, 4), torch.rand(2, 3, 5).double()
        weights[..., 1] = 0
        got, plain = P.prototype_cam(features, prototypes, weights), P.prototype_cam(features, prototypes)
        for b in range(2):
            for n in range(3):
                cosines = torch.stack([F.cosine_similarity(features[b], p[:, None, None], 0) for p in prototypes[b, n]])
                w = weights[b, n, :, None, None]
                torch.testing.assert_close(got[b, n], ((w * cosines).sum(0) / w.sum()).relu())
                torch.testing.assert_close(plain[b, n], cosines.mean(0).relu())

    def test_zero_weights_zero_prototypes_and_zero_pixels(self) -> None:
        features, prototypes = torch.rand(1, 4, 2, 2), torch.rand(1, 2, 3, 4)
        features[..., 0, 0] = 0
        prototypes[0, 0] = 0
        features.requires_grad_()
        out = P.prototype_cam(features, prototypes, torch.tensor([[[1.0, 1, 1], [0, 0, 0]]]))
        assert not out.any()
        assert gradient(P.prototype_cam(features, prototypes), features).abs().max() < 100

    def test_weights_may_have_more_axes_than_prototypes(self) -> None:
        prototypes, weights = torch.randn(3, 5, 4), torch.rand(2, 3, 5)
        want = torch.stack([P.mean_direction(prototypes, w) for w in weights])
        torch.testing.assert_close(P.mean_direction(prototypes, weights), want)

    def test_ignores_lengths(self) -> None:
        features, prototypes = torch.randn(1, 4, 2, 2), torch.randn(1, 2, 3, 4)
        torch.testing.assert_close(P.prototype_cam(7 * features, 9 * prototypes), P.prototype_cam(features, prototypes))

    def test_gradient(self) -> None:
        weights = torch.rand(1, 2, 3, dtype=torch.float64, requires_grad=True)
        assert gradcheck(P.prototype_cam, (double(1, 3, 2, 2), double(1, 2, 3, 3), weights))


class TestPrototypeShift:
    def test_hand_case(self) -> None:
        contexts = torch.tensor([[[2.0], [4.0], [9.0]], [[1.0], [1.0], [1.0]], [[1.0], [1.0], [1.0]]])
        valid = torch.tensor([[True, True, False], [True] * 3, [False] * 3])
        instances = torch.tensor([[[1.0], [1.0]], [[5.0], [7.0]], [[1.0], [1.0]]])
        stored = torch.tensor([[True, True], [False, False], [True, True]])
        # Mean context 3 less mean instance 1; then nothing stored; then no context.
        assert P.prototype_shift(contexts, valid, instances, stored).flatten().tolist() == [2, 0, 0]

    def test_equals_the_mean_over_pairs(self) -> None:
        contexts, instances = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
        got = P.prototype_shift(contexts, torch.ones(2, 3).bool(), instances, torch.ones(2, 5).bool())
        for c in range(2):
            pairs = [p - q for p in contexts[c] for q in instances[c]]
            torch.testing.assert_close(got[c], torch.stack(pairs).mean(0))


class TestJudge:
    def test_hand_case(self) -> None:
        foreground = torch.tensor([0.5, 0.7, 0.9, 0.1]).reshape(1, 4, 1, 1)
        got = P.margin_map(foreground, torch.full((1, 1, 1, 1), 0.5), sharpness=2.0)
        torch.testing.assert_close(got.flatten(), torch.tensor([0.5, 0.9, 1.0, 0.0]))

    def test_gradient(self) -> None:
        foreground = torch.rand(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
        background = torch.rand(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        assert gradcheck(P.margin_map, (foreground, background))
