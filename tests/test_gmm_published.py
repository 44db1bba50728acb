"""The published arithmetic of the regularizer against a loop over images and pairs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.functional import match
from protoseg.modules import PublishedPrototypeRegularizer

D, K, L, B = 6, 4, 11, 3


def published_loop(mu: Tensor, tokens: Tensor, groups: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the published code computes, one image and pair at a time: prototypes, matches, loss."""
    prototypes, matches = [], []
    rows: dict[str, list[Tensor]] = {"groups": [], "prototypes": []}
    for x, g in zip(tokens, groups, strict=True):
        centers = mu
        for _ in range(10):
            shares = torch.stack([torch.softmax(torch.stack([token @ m for m in centers]), 0) for token in x])
            shares = shares / (1e-6 + shares.sum(0))
            centers = torch.stack([sum(s * t for s, t in zip(column, x, strict=True)) for column in shares.T])  # type: ignore[misc]
            centers = centers / (1e-6 + centers.norm(dim=axis, keepdim=True))
        cosines = torch.stack([torch.stack([F.cosine_similarity(a, p, dim=0) for p in centers]) for a in g])
        pairs = match(-cosines[None])[0]  # the least similar
        near = cosines[:, pairs]
        count = len(g)
        for name, table in (("prototypes", near), ("groups", near.T)):
            low, high = table.min(0).values[0], table.max(0).values[0]
            for i in range(count):
                if (table[i, 0] - low) / (high - low + 1e-6) > 0.1:
                    rows[name].append(-F.log_softmax(10 * table[:, i], 0)[i])
        prototypes.append(centers)
        matches.append(pairs)
    loss = torch.stack(rows["groups"]).mean() + torch.stack(rows["prototypes"]).mean()
    return torch.stack(prototypes), torch.stack(matches), loss


@pytest.mark.parametrize("dim", [D, 1], ids=["image", "text"])
def test_published_arithmetic_equals_a_loop(dim: int) -> None:
    module = PublishedPrototypeRegularizer(dim, K).double()
    torch.testing.assert_close(module.mu.norm(dim=0 if dim == 1 else 1), torch.ones(1 if dim == 1 else K).double())
    tokens, groups = torch.randn(B, L, dim).double(), torch.randn(B, K, dim).double()
    mu = module.mu.clone()
    out = module(tokens, groups)
    prototypes, matches, loss = published_loop(mu, tokens, groups, 0 if dim == 1 else 1)
    torch.testing.assert_close(out.prototypes, prototypes)
    if dim > 1:  # cosines of one channel are 1 and -1: many pairings are as good as the best
        assert torch.equal(out.match, matches)
        torch.testing.assert_close(out.loss, loss)
    moved = 0.9 * mu + 0.1 * prototypes.mean(0) if dim == 1 else mu
    torch.testing.assert_close(module.mu, moved)
