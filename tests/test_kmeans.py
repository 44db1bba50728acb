from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from torch import Tensor

from protoseg.functional import kmeans


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def lloyd(points: Tensor, centers: Tensor, iterations: int) -> tuple[Tensor, list[int], float]:
    """Centers, assignment and inertia of Lloyd's rounds, one point at a time."""
    centers = centers.clone()
    assignment: list[int] = []
    for last in range(iterations + 1):
        distances = [[float((x - m).square().sum()) for m in centers] for x in points]
        assignment = [row.index(min(row)) for row in distances]
        if last == iterations:
            return centers, assignment, sum(min(row) for row in distances)
        for k in range(len(centers)):
            members = [x for x, a in zip(points, assignment, strict=True) if a == k]
            if members:
                centers[k] = torch.stack(members).mean(0)
    raise AssertionError


def blobs(count: int, classes: int = 1, spread: float = 0.1) -> Tensor:
    """Four corners of a square, 10 apart, with noise around them; in turn."""
    corners = 10 * torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    return corners[torch.arange(count) % 4] + spread * torch.randn(classes, count, 2)


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_equals_lloyd_from_the_same_seeds(iterations: int) -> None:
    points = torch.randn(2, 25, 4).double()
    seeds = kmeans(points, num_clusters=5, iterations=0).centers
    got = kmeans(points, num_clusters=5, iterations=iterations)
    for c in range(2):
        centers, assignment, inertia = lloyd(points[c], seeds[c], iterations)
        torch.testing.assert_close(got.centers[c], centers)
        assert got.assignment[c].tolist() == assignment
        assert got.inertia[c].item() == pytest.approx(inertia)


def test_converges_where_sklearn_does_from_the_same_seeds() -> None:
    points = torch.randn(1, 100, 4).double()
    seeds = kmeans(points, num_clusters=5, iterations=0).centers[0].numpy()
    got = kmeans(points, num_clusters=5, iterations=100)
    want = KMeans(5, init=seeds, n_init=1, max_iter=100, tol=0).fit(points[0].numpy())
    np.testing.assert_allclose(got.centers[0].numpy(), want.cluster_centers_)
    assert got.inertia.item() == pytest.approx(want.inertia_)


def test_seeds_are_distinct_points() -> None:
    points = torch.randn(4, 9, 3)
    seeds = kmeans(points, num_clusters=9, iterations=0)
    assert seeds.valid.all()
    torch.testing.assert_close(seeds.inertia, torch.zeros(4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("clusters", [3, 10])
@pytest.mark.parametrize("kind", ["blobs", "noise"])
def test_is_as_good_as_sklearn(kind: str, clusters: int) -> None:
    ratios = []
    for trial in range(4):
        if kind == "blobs":
            x, _ = make_blobs(150, 8, centers=clusters, cluster_std=2.0, random_state=trial)
        else:
            x = np.random.default_rng(trial).normal(size=(150, 8))
        mine = kmeans(torch.from_numpy(x)[None], num_clusters=clusters).inertia.item()
        theirs = [KMeans(clusters, n_init=1, max_iter=10, random_state=r).fit(x).inertia_ for r in range(3)]
        ratios.append(mine / np.mean(theirs))
    # Measured: medians 0.95 to 1.002, at most 1.03.
    assert np.median(ratios) <= 1.01
    assert max(ratios) <= 1.05


def test_inertia_never_rises() -> None:
    points = torch.randn(2, 60, 3).double()
    inertia = torch.stack([kmeans(points, num_clusters=6, iterations=i).inertia for i in range(8)])
    assert (inertia.diff(dim=0) <= 1e-12).all()
    assert (inertia[-1] < inertia[0]).all()


def test_order_of_points_does_not_matter_where_clusters_are_clear() -> None:
    points = blobs(20)
    shuffled = points[:, torch.randperm(20)]
    first, second = (kmeans(x, num_clusters=4).centers[0] for x in (points, shuffled))
    for center in first:
        assert (second - center).norm(dim=-1).min() < 1e-5


def test_offset_only_moves_the_centers() -> None:
    points = blobs(20, spread=1.0)
    here, there = kmeans(points, num_clusters=4), kmeans(points + 4096, num_clusters=4)
    assert torch.equal(here.assignment, there.assignment)
    torch.testing.assert_close(there.centers - 4096, here.centers, rtol=0, atol=2e-3)


def test_classes_do_not_mix() -> None:
    points, valid = torch.randn(3, 12, 4).double(), torch.rand(3, 12) < 0.7
    together = kmeans(points, valid, num_clusters=3)
    for c in range(3):
        alone = kmeans(points[c : c + 1], valid[c : c + 1], num_clusters=3)
        torch.testing.assert_close(alone, type(alone)(*(value[c : c + 1] for value in together)))


def test_rounding_does_not_choose_between_equally_good_seeds() -> None:
    # Of two points each is as good a first seed as the other.
    pairs = torch.randn(100, 2, 8)
    padding = torch.zeros(100, 5, 8)
    valid = torch.arange(7).expand(100, 7) < 2
    plain, exact = kmeans(pairs, num_clusters=2), kmeans(pairs.double(), num_clusters=2)
    padded = kmeans(torch.cat([pairs, padding], 1), valid, num_clusters=2)
    assert torch.equal(plain.assignment, exact.assignment)
    assert torch.equal(plain.assignment, padded.assignment[:, :2])


@pytest.mark.parametrize("rubbish", [1e6, math.nan, math.inf])
def test_points_that_are_not_valid_count_for_nothing(rubbish: float) -> None:
    points, valid = torch.randn(1, 12, 4).double(), torch.arange(12)[None] % 3 > 0
    got = kmeans(points.masked_fill(~valid.unsqueeze(-1), rubbish), valid, num_clusters=3)
    want = kmeans(points[:, valid[0]], num_clusters=3)
    torch.testing.assert_close(got.centers, want.centers)
    torch.testing.assert_close(got.inertia, want.inertia)
    assert torch.equal(got.assignment[valid], want.assignment[0])
    assert not got.assignment[~valid].any()


def test_fewer_points_than_clusters() -> None:
    points = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]])
    got = kmeans(points, torch.tensor([[True, True, False]]), num_clusters=5)
    assert got.valid.sum() == 2
    assert sorted(got.centers[got.valid].tolist()) == [[1, 2], [3, 4]]
    assert not got.centers[~got.valid].any()


def test_identical_points_make_one_cluster() -> None:
    got = kmeans(torch.full((1, 7, 3), 0.1), num_clusters=4)
    assert got.valid.sum() == 1
    torch.testing.assert_close(got.centers[got.valid], torch.full((1, 3), 0.1))
    assert got.inertia.item() < 1e-12


def test_nothing_valid() -> None:
    got = kmeans(torch.randn(2, 4, 3), torch.zeros(2, 4).bool(), num_clusters=2)
    assert not any(value.any() for value in got)


def test_draws_no_random_number_and_keeps_no_graph() -> None:
    points, before = torch.randn(1, 30, 4, requires_grad=True), torch.get_rng_state()
    first, second = (kmeans(points, num_clusters=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.centers, second.centers)
    assert not first.centers.requires_grad


@pytest.mark.parametrize(
    ("points", "options", "match"),
    [
        (torch.ones(3, 2), {}, r"kmeans: points must have shape \(C, N, D\), got \(3, 2\)"),
        (torch.ones(1, 0, 2), {}, r"kmeans: points must not be empty, got shape \(1, 0, 2\)"),
        (torch.ones(1, 3, 2), {"valid": torch.ones(1, 2).bool()}, r"kmeans: valid must have shape \(1, 3\)"),
        (torch.ones(1, 3, 2), {"num_clusters": 0}, r"num_clusters must be at least 1 .* got 0 and 10"),
        (torch.ones(1, 3, 2), {"iterations": -1}, "iterations at least 0, got 2 and -1"),
    ],
)
def test_errors(points: Tensor, options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        kmeans(points, **{"num_clusters": 2, **options})  # type: ignore[arg-type]


def test_list_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"kmeans: points must be a torch.Tensor, got list"):
        kmeans([[[1.0]]], num_clusters=1)  # type: ignore[arg-type]
