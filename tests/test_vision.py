"""Vision prototypes: the objective, its optimum, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.nn.functional import normalize

from protoseg import VisionPrototypeLearner
from protoseg.modules import vision
from protoseg.utils.numeric import summing_dtype

N, C, D = 23, 4, 6
TEMPERATURES = {"text_temperature": 0.2, "vision_temperature": 0.5}


def made(seed: int = 0, dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Text prototypes, unit features and tags; the second picture has none."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(C, D, generator=generator, dtype=dtype)
    features = normalize(torch.randn(n, D, generator=generator, dtype=dtype), dim=-1)
    labels = (torch.rand(n, C, generator=generator) < 0.5).long()
    labels[0, 0], labels[1] = 1, 0
    return text, features, labels


def loop(text: Tensor, prototypes: Tensor, features: Tensor, labels: Tensor | None) -> float:
    """The mean KL, picture by picture and class by class."""
    total, count = 0.0, 0
    directions = text / text.norm(dim=1, keepdim=True)
    for i, x in enumerate(features):
        present = [c for c in range(C) if labels is None or labels[i, c]]
        if not present:
            continue
        count += 1
        weights = {c: math.exp(float(x @ directions[c]) / 0.2) for c in present}
        q = [math.exp(float(x @ prototypes[c]) / 0.5) for c in range(C)]
        for c in present:
            p = weights[c] / sum(weights.values())
            total += p * (math.log(p) - math.log(q[c] / sum(q)))
    return total / count


def learner(text: Tensor, **options: Any) -> VisionPrototypeLearner:
    return VisionPrototypeLearner(text, **{**TEMPERATURES, **options}).to(text.dtype)


@pytest.mark.parametrize("tags", [True, False])
def test_the_loss_is_the_loop_s(tags: bool) -> None:
    text, features, labels = made()
    found = learner(text)
    with torch.no_grad():
        found.vision.copy_(torch.randn(C, D, dtype=torch.float64))
    out = found(features, labels if tags else None)
    prototypes = found.prototypes.detach()
    torch.testing.assert_close(prototypes.norm(dim=-1), torch.ones(C, dtype=torch.float64))
    assert out.loss.item() == pytest.approx(loop(text, prototypes, features, labels if tags else None), abs=1e-12)
    rows = torch.ones(N, dtype=torch.float64)
    torch.testing.assert_close(out.probabilities.sum(-1).detach(), rows)
    rows[1] = 1.0 - tags
    torch.testing.assert_close(out.target.sum(-1), rows)
    assert not out.target.requires_grad
    if tags:
        assert (out.target[labels == 0] == 0).all()


@pytest.mark.parametrize("tags", [True, False])
def test_the_gradient_is_right_in_the_batch_and_in_fit(tags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text, features, labels = made()
    given = labels if tags else None
    found = learner(text)
    with torch.no_grad():
        found.vision.copy_(torch.randn(C, D, dtype=torch.float64))

    def loss(value: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(found, {"vision": value}, (features, given)).loss
        return out

    assert torch.autograd.gradcheck(loss, found.vision)
    (wanted,) = torch.autograd.grad(found(features, given).loss, found.vision)
    monkeypatch.setattr(vision, "block_size", lambda _: 5 * D)  # and 5 does not divide the number of pictures
    target = found(features, given).target
    objective = vision._Objective(found.vision_temperature, features, target, 22 if tags else 23)
    value, slope = objective(found.vision)
    assert value == pytest.approx(found(features, given).loss.item(), abs=1e-12)
    torch.testing.assert_close(slope, wanted)


@pytest.mark.parametrize("tags", [True, False])
def test_fit_reaches_the_optimum(tags: bool) -> None:
    text, features, labels = made()
    given = labels if tags else None
    found = learner(text).fit(features, given, tolerance=1e-9)
    assert found.last_fit is not None
    assert found.last_fit.start == pytest.approx(loop(text, normalize(text, dim=-1), features, given))
    assert found.last_fit.end == pytest.approx(loop(text, found.prototypes.detach(), features, given))
    assert found.last_fit.images == (22 if tags else 23)

    def value(flat: Any) -> float:
        rows = flat.reshape(C, D)
        return loop(text, torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)), features, given)

    other = scipy.optimize.minimize(value, normalize(text, dim=-1).numpy().ravel(), method="BFGS")
    assert found.last_fit.end <= other.fun + 1e-7  # on the sphere there are local minima, in which scipy may stop
    assert found.last_fit.end < found.last_fit.start


def test_without_tags_and_with_one_temperature_the_texts_are_best() -> None:
    text, features, _ = made()
    found = learner(text, vision_temperature=0.2).fit(features)
    torch.testing.assert_close(found.prototypes.detach(), normalize(text, dim=-1))
    assert found.last_fit is not None
    assert found.last_fit.end == pytest.approx(0, abs=1e-12)


def test_planted_prototypes_behind_a_gap_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    planted = normalize(torch.randn(10, 64, generator=generator), dim=-1)
    text = normalize(planted + 2 * normalize(torch.randn(64, generator=generator), dim=0), dim=-1)
    labels = (torch.rand(2000, 10, generator=generator) < 0.1).float()
    labels[torch.arange(2000), torch.randint(10, (2000,), generator=generator)] = 1
    noise = 0.7 * torch.randn(2000, 64, generator=generator) / 8
    features = normalize(normalize(labels, 1.0, -1) @ planted + noise, dim=-1)
    assert (text * planted).sum(-1).mean() < 0.5
    for given in (labels, None):
        found = VisionPrototypeLearner(text).fit(features, given)
        assert (found.prototypes * planted).sum(-1).mean() > 0.9


def test_half_precision_features_and_a_run_that_is_cut_short() -> None:
    text, features, labels = made(dtype=torch.float32)
    whole = learner(text).fit(features.half().float(), labels).prototypes
    torch.testing.assert_close(learner(text).fit(features.half(), labels).prototypes, whole, rtol=0, atol=1e-4)
    with pytest.warns(RuntimeWarning, match=r"2 steps did not reach the tolerance 1e-07; raise max_iterations"):
        learner(text).fit(features, labels, max_iterations=2)


def test_balancing_gives_every_class_its_share() -> None:
    text, features, labels = made()
    for given in (None, labels):
        found = learner(text, balance=200)
        target = learner(text)(features, given).target
        balanced = target.clone()
        vision._sinkhorn(balanced, given, 200)
        has = target.sum(-1) > 0
        torch.testing.assert_close(balanced.sum(-1), has.to(torch.float64))
        share = torch.full((N, C), 1 / C, dtype=torch.float64) if given is None else normalize(given.double(), 1.0, -1)
        torch.testing.assert_close(balanced.sum(0), share.sum(0), rtol=0, atol=1e-3)
        assert (balanced[target == 0] == 0).all()
        plain = learner(text).fit(features, given)
        assert not torch.allclose(found.fit(features, given).prototypes, plain.prototypes, atol=1e-3)


@pytest.mark.parametrize("tags", [True, False])
def test_few_pictures_at_a_time_make_no_difference(tags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text, features, labels = made()
    given = labels if tags else None
    whole = learner(text, balance=3).fit(features, given)
    monkeypatch.setattr(vision, "block_size", lambda _: 5 * D)
    few = learner(text, balance=3).fit(features, given)
    torch.testing.assert_close(few.prototypes, whole.prototypes, rtol=0, atol=1e-6)
    assert few.last_fit is not None
    assert whole.last_fit is not None
    assert few.last_fit.start == pytest.approx(whole.last_fit.start, abs=1e-12)


def test_training_by_steps_comes_to_the_same_and_state_travels() -> None:
    text, features, labels = made()
    found = learner(text)
    optimizer = torch.optim.Adam([found.vision], 0.05)
    for _ in range(600):
        optimizer.zero_grad()
        torch.autograd.backward(found(features, labels).loss)
        optimizer.step()
    fitted = learner(text).fit(features, labels)
    torch.testing.assert_close(found.prototypes, fitted.prototypes, rtol=0, atol=2e-3)
    other = learner(torch.randn(C, D, dtype=torch.float64))
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other.prototypes, fitted.prototypes)
    assert torch.equal(other.text, fitted.text)


def test_no_picture_with_a_tag() -> None:
    text, features, labels = made()
    out = learner(text)(features, torch.zeros_like(labels))
    assert out.loss.item() == 0
    torch.autograd.backward(out.loss)
    with pytest.raises(ValueError, match="no image has a tag"):
        learner(text).fit(features, torch.zeros_like(labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3, 5)}, r"features must have shape \(n, 6\), got \(3, 5\); take embeddings"),
        ({"features": torch.ones(N, D)}, r"features must be of unit length, and one is off by 1\.45"),
        ({"features": torch.full((N, D), torch.nan)}, r"off by nan; divide them by their norm, and look for NaN"),
        ({"features": torch.ones(N, D).long()}, r"features must be floating point"),
        ({"features": torch.zeros(0, D)}, r"features must not be empty"),
        ({"labels": torch.ones(N, 3)}, r"labels must have shape \(23, 4\), got \(23, 3\); one row per picture"),
        ({"labels": torch.full((N, C), 0.5)}, r"labels must hold only 0 and 1"),
    ],
)
def test_bad_pictures_and_tags(change: dict[str, Tensor], message: str) -> None:
    text, features, labels = made(dtype=torch.float32)
    given = {"features": features, "labels": labels, **change}
    for call in (learner(text), learner(text).fit):
        with pytest.raises((ValueError, TypeError), match=message):
            call(given["features"], given["labels"])


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (torch.zeros(2, 3), {}, "every text prototype needs a direction"),
        (torch.ones(3), {}, r"text_prototypes must have shape \(C, D\)"),
        (torch.ones(2, 3) * torch.nan, {}, "text_prototypes must be finite"),
        (torch.ones(2, 3), {"text_temperature": 0.0}, "text_temperature must be above 0"),
        (torch.ones(2, 3), {"vision_temperature": -1.0}, "vision_temperature must be above 0"),
        (torch.ones(2, 3), {"balance": -1}, "balance must be at least 0, got -1"),
    ],
)
def test_bad_texts_and_options(text: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionPrototypeLearner(text, **options)


def rank_main(rank: int) -> Any:
    text, features, labels = made()
    part = slice(0, 9) if rank == 0 else slice(9, N)
    found = learner(text)
    loss = found(features[part], labels[part]).loss
    (slope,) = torch.autograd.grad(loss, found.vision)
    fitted = learner(text, balance=3).fit(features[part], labels[part])
    return {"loss": loss.detach(), "slope": slope, "fitted": fitted.prototypes.detach()}


def test_two_processes_are_one(two_processes: Any) -> None:
    first, second = two_processes(rank_main)
    text, features, labels = made()
    found = learner(text)
    loss = found(features, labels).loss
    (slope,) = torch.autograd.grad(loss, found.vision)
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, loss.detach())
    torch.testing.assert_close((first["slope"] + second["slope"]) / 2, slope)
    assert torch.equal(first["fitted"], second["fitted"])
    torch.testing.assert_close(
        first["fitted"], learner(text, balance=3).fit(features, labels).prototypes.detach(), rtol=0, atol=1e-5
    )


def test_prototypes_carry_no_graph() -> None:
    text, features, labels = made()
    found = learner(text)
    found.prototypes.numpy()
    assert not copy.deepcopy(found).prototypes.requires_grad
    found(features, labels).loss.backward()  # the loss trains the parameter all the same
    assert found.vision.grad is not None


@pytest.mark.parametrize("length", [1e-4, 1e5])
def test_the_length_of_texts_and_of_what_was_trained_before_does_not_matter(length: float) -> None:
    text, features, labels = made()
    want = learner(text).fit(features, labels).prototypes
    torch.testing.assert_close(learner(length * text).fit(features, labels).prototypes, want, rtol=0, atol=1e-5)
    longer = learner(text)
    with torch.no_grad():
        longer.vision.mul_(length)
    torch.testing.assert_close(longer.fit(features, labels).prototypes, want, rtol=0, atol=1e-5)
    assert longer.last_fit is not None
    assert longer.last_fit.iterations > 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_learner_of_half_precision_fits_and_computes(dtype: torch.dtype) -> None:
    text, features, labels = (each.float() for each in made())
    half = learner(text).to(dtype)
    assert half(features, labels).loss.isfinite()
    want = learner(half.text.float()).fit(features, labels).prototypes
    found = half.fit(features, labels)
    assert found.vision.dtype == dtype
    torch.testing.assert_close(found.prototypes.float(), want, rtol=0, atol=0.02)


def test_long_sums_need_no_float64_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert summing_dtype(torch.device("mps")) == torch.float32
    assert summing_dtype(torch.device("cuda")) == torch.float64
    text, features, labels = (each.float() for each in made())
    want = learner(text, balance=2).fit(features, labels).last_fit
    monkeypatch.setattr("protoseg.modules.vision.summing_dtype", lambda device: torch.float32)
    got = learner(text, balance=2).fit(features, labels).last_fit
    assert want is not None
    assert got is not None
    assert got.end == pytest.approx(want.end, abs=1e-5)


def without_pictures(rank: int) -> Any:
    text, features, labels = made()
    some = slice(0, N) if rank == 0 else slice(0, 0)
    return learner(text, balance=2).fit(features[some], labels[some]).prototypes


def test_a_rank_without_pictures(two_processes: Any) -> None:
    first, second = two_processes(without_pictures)
    text, features, labels = made()
    assert torch.equal(first, second)
    want = learner(text, balance=2).fit(features, labels).prototypes
    torch.testing.assert_close(first, want, rtol=0, atol=1e-5)


def wrong_on_one(rank: int) -> str:
    text, features, labels = made()
    try:
        learner(text).fit(features * (2 if rank else 1), labels)
    except ValueError as error:
        return str(error)
    return ""


def test_what_is_wrong_on_one_rank_stops_all(two_processes: Any) -> None:
    first, second = two_processes(wrong_on_one)
    assert "another process of the group was given wrong features" in first
    assert "features must be of unit length" in second
