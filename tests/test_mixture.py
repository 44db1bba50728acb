"""EM against a loop from the equations, scikit-learn, and on its edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from torch import Tensor

from protoseg.functional import em

KERNELS = ("dot", "gaussian", "cosine")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def kappa(x: Tensor, mu: Tensor, kernel: str) -> float:
    if kernel == "gaussian":
        return -float((x - mu).square().sum()) / 2
    if kernel == "cosine":
        return float(x @ mu / (x.norm() * mu.norm()))
    return float(x @ mu)


def loop(
    tokens: Tensor, centers: Tensor, mask: Tensor, iterations: int, kernel: str, bandwidth: float, hard: bool
) -> tuple[Tensor, Tensor]:
    """One image, one token and one prototype at a time."""
    centers, start = list(centers), list(centers)
    shares = torch.zeros(len(tokens), len(centers), dtype=tokens.dtype)
    for _ in range(iterations):
        for token, x in enumerate(tokens):
            scores = [kappa(x, mu, kernel) for mu in centers]
            raised = [math.exp((score - max(scores)) / bandwidth) for score in scores]
            if hard:
                raised = [float(k == scores.index(max(scores))) for k in range(len(scores))]
            for k, value in enumerate(raised):
                shares[token, k] = value / sum(raised) if mask[token] else 0.0
        for k in range(len(centers)):
            directions = [x / x.norm() if kernel == "cosine" else x for x in tokens]
            total = torch.stack([share * x for share, x in zip(shares[:, k], directions, strict=True)]).sum(0)
            if shares[:, k].sum() > 0:
                centers[k] = total / (shares[:, k].sum() if kernel == "gaussian" else total.norm())
            else:
                centers[k] = start[k]
    return torch.stack(centers), shares


@pytest.mark.parametrize("length", [7, 40], ids=["gram", "plain"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_a_loop(kernel: Any, hard: bool, length: int) -> None:
    tokens = torch.randn(2, length, 6, dtype=torch.float64)
    centers = torch.nn.functional.normalize(torch.randn(4, 6, dtype=torch.float64), dim=-1)
    mask = torch.rand(2, length) < 0.8
    for iterations in (1, 2, 5):
        options = {"iterations": iterations, "kernel": kernel, "bandwidth": 0.7, "hard": hard}
        found = em(tokens, centers, mask, **options)
        for image in range(2):
            prototypes, shares = loop(tokens[image], centers, mask[image], iterations, kernel, 0.7, hard)
            torch.testing.assert_close(found.prototypes[image], prototypes)
            torch.testing.assert_close(found.responsibilities[image], shares)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gram_matrix_changes_nothing(kernel: Any) -> None:
    """Channels of nothing but zeros make the tokens few for their width."""
    tokens, centers = torch.randn(2, 60, 8), torch.randn(3, 8)
    wide, wide_centers = (torch.nn.functional.pad(each, (0, 56)) for each in (tokens, centers))
    plain = em(tokens, centers, kernel=kernel, bandwidth=0.5)
    gram = em(wide, wide_centers, kernel=kernel, bandwidth=0.5)
    torch.testing.assert_close(gram.prototypes[..., :8], plain.prototypes, rtol=0, atol=1e-5)
    torch.testing.assert_close(gram.responsibilities, plain.responsibilities, rtol=0, atol=1e-5)


def log_likelihood(tokens: Tensor, centers: Tensor, variance: float) -> float:
    components = torch.distributions.MultivariateNormal(centers, variance * torch.eye(centers.shape[-1]).double())
    return float(components.log_prob(tokens.unsqueeze(1)).logsumexp(-1).sum())


def test_the_likelihood_of_a_gaussian_mixture_never_falls() -> None:
    tokens, centers = torch.randn(30, 3).double(), torch.randn(4, 3).double()
    before = log_likelihood(tokens, centers, 0.3)
    for _ in range(30):
        centers = em(tokens[None], centers, iterations=1, kernel="gaussian", bandwidth=0.3).prototypes[0]
        after = log_likelihood(tokens, centers, 0.3)
        assert after >= before - 1e-9
        before = after


@pytest.mark.parametrize("draw", range(5))
def test_finds_planted_clusters_as_scikit_learn_does(draw: int) -> None:
    torch.manual_seed(draw)
    planted = torch.arange(120) % 4
    tokens = 4 * torch.randn(4, 8)[planted] + 0.5 * torch.randn(120, 8)
    start = tokens[:4]  # one of each
    found = em(tokens[None], start, iterations=50, kernel="gaussian", bandwidth=0.25)
    labels = found.responsibilities[0].argmax(-1)
    model = GaussianMixture(4, covariance_type="spherical", means_init=start.numpy(), random_state=0)
    theirs = model.fit_predict(tokens.numpy())
    assert adjusted_rand_score(theirs, labels) >= 0.99
    assert adjusted_rand_score(planted, labels) >= 0.99
    torch.testing.assert_close(found.prototypes[0], torch.from_numpy(model.means_).float(), rtol=0, atol=1e-2)


def mean_cosine(prototypes: Tensor) -> float:
    cosines = torch.nn.functional.normalize(prototypes, dim=-1) @ torch.nn.functional.normalize(prototypes, dim=-1).mT
    count = prototypes.shape[1]
    return float((cosines.sum((1, 2)) - count).mean() / (count * (count - 1)))


def test_bandwidth_decides_between_sharing_and_collapse() -> None:
    """Tokens of unit length around eight directions, which have something in common."""
    directions = torch.randn(8, 32) + 0.5
    tokens = directions[torch.randint(8, (4, 196))] + 0.5 * torch.randn(4, 196, 32)
    tokens = torch.nn.functional.normalize(tokens, dim=-1)
    centers = torch.nn.functional.normalize(torch.randn(8, 32), dim=-1)
    truth = mean_cosine(directions[None])
    assert mean_cosine(em(tokens, centers, bandwidth=1.0).prototypes) > 0.999
    assert mean_cosine(em(tokens, centers, bandwidth=0.1).prototypes) < (1 + truth) / 2


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_the_mask_leaves_out_may_be_anything(kernel: Any) -> None:
    tokens, centers = torch.randn(2, 9, 4), torch.randn(3, 4)
    want = em(tokens, centers, kernel=kernel)
    padded = torch.cat([tokens, torch.full((2, 5, 4), math.nan)], 1)
    mask = torch.arange(14).expand(2, -1) < 9
    found = em(padded, centers, mask, kernel=kernel)
    torch.testing.assert_close(found.prototypes, want.prototypes)
    torch.testing.assert_close(found.responsibilities[:, :9], want.responsibilities)
    assert not found.responsibilities[:, 9:].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_image_without_tokens_keeps_the_start(kernel: Any) -> None:
    centers = torch.nn.functional.normalize(torch.randn(3, 4), dim=-1)
    found = em(torch.randn(2, 9, 4), centers, torch.tensor([[True], [False]]).expand(2, 9), kernel=kernel)
    torch.testing.assert_close(found.prototypes[1], centers)
    assert not torch.allclose(found.prototypes[0], centers)


def test_one_token_is_every_prototype() -> None:
    token = torch.tensor([[[3.0, 4.0]]])
    for kernel, want in (("dot", [0.6, 0.8]), ("cosine", [0.6, 0.8]), ("gaussian", [3.0, 4.0])):
        found = em(token, torch.eye(2), kernel=kernel)  # type: ignore[arg-type]
        torch.testing.assert_close(found.prototypes[0], torch.tensor([want, want]))


def test_a_prototype_without_a_share_goes_back_to_its_start() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [1.0, 0.2]]])
    centers = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found = em(tokens, centers, hard=True)
    torch.testing.assert_close(found.prototypes[0, 1], centers[1])
    assert found.prototypes[0, 0, 0] > 0.9


def test_a_bandwidth_of_each_image() -> None:
    tokens, centers = torch.randn(2, 9, 4), torch.randn(3, 4)
    found = em(tokens, centers, bandwidth=torch.tensor([0.2, 2.0]))
    for image, bandwidth in enumerate((0.2, 2.0)):
        alone = em(tokens[image : image + 1], centers, bandwidth=bandwidth)
        torch.testing.assert_close(found.prototypes[image : image + 1], alone.prototypes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    tokens, centers = (40 * torch.randn(2, 9, 4)).to(dtype), torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = em(tokens, centers, bandwidth=5.0)
    want = em(tokens.float(), centers, bandwidth=5.0)
    assert found.prototypes.dtype == torch.float32
    torch.testing.assert_close(found.prototypes, want.prototypes, rtol=0, atol=0)


def test_bad_input() -> None:
    tokens, centers = torch.randn(2, 9, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"em: tokens must have shape \(B, L, D\), got \(9, 4\)"):
        em(tokens[0], centers)
    with pytest.raises(ValueError, match=r"em: tokens must not be empty"):
        em(tokens[:, :0], centers)
    with pytest.raises(ValueError, match=r"em: centers must have shape \(K, 4\), got \(3, 5\)"):
        em(tokens, torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"em: centers must have shape \(2, K, 4\), got \(3, 3, 4\)"):
        em(tokens, torch.randn(3, 3, 4))
    with pytest.raises(ValueError, match=r"em: mask must have shape \(2, 9\)"):
        em(tokens, centers, torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="em: iterations must be at least 1, got 0"):
        em(tokens, centers, iterations=0)
    with pytest.raises(ValueError, match="em: bandwidth must be above 0, got -1"):
        em(tokens, centers, bandwidth=-1)
    with pytest.raises(ValueError, match="em: kernel must be one of 'dot', 'gaussian', 'cosine', got 'rbf'"):
        em(tokens, centers, kernel="rbf")  # type: ignore[arg-type]
