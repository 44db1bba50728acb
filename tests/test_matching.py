"""Matching against brute force, and the contrast against a loop from the equation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from protoseg.functional import match, own_similarity, symmetric_contrast


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def best_total(scores: Tensor) -> float:
    """The largest total of all one-to-one pairings."""
    scores = scores if scores.shape[0] <= scores.shape[1] else scores.T
    few, many = scores.shape
    return max(
        sum(float(scores[row, column]) for row, column in enumerate(chosen))
        for chosen in itertools.permutations(range(many), few)
    )


@pytest.mark.parametrize(("groups", "prototypes"), list(itertools.product(range(1, 8), (1, 2, 4, 7))))
def test_the_total_is_the_largest_of_all(groups: int, prototypes: int) -> None:
    similarity = 2 * torch.rand(3, groups, prototypes, dtype=torch.float64) - 1
    matched = match(similarity)
    for image in range(3):
        taken = matched[image][matched[image] >= 0].tolist()
        assert len(taken) == len(set(taken)) == min(groups, prototypes)
        assert float(own_similarity(similarity, matched)[image].sum()) == pytest.approx(best_total(similarity[image]))


@pytest.mark.parametrize("method", ["hungarian", "greedy", "none"])
def test_a_planted_permutation_is_found(method: Any) -> None:
    prototypes = torch.nn.functional.normalize(torch.randn(5, 64, 32), dim=-1)
    planted = torch.stack([torch.randperm(64) for _ in range(5)])
    groups = prototypes.gather(1, planted.unsqueeze(-1).expand(-1, -1, 32)) + 0.05 * torch.randn(5, 64, 32)
    similarity = torch.nn.functional.normalize(groups, dim=-1) @ prototypes.mT
    assert torch.equal(match(similarity, method), planted)


def greedily(scores: Tensor) -> list[int]:
    pairs = sorted(itertools.product(*map(range, scores.shape)), key=lambda pair: -float(scores[pair]))
    result, used = [-1] * len(scores), set()
    for group, prototype in pairs:
        if result[group] < 0 and prototype not in used:
            result[group] = prototype
            used.add(prototype)
    return result


@pytest.mark.parametrize("size", [(4, 4), (3, 6), (6, 3), (1, 1)])
def test_greedy_takes_the_largest_first(size: tuple[int, int]) -> None:
    similarity = torch.randn(4, *size)
    assert match(similarity, "greedy").tolist() == [greedily(scores) for scores in similarity]


def contrast_loop(similarity: Tensor, matched: Tensor, keep: Tensor, scale: float) -> float:
    """The equation, one pair and one candidate at a time."""
    total = 0.0
    for scores, partners, kept in zip(similarity, matched.tolist(), keep.tolist(), strict=True):
        terms = []
        for group, (prototype, wanted) in enumerate(zip(partners, kept, strict=True)):
            if wanted and prototype >= 0:
                own = math.exp(scale * scores[group, prototype])
                row = sum(math.exp(scale * value) for value in scores[group])
                column = sum(math.exp(scale * value) for value in scores[:, prototype])
                terms.append(-math.log(own / row) - math.log(own / column))
        total += sum(terms) / len(terms) if terms else 0.0
    return total / len(similarity)


@pytest.mark.parametrize("size", [(4, 4), (3, 6), (6, 3)])
def test_contrast_equals_a_loop(size: tuple[int, int]) -> None:
    similarity = torch.randn(3, *size, dtype=torch.float64)
    matched, keep = match(similarity), torch.rand(3, size[0]) < 0.6
    keep[1] = False
    want = contrast_loop(similarity, matched, keep, 2.0)
    assert symmetric_contrast(similarity, matched, keep, 2.0).item() == pytest.approx(want)


def test_contrast_has_the_gradient_of_differences() -> None:
    similarity = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    matched, keep = match(similarity), torch.tensor([[True, False, True], [True, True, True]])
    assert torch.autograd.gradcheck(lambda s, t: symmetric_contrast(s, matched, keep, t), (similarity, scale))


def test_nothing_kept_is_zero_with_a_gradient() -> None:
    similarity = torch.randn(2, 3, 4, requires_grad=True)
    loss = symmetric_contrast(similarity, match(similarity), torch.zeros(2, 3, dtype=torch.bool), 10.0)
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert similarity.grad is not None
    assert not similarity.grad.any()


def test_matching_compiles_without_a_break() -> None:
    similarity = torch.randn(2, 5, 5)
    compiled = torch.compile(lambda s: match(s) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(similarity), match(similarity) + 1)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"match: similarity must have shape \(B, G, K\), got \(3, 3\)"):
        match(torch.randn(3, 3))
    with pytest.raises(ValueError, match="match: method must be one of 'hungarian', 'greedy', 'none', got 'auction'"):
        match(torch.randn(1, 3, 3), "auction")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="match: similarity must not be empty"):
        match(torch.randn(1, 0, 3))
    keep = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"symmetric_contrast: matched must have shape \(1, 3\), got \(1, 2\)"):
        symmetric_contrast(torch.randn(1, 3, 3), torch.zeros(1, 2, dtype=torch.long), keep)
