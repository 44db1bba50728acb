"""Regions against prototypes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from protoseg import RegionalSemanticContrast

B, C, K, D, H, W = 3, 3, 2, 5, 4, 6


def made(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features, soft masks of which one is empty and one is full, prototypes, tags, background prototypes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    masks = torch.rand(B, C, H, W, generator=generator, dtype=torch.float64)
    masks[0, 0], masks[1, 1] = 0, 1
    labels = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    return draw(B, D, H, W), masks, draw(C, D), labels, draw(K, D)


def loop(
    features: Tensor, masks: Tensor, prototypes: Tensor, labels: Tensor | None, background: Tensor | None
) -> tuple[float, float]:
    """Contrast and suppression, region by region."""
    every = [*prototypes, *([] if background is None else background)]
    contrast, suppression = list[float](), list[float]()
    for b in range(len(features)):
        for c in range(len(prototypes)):
            weight = masks[b, c].double()
            if weight.sum() == 0:
                continue
            region = sum(weight[y, x] * features[b, :, y, x] for y in range(H) for x in range(W)) / weight.sum()
            cosines = [float(region @ v / region.norm() / v.norm()) for v in every]
            weights = [math.exp(cosine / 0.2) for cosine in cosines]
            p = weights[c] / sum(weights)
            if labels is None or labels[b, c]:
                contrast.append(-math.log(p))
            else:
                suppression.append(-math.log(1 - p))
    return sum(contrast) / max(1, len(contrast)), sum(suppression) / max(1, len(suppression))


@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("hard", [True, False])
def test_the_loss_is_the_loop_s(tags: bool, background: bool, hard: bool) -> None:
    features, masks, prototypes, labels, prompts = made()
    masks = masks > 0.5 if hard else masks
    given = (labels if tags else None, prompts if background else None)
    out = RegionalSemanticContrast(temperature=0.2, suppression=0.5)(features, masks, prototypes, *given)
    contrast, suppression = loop(features, masks, prototypes, *given)
    assert out.contrast.item() == pytest.approx(contrast, abs=1e-9)
    assert out.suppression.item() == pytest.approx(suppression, abs=1e-9)
    assert out.loss.item() == pytest.approx(contrast + 0.5 * suppression, abs=1e-9)
    assert out.similarity.shape == (B, C, C + K * background)
    assert not out.counted[0, 0]
    assert (out.regions[0, 0] == 0).all()


def test_gradients() -> None:
    features, masks, prototypes, labels, prompts = made()
    module = RegionalSemanticContrast(temperature=0.2)
    inputs = (features.requires_grad_(), (masks * 0.9 + 0.05).requires_grad_(), prototypes.requires_grad_())
    assert torch.autograd.gradcheck(lambda *given: module(*given, labels, prompts).loss, inputs)


@pytest.mark.parametrize("case", ["no tag", "no mask", "one class", "one pixel", "all absent"])
def test_edges_give_finite_losses_and_gradients(case: str) -> None:
    features, masks, prototypes, labels, _ = made()
    if case == "no tag":
        labels = torch.zeros_like(labels)
    elif case == "no mask":
        masks = torch.zeros_like(masks)
    elif case == "one class":
        masks, prototypes, labels = masks[:, :1], prototypes[:1], labels[:, :1]
    elif case == "one pixel":
        features, masks = features[..., :1, :1], masks[..., :1, :1]
    features = features.detach().requires_grad_()
    out = RegionalSemanticContrast()(features, masks, prototypes, labels)
    torch.autograd.backward(out.loss)
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert out.loss.isfinite()
    if case in ("no mask", "one class"):
        assert out.loss.item() == 0
    if case == "no tag":
        assert out.contrast.item() == 0
        assert out.suppression.item() > 0


def test_small_regions_do_not_count_and_sure_ones_keep_a_gradient() -> None:
    features, masks, prototypes, labels, _ = made()
    masks[1, 2] = 0
    masks[1, 2, 0, 0] = 1
    assert RegionalSemanticContrast()(features, masks, prototypes, labels).counted[1, 2]
    assert not RegionalSemanticContrast(least_area=0.1)(features, masks, prototypes, labels).counted[1, 2]
    # An absent class whose region is its prototype: 1 - p is 0 in float32, its logarithm is not.
    features = prototypes[:1].float().reshape(1, D, 1, 1).clone().requires_grad_()
    others = torch.cat([prototypes[:1], -prototypes[:1], -prototypes[:1]]).float()
    out = RegionalSemanticContrast(temperature=0.01)(features, torch.ones(1, C, 1, 1), others, torch.zeros(1, C))
    assert 60 < out.suppression.item() < 80


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    features, masks, prototypes, labels, prompts = (each.float() for each in made())
    module = RegionalSemanticContrast()
    whole = module(features, masks, prototypes, labels, prompts).loss
    half = module(features.to(dtype), masks.to(dtype), prototypes, labels, prompts).loss
    torch.testing.assert_close(half, whole, rtol=0, atol=0.05)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(module(features, masks, prototypes, labels, prompts).loss, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(B, 4, H, W)}, r"prototypes must have shape \(C, 4\), got \(3, 5\); project"),
        ({"masks": torch.zeros(B, C, 2, 2)}, r"masks must have shape \(3, 3, 4, 6\), got \(3, 3, 2, 2\); resize"),
        ({"masks": torch.zeros(B, C, H, W).long()}, r"masks must be floating point"),
        ({"labels": torch.full((B, C), 2)}, r"labels must hold only 0 and 1"),
        ({"labels": torch.ones(B, 2)}, r"labels must have shape \(3, 3\), got \(3, 2\)"),
        ({"background": torch.ones(2, 4)}, r"background must have shape \(K, 5\)"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    names = ("features", "masks", "prototypes", "labels", "background")
    given = {**dict(zip(names, made(), strict=True)), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        RegionalSemanticContrast()(**given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"suppression": -1.0}, "suppression must be at least 0"),
        ({"least_area": 2.0}, "least_area must lie between 0 and 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegionalSemanticContrast(**options)


def rank_main(rank: int) -> Any:
    features, masks, prototypes, labels, prompts = made()
    part = slice(0, 1) if rank == 0 else slice(1, B)
    prototypes.requires_grad_()
    out = RegionalSemanticContrast()(features[part], masks[part], prototypes, labels[part], prompts)
    (slope,) = torch.autograd.grad(out.loss, prototypes)
    return {"loss": out.loss.detach(), "slope": slope}


def test_two_processes_are_one(two_processes: Any) -> None:
    first, second = two_processes(rank_main)
    features, masks, prototypes, labels, prompts = made()
    prototypes.requires_grad_()
    out = RegionalSemanticContrast()(features, masks, prototypes, labels, prompts)
    (slope,) = torch.autograd.grad(out.loss, prototypes)
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, out.loss.detach())
    torch.testing.assert_close((first["slope"] + second["slope"]) / 2, slope)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("masks", lambda x: 5 * x - 2, ValueError, "masks must lie between 0 and 1 .* take the sigmoid of logits"),
        ("masks", lambda x: x * math.nan, ValueError, "masks must lie between 0 and 1 without NaN"),
        ("features", lambda x: x * math.nan, ValueError, "features must be finite"),
        ("prototypes", lambda x: x.long(), TypeError, "prototypes must be floating point"),
        ("prototypes", lambda x: x * math.inf, ValueError, "prototypes must be finite"),
    ],
)
def test_what_made_regions_drop_out_is_an_error(name: str, change: Any, error: Any, message: str) -> None:
    given = dict(zip(("features", "masks", "prototypes", "labels", "background"), made(), strict=True))
    given[name] = change(given[name])
    with pytest.raises(error, match=f"RegionalSemanticContrast: {message}"):
        RegionalSemanticContrast()(**given)


def test_masks_of_half_precision_have_finite_gradients() -> None:
    features, masks, prototypes, labels, background = made()
    masks = masks.float()
    masks[0, 0] = 0
    half = masks.half().requires_grad_()
    out = RegionalSemanticContrast()(features.float(), half, prototypes.float(), labels, background.float())
    out.loss.backward()
    assert half.grad is not None
    assert half.grad.isfinite().all()
    assert half.grad.any()
