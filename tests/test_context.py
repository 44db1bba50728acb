from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg import ContextPrototypeBank
from tests.cases import (
    BACKGROUNDS,
    METRICS,
    OPTIONS,
    SCORES,
    C,
    D,
    assert_same,
    assert_same_output,
    batch,
    gradients,
    make,
)
from tests.oracles import LoopBank


class TestAgainstLoops:
    @pytest.mark.parametrize("detach", ["pacam", "cam", "none"])
    @pytest.mark.parametrize("top_k", [1, 3])
    @pytest.mark.parametrize("shift", [True, False])
    @pytest.mark.parametrize(
        ("background", "center"),
        [("contexts", True), ("contexts", False), ("image", True), ("one_minus_max", True)],
    )
    @pytest.mark.parametrize("metric", METRICS)
    def test_every_option(
        self, metric: str, background: str, center: bool, shift: bool, top_k: int, detach: str
    ) -> None:
        options = {
            **OPTIONS,
            "metric": metric,
            "background": background,
            "center": center,
            "shift": shift,
            "top_k": top_k,
            "detach": detach,
            "score": "cosine" if top_k == 1 else "whitened",
        }
        self.compare(options, steps=6)

    @pytest.mark.parametrize("locate", ["map", "cam"])
    @pytest.mark.parametrize("center", [True, False])
    @pytest.mark.parametrize("background", BACKGROUNDS)
    @pytest.mark.parametrize("score", SCORES)
    def test_every_score(self, score: str, background: str, center: bool, locate: str) -> None:
        options = {"score": score, "background": background, "center": center, "locate": locate}
        self.compare({**OPTIONS, **options}, steps=6)

    @pytest.mark.parametrize(
        "option",
        [
            {"capacity": 40, "refresh_every": 1, "num_contexts": 5, "top_k": 4},
            {"cam_threshold": 0.0, "background_threshold": 1.0},
            {"cam_threshold": 0.95, "background_threshold": 0.05},
            {"temperature": 0.01, "sharpness": 20.0},
            {"background_contexts": 1, "num_contexts": 1, "top_k": 1, "capacity": 1},
        ],
    )
    def test_other_numbers(self, option: dict[str, Any]) -> None:
        self.compare({**OPTIONS, **option}, steps=6)

    def test_batch_above_capacity_keeps_the_last(self) -> None:
        bank = self.compare(OPTIONS, steps=3, size=11)
        assert bank.stored.tolist() == [4, 4, 4]

    def test_float32(self) -> None:
        self.compare(OPTIONS, steps=6, dtype=torch.float32, tolerance=2e-5)

    def compare(
        self,
        options: dict[str, Any],
        *,
        steps: int,
        size: int = 2,
        dtype: torch.dtype = torch.float64,
        tolerance: float = 1e-10,
    ) -> ContextPrototypeBank:
        bank, loops = make(dtype, **options), LoopBank(C, D, **options, dtype=dtype)
        for step in range(steps):
            features, cam, labels = batch(step, size, dtype)
            inputs = (features.requires_grad_(), cam.requires_grad_())
            got, want = bank(*inputs, labels), loops(*inputs, labels)
            assert_same_output(got, want, tolerance)
            for a, b in zip(gradients(got, *inputs), gradients(want, *inputs), strict=True):
                if a is None or b is None:
                    assert a is b or not (a if b is None else b).any()  # type: ignore[union-attr]
                else:
                    assert_same(a, b, tolerance)
            assert_same(dict(bank.state_dict()), loops.state(), tolerance)
        return bank


class TestMathematics:
    @pytest.mark.parametrize("background", ["contexts", "image"])
    # A linear score is divided by its peak, which counts as a constant too: there the loops alone vouch for "none".
    @pytest.mark.parametrize(("score", "detach"), [("cosine", "none"), ("whitened", "pacam")])
    def test_gradient(self, score: str, detach: str, background: str) -> None:
        bank = make(steps=6, background=background, score=score, detach=detach).eval()
        features, _, labels = batch(7)
        cam = torch.rand(2, C, 4, 5, dtype=torch.float64) - 0.3
        peak = cam == cam.amax((-2, -1), keepdim=True)  # It counts as a constant: hold it.

        def loss(f: Tensor, c: Tensor) -> Tensor:
            value: Tensor = bank(f, torch.where(peak, cam, c), labels).loss
            return value

        inputs = (features.requires_grad_(detach == "none"), cam.clone().requires_grad_())
        assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("score", SCORES)
    @pytest.mark.parametrize("background", BACKGROUNDS)
    def test_scale_of_features_and_cam_does_not_matter(self, score: str, metric: str, background: str) -> None:
        # Of instances alone, before there is a factor, nothing is asked: that step is left out.
        plain, scaled = (make(metric=metric, score=score, background=background, refresh_every=1) for _ in range(2))
        for step in range(5):
            features, cam, labels = batch(step)
            want, got = plain(features, cam, labels), scaled(64 * features, 8 * cam, labels)
            assert_same(got.pacam, want.pacam, 1e-12)
            assert_same(got.positiveness, want.positiveness, 1e-12)

    def test_order_of_classes_and_of_images_does_not_matter(self) -> None:
        plain, swapped = make(steps=6), make()
        for step in range(6):
            features, cam, labels = batch(step)
            swapped(features, cam.flip(1), labels.flip(1))
        features, cam, labels = batch(9, size=3)
        want, got = (
            plain.eval()(features, cam, labels),
            swapped.eval()(features.flip(0), cam.flip(0, 1), labels.flip(0, 1)),
        )
        assert_same(got.loss, want.loss, 1e-12)
        assert_same(got.pacam[:, 1:], want.pacam[:, 1:].flip(0, 1), 1e-12)
        assert_same(got.positiveness, want.positiveness.flip(0, 1), 1e-12)

    def test_class_without_contexts_is_served_by_its_own_instance(self) -> None:
        features, cam, labels = batch(0)
        out = make(background="one_minus_max", score="cosine", exponent=1.0)(features, cam, labels)
        b, c = out.valid.nonzero()[0].tolist()
        cosine = F.cosine_similarity(features[b], out.instances[b, c, :, None, None], 0)
        assert_same(out.pacam[b, c + 1], cosine / cosine.max(), 1e-12)
        assert out.positiveness[b, c].tolist() == [1, 0]
        assert (out.selected == -1).all()

    def test_image_without_background_is_judged_against_all_contexts_of_background(self) -> None:
        bank = make(steps=6, num_contexts=1, top_k=1, score="cosine", locate="cam").eval()
        bank.background_weight, bank.sharpness = 1.0, 0.05
        assert bank.memory.context_valid[-1].all()
        features, cam, _ = batch(7)
        out = bank(features, cam.abs() + 1, torch.ones(2, C))
        around, contexts = features - bank.memory.midpoint[:, None, None], bank.memory.contexts - bank.memory.midpoint
        cosine = [[F.cosine_similarity(around, p[:, None, None], 1) for p in row] for row in contexts]
        for c in range(C):
            want = 0.05 * (cosine[c][0] - sum(cosine[-1]) / 4) + 0.5
            assert_same(out.pacam[:, c + 1], want, 1e-12)

    def test_one_covariance_makes_the_score_a_log_odds_of_gaussians(self) -> None:
        """With one context each, the map is the log odds of two Gaussians but for a constant, before it is scaled."""
        bank = make(steps=6, num_contexts=1, top_k=1, background_contexts=1, background_weight=1).eval()
        features, cam, _ = batch(7)
        out = bank(features, cam.abs() + 0.5, torch.ones(2, C))
        covariance = bank.memory.factor @ bank.memory.factor.T
        pixels = features.permute(0, 2, 3, 1)
        for c in range(C):
            object_, background = (
                torch.distributions.MultivariateNormal(mean, covariance) for mean in bank.memory.contexts[[c, -1], 0]
            )
            odds = object_.log_prob(pixels) - background.log_prob(pixels)
            middle = (bank.memory.contexts[c, 0] + bank.memory.contexts[-1, 0]) / 2 - bank.memory.mean
            constant = middle @ covariance.inverse() @ (bank.memory.contexts[c, 0] - bank.memory.contexts[-1, 0])
            want = (odds + constant).relu()
            assert_same(out.pacam[:, c + 1], (want / want.amax((-2, -1), keepdim=True)) ** bank.exponent, 1e-8)

    def test_whitening_makes_directions_of_features_alike(self) -> None:
        """Any linear change of the features leaves the map as it is, once the ridge is small."""
        generator = torch.Generator().manual_seed(0)
        turn = torch.randn(D, D, generator=generator, dtype=torch.float64)
        plain, turned = (make(shrinkage=1e-12, refresh_every=1, capacity=40) for _ in range(2))
        for step in range(12):
            features, cam, labels = batch(step)
            want = plain(features, cam, labels)
            got = turned(torch.einsum("bdhw,de->behw", features, turn), cam, labels)
        assert plain.memory.context_valid.any(1).all()
        assert_same(got.pacam, want.pacam, 1e-5)

    def test_cam_of_another_size_is_resized(self) -> None:
        features, cam, labels = batch(0)
        large = F.interpolate(cam, features.shape[-2:], mode="bilinear")
        assert_same_output(make(steps=3)(features, cam, labels), make(steps=3)(features, large, labels))
