"""Grouping units: group tokens gather the tokens of a picture, each token going to one group."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from protoseg.utils.numeric import unit

LARGEST_COSINE_SCALE = 50.0


class Grouping(NamedTuple):
    """What a unit returns.

    Attributes:
        groups: ``[B, G, D]``, the tokens of the next stage.
        queries: ``[B, G, D]``, the group tokens that the assignment was made with; what prototypes are matched to.
        soft: ``[B, G, L]``, the share of each group in each token, sum 1 over ``G``, without noise.
        shares: ``[B, G, L]``, what the groups were made with: noisy or hard, as the unit does it.
    """

    groups: Tensor
    queries: Tensor
    soft: Tensor
    shares: Tensor


class TokenMixer(nn.Module):
    """A norm, then an MLP across tokens: ``[B, inputs, D]`` to ``[B, outputs, D]``."""

    def __init__(self, dim: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(dim), Mlp(inputs, dim // 2, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mixed tokens."""
        mixed: Tensor = self.mlp(self.norm(tokens).transpose(1, 2)).transpose(1, 2)
        return mixed


class CrossBlock(nn.Module):
    """Attention from queries to tokens and an MLP, with a norm before the MLP and one at the end (GroupViT).

    Shape:
        queries ``[B, G, D]`` and tokens ``[B, L, D]`` to ``[B, G, D]``.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.project = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_mlp, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Return the updated queries."""
        pairs = ((self.query, queries), (self.key, tokens), (self.value, tokens))
        q, k, v = (rearrange(layer(x), "b l (heads d) -> b heads l d", heads=self.heads) for layer, x in pairs)
        seen = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads l d -> b l (heads d)")
        queries = queries + self.project(seen)
        queries = queries + self.mlp(self.norm_mlp(queries))
        out: Tensor = self.norm_out(queries)
        return out


def straight_through(soft: Tensor, dim: int) -> Tensor:
    """One-hot of the largest along ``dim``, with the gradient of ``soft``."""
    hard = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
    return hard + soft - soft.detach()


class AttentionUnit(nn.Module):
    r"""The grouping unit of GroupViT (arXiv 2202.11094) and PGSeg: hard assignment by attention with Gumbel noise.

    Group tokens are mixed to the number of groups, attend to the tokens, and each token goes to the group with the
    largest :math:`q_g^T k_l / \sqrt{D}`, in training with Gumbel noise; straight through. A group is its query plus
    the projected mean of its tokens (over their number plus one, as in the published code), and an MLP.

    Args:
        dim: ``D``.
        heads: Of the attention before the assignment, which itself has one.
        tokens: Group tokens that come in.
        groups: ``G``, groups that go out.
    """

    def __init__(self, dim: int, heads: int, tokens: int, groups: int) -> None:
        super().__init__()
        self.mix = TokenMixer(dim, tokens, groups)
        self.norm_tokens, self.norm_mixed = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attend = CrossBlock(dim, heads)
        self.query, self.key, self.value, self.project = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_out = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, tokens: Tensor, group_tokens: Tensor) -> Grouping:
        """Group ``[B, L, D]`` by ``[B, G', D]``."""
        tokens = self.norm_tokens(tokens)
        queries = self.attend(self.norm_mixed(self.mix(group_tokens)), tokens)
        logits = self.query(queries) @ self.key(tokens).transpose(1, 2) * queries.shape[-1] ** -0.5
        logits = logits.float()  # a softmax in half precision loses groups
        soft = logits.softmax(1)
        shares = F.gumbel_softmax(logits, hard=True, dim=1) if self.training else straight_through(soft, 1)
        weights = (shares / (shares.sum(-1, keepdim=True) + 1.0)).to(tokens.dtype)
        groups = self.project(weights @ self.value(tokens)) + queries
        groups = groups + self.mlp(self.norm_out(groups))
        return Grouping(groups, queries, soft, shares)


class SlotUnit(nn.Module):
    """A grouping unit that learns from scratch on small pictures: cosine assignment, soft in training, hard in tests.

    Group tokens only attend to the tokens, never the other way round, so that no token carries what another saw. A
    group is its slot's own embedding plus the mean of its tokens, and an MLP.

    Args:
        dim: ``D``.
        heads: Of the attention before the assignment.
        groups: ``G``.
        scale: What the cosines are multiplied with before the softmax; learnt, at most 50.
    """

    def __init__(self, dim: int, heads: int, groups: int, scale: float = 10.0) -> None:
        super().__init__()
        self.norm_tokens, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attend = CrossBlock(dim, heads)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.slots = nn.Parameter(0.02 * torch.randn(groups, dim))
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, tokens: Tensor, group_tokens: Tensor) -> Grouping:
        """Group ``[B, L, D]`` by ``[B, G, D]``."""
        tokens = self.norm_tokens(tokens)
        queries = self.attend(group_tokens, tokens)
        cosines = unit(self.query(queries).float()) @ unit(self.key(tokens).float()).transpose(1, 2)
        soft = (cosines * self.log_scale.exp().clamp_max(LARGEST_COSINE_SCALE)).softmax(1)
        shares = soft if self.training else straight_through(soft, 1)
        weights = (shares / shares.sum(-1, keepdim=True).clamp_min(1e-6)).to(tokens.dtype)
        groups = self.slots + weights @ self.value(tokens)
        groups = groups + self.mlp(self.norm_out(groups))
        return Grouping(groups, queries, soft, shares)
