"""Mean and covariance of pixels against numpy, and the change of coordinates that they give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from protoseg.modules.statistics import factorize, from_space, measure, to_space

D = 4
SHAPES = {"whitened": (D, D), "diagonal": (D,), "dot": (0,)}


def pictures(step: int, size: tuple[int, int] = (3, 5)) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    mixing = torch.tensor([[2.0, 0, 0, 0], [1, 1, 0, 0], [0, 3, 0.5, 0], [0, 0, 1, 0.1]], dtype=torch.float64)
    noise = torch.randn(2, D, *size, generator=generator, dtype=torch.float64)
    return torch.einsum("de,behw->bdhw", mixing, noise) + 30


def state(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.zeros(each, dtype=torch.float64) for each in ((), (D,), shape))  # type: ignore[return-value]


def add(features: Tensor, statistics: tuple[Tensor, Tensor, Tensor], retain: float = 1.0) -> None:
    measure(features, torch.ones(len(features), dtype=torch.bool), *statistics, retain)


@pytest.mark.parametrize("retain", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_pictures_of_any_size_weigh_the_same(shape: tuple[int, ...], retain: float) -> None:
    weight, mean, covariance = state(shape)
    pixels, weights = np.zeros((0, D)), np.zeros(0)
    for step, size in enumerate([(3, 5), (1, 1), (7, 2), (4, 4)]):
        features = pictures(step, size)
        add(features, (weight, mean, covariance), retain)
        pixels = np.concatenate([pixels, features.permute(0, 2, 3, 1).reshape(-1, D).numpy()])
        weights = np.concatenate([weights * retain, np.full(2 * size[0] * size[1], 1 / (size[0] * size[1]))])
    np.testing.assert_allclose(weight.item(), weights.sum())
    np.testing.assert_allclose(mean.numpy(), np.average(pixels, axis=0, weights=weights))
    want = np.cov(pixels, rowvar=False, aweights=weights, ddof=0)
    if covariance.dim() == 2:
        np.testing.assert_allclose(covariance.numpy(), want, atol=1e-10)
    elif len(covariance):
        np.testing.assert_allclose(covariance.numpy(), np.diag(want), atol=1e-10)


def test_nothing_changes_where_nothing_comes() -> None:
    weight, mean, covariance = state((D, D))
    add(pictures(0) * torch.nan, (weight, mean, covariance))
    assert weight == 0
    assert not mean.any()
    assert not covariance.any()


def test_pixels_that_are_not_finite_count_nowhere() -> None:
    features = pictures(0)
    want = features.clone()
    features[0, 1, 0, 0], features[1, 0, 2, 4] = torch.nan, torch.inf
    weight, mean, covariance = state((D, D))
    add(features, (weight, mean, covariance))
    kept = want.permute(0, 2, 3, 1).reshape(-1, D)[features.permute(0, 2, 3, 1).reshape(-1, D).isfinite().all(1)]
    assert len(kept) == 28
    torch.testing.assert_close(mean, kept.mean(0))
    torch.testing.assert_close(covariance, kept.T.cov(correction=0))


def test_pictures_that_do_not_count_weigh_nothing() -> None:
    statistics, want = state((D, D)), state((D, D))
    features = pictures(0)
    measure(features, torch.tensor([False, True]), *statistics, 1.0)
    add(features[1:], want)
    for got, expected in zip(statistics, want, strict=True):
        torch.testing.assert_close(got, expected)


def test_what_overflows_leaves_everything_as_it_was() -> None:
    weight, mean, covariance = (each.float() for each in state((D, D)))
    add(pictures(0).float(), (weight, mean, covariance))
    before = [each.clone() for each in (weight, mean, covariance)]
    features = pictures(1).float()
    features[0, 0, 0, 0] = 1e25
    add(features, (weight, mean, covariance))
    assert all(torch.equal(a, b) for a, b in zip((weight, mean, covariance), before, strict=True))


def test_one_batch_far_from_the_origin_keeps_its_covariance() -> None:
    weight, mean, covariance = (each.float() for each in state((D, D)))
    features = (1000 + 0.1 * torch.randn(4, D, 8, 8, generator=torch.Generator().manual_seed(0))).float()
    add(features, (weight, mean, covariance))
    want = features.permute(1, 0, 2, 3).flatten(1).double().cov(correction=0)
    torch.testing.assert_close(covariance.double(), want, rtol=0.01, atol=1e-4)


def test_float32_keeps_its_digits_far_from_the_origin() -> None:
    weight, mean, covariance = (each.float() for each in state((D, D)))
    for step in range(20):
        add((pictures(step) + 1000).float(), (weight, mean, covariance))
    everything = torch.cat([pictures(step) for step in range(20)]).permute(1, 0, 2, 3).flatten(1)
    torch.testing.assert_close(covariance.double(), everything.cov(correction=0), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_are_those_of_the_space(shape: tuple[int, ...]) -> None:
    weight, mean, covariance = state(shape)
    add(pictures(0), (weight, mean, covariance))
    factor = factorize(covariance, 0.5)
    a, b = torch.randn(2, 3, D, dtype=torch.float64), torch.randn(3, D, dtype=torch.float64)
    product = (to_space(a, factor) * to_space(b, factor)).sum(-1)
    torch.testing.assert_close((a * from_space(to_space(b, factor), factor)).sum(-1), product)
    if shape == (D, D):
        shrunk = covariance + 0.5 * covariance.trace() / D * torch.eye(D)
        torch.testing.assert_close(torch.einsum("ncd,de,ce->nc", a, shrunk.inverse(), b), product)


@pytest.mark.parametrize("shape", [(D, D), (D,)])
def test_where_nothing_varies_nothing_is_changed(shape: tuple[int, ...]) -> None:
    factor = factorize(torch.zeros(shape), 0.5)
    vectors = torch.randn(3, D)
    torch.testing.assert_close(to_space(vectors, factor), vectors)
