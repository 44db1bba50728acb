"""GMMPrototypeRegularizer: non-learnable prototypical regularization (PGSeg, arXiv 2310.19001)."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from protoseg.functional import Kernel, Matching, Mixture, em, match, own_similarity, symmetric_contrast
from protoseg.modules import gmm_published
from protoseg.utils import checks, distributed
from protoseg.utils.numeric import full_precision, unit

__all__ = ["Estimator", "GMMPrototypeRegularizer", "GroupPrototypes", "RejectOn"]

Estimator = Literal["gmm", "kmeans", "random"]
RejectOn = Literal["cosine", "minmax"]
LARGEST_SCALE = 100.0


class GroupPrototypes(NamedTuple):
    """What :class:`GMMPrototypeRegularizer` returns.

    Attributes:
        loss: ``[]``, the contrast of groups and prototypes; zero and connected to the graph where no pair is kept.
            float32 (float64 of float64 groups); other floating point tensors have the dtype of the group tokens.
        prototypes: ``[B, K, D]``, without gradient.
        responsibilities: ``[B, L, K]``, the share of each token in the prototypes; 0 for tokens left out.
        match: ``[B, G]`` int64, the prototype of each group; -1 = none left.
        similarity: ``[B, G]``, cosine of each group and its prototype; 0 where it has none.
        accepted: ``[B, G]`` bool, the pairs that the loss is made of.
        accept_rate: ``[]``, their share of all pairs.
        prototype_cosine: ``[]``, mean cosine of two prototypes of an image: 1 = all the same. NaN of one prototype.
    """

    loss: Tensor
    prototypes: Tensor
    responsibilities: Tensor
    match: Tensor
    similarity: Tensor
    accepted: Tensor
    accept_rate: Tensor
    prototype_cosine: Tensor


class GMMPrototypeRegularizer(nn.Module):
    r"""Pulls each group token to a prototype of its own, which EM finds in the tokens that are grouped.

    For tokens :math:`x_l` and group tokens :math:`g` of an image (section 4.1 of the paper):

    1. Prototypes: EM (:func:`protoseg.functional.em`), ``iterations`` rounds without gradient, from the shared
       :math:`\mu` of the buffer ``mu``.
    2. Matching: one-to-one, with the largest total cosine (:func:`protoseg.functional.match`).
    3. Rejection: a pair counts only where its own cosine exceeds :math:`\phi`.
    4. Loss: :func:`protoseg.functional.symmetric_contrast` of the pairs that are left, with temperature :math:`t`.

    In ``train()`` the buffer then moves: :math:`\mu \leftarrow \gamma \mu + (1 - \gamma) \bar\mu` with the mean
    prototypes over the images of all ranks, and back to unit length.

    The gradient reaches the group tokens and the temperature; the tokens only with ``detach_tokens=False``. The same
    class serves image tokens and word tokens, the latter projected to ``dim``, with a ``token_mask`` for the padding.

    Deviations from the published code, each of which ``compat="pgseg-repo"`` undoes:

    - its matching minimizes the total cosine;
    - its rejection tests the min-max normalized cosine of every group to prototype 0, not to its own, and so takes the
      wrong pairs; where all are rejected its loss is NaN;
    - its candidates are the matched prototypes, in the groups' order, so that it contrasts as many as there are groups;
    - its loss is one mean over the kept pairs of the batch, here it is one per image, then over the images;
    - its shared :math:`\mu` never moves for images, and for words moves in evaluation too;
    - its bandwidth is 1 whatever the scale of the tokens. On tokens of unit length all prototypes then become one;
      here ``bandwidth`` is in units of the tokens' own scale, and the output says how alike the prototypes are;
    - it reduces words to one channel of a sentence (``dim=1``), whose "unit length" runs over the prototypes.

    Args:
        dim: ``D``, channels of tokens and group tokens.
        num_prototypes: ``K``. As many as groups suits one-to-one matching; more and fewer work.
        iterations: Rounds of EM, 10 in the paper.
        kernel: Similarity of EM: ``"dot"`` (the paper's choice), ``"gaussian"`` or ``"cosine"``.
        bandwidth: Of the kernel, above 0, in units of the mean length of the image's tokens (``"dot"``), of its
            square (``"gaussian"``), or as it is (``"cosine"``). Not in the paper; 0.1 keeps prototypes apart.
        momentum: :math:`\gamma` in ``[0, 1]``, 0.9 in the published code.
        reject_threshold: :math:`\phi`, 0.1 in the paper.
        reject_on: What has to exceed it: ``"cosine"``, the pair's own cosine; ``"minmax"``, the same, normalized to
            0..1 over the image's groups for each prototype. The paper does not say which.
        temperature: :math:`t` above 0, 0.1 in the published code.
        learnable_temperature: Train its logarithm, at most 100 for :math:`1/t`, as the published code does.
        estimator: ``"gmm"``; to compare with: ``"kmeans"`` (hard shares) and ``"random"`` (K random tokens).
        matching: ``"hungarian"``; to compare with: ``"greedy"`` and ``"none"`` (each group its best prototype).
        detach_tokens: Keep the gradient from the tokens, as the paper does. False lets it through the last M-step, the
            shares being constant: for tokens that come out of a projection which nothing else would train.
        compat: ``"pgseg-repo"`` for the published arithmetic, error by error, to continue released weights; the
            options of kernel, bandwidth, rejection, estimator and matching do not count then, and ``K`` must equal
            ``G``.
        check_values: Whether to look for NaN and infinity, which waits for the device. By default on the CPU only;
            never while compiling. Prototypes that are not finite never move the buffer.
        device: Where the state lives.

    Shape:
        - tokens: ``[B, L, D]``
        - group_tokens: ``[B, G, D]``
        - token_mask: ``[B, L]`` bool, the tokens that count; all where not given
        - output: :class:`GroupPrototypes`

    Raises:
        ValueError: Sizes or options out of range, wrong shapes or devices, values that are not finite.
        TypeError: Something is no tensor or not floating point.
        RuntimeError: A ``state_dict`` of another size.

    Example:
        >>> regularizer = GMMPrototypeRegularizer(dim=16, num_prototypes=4)
        >>> tokens, groups = torch.randn(2, 49, 16), torch.randn(2, 4, 16, requires_grad=True)
        >>> out = regularizer(tokens, groups)
        >>> out.loss.backward()
        >>> out.prototypes.shape, out.match.sort().values.tolist()
        (torch.Size([2, 4, 16]), [[0, 1, 2, 3], [0, 1, 2, 3]])
    """

    mu: Tensor

    def __init__(
        self,
        dim: int,
        num_prototypes: int,
        *,
        iterations: int = 10,
        kernel: Kernel = "dot",
        bandwidth: float = 0.1,
        momentum: float = 0.9,
        reject_threshold: float = 0.1,
        reject_on: RejectOn = "cosine",
        temperature: float = 0.1,
        learnable_temperature: bool = True,
        estimator: Estimator = "gmm",
        matching: Matching = "hungarian",
        detach_tokens: bool = True,
        compat: Literal["pgseg-repo"] | None = None,
        check_values: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        me = type(self).__name__
        for name, value in {
            "dim": dim,
            "num_prototypes": num_prototypes,
            "iterations": iterations,
            "bandwidth": bandwidth,
            "temperature": temperature,
        }.items():
            checks.positive(me, name, value)
        checks.unit_interval(me, "momentum", momentum)
        checks.choice(me, "kernel", kernel, get_args(Kernel))
        checks.choice(me, "reject_on", reject_on, get_args(RejectOn))
        checks.choice(me, "estimator", estimator, get_args(Estimator))
        checks.choice(me, "matching", matching, get_args(Matching))
        if compat is not None:
            checks.choice(me, "compat", compat, ("pgseg-repo",))
        self.dim, self.num_prototypes, self.iterations = dim, num_prototypes, iterations
        self.kernel: Kernel = kernel
        self.bandwidth, self.momentum = bandwidth, momentum
        self.reject_threshold = reject_threshold
        self.reject_on: RejectOn = reject_on
        self.temperature = temperature
        self.estimator: Estimator = estimator
        self.matching: Matching = matching
        self.detach_tokens = detach_tokens
        self.compat, self.check_values = compat, check_values
        self.log_scale = nn.Parameter(torch.zeros((), device=device), requires_grad=learnable_temperature)
        self.register_buffer("mu", torch.empty(num_prototypes, dim, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the shared prototypes anew and set the temperature back."""
        with torch.no_grad():
            self.log_scale.fill_(-math.log(self.temperature))
            self.mu.normal_()
            # Of one channel the published code scales the prototypes together.
            self.mu.copy_(unit(self.mu, 0 if self.compat and self.dim == 1 else -1))

    def forward(self, tokens: Tensor, group_tokens: Tensor, token_mask: Tensor | None = None) -> GroupPrototypes:
        """Compute prototypes, matches and loss; in ``train()`` then move ``mu``. See the class for shapes, errors."""
        self._check(tokens, group_tokens, token_mask)
        with torch.autocast(group_tokens.device.type, enabled=False):
            return self._forward(tokens, group_tokens, token_mask)

    def _forward(self, tokens: Tensor, group_tokens: Tensor, mask: Tensor | None) -> GroupPrototypes:
        dtype = group_tokens.dtype
        groups = full_precision(group_tokens)
        scale = self.log_scale.to(groups.dtype).exp().clamp_max(LARGEST_SCALE)
        tokens = tokens.to(groups.dtype)
        prototypes, responsibilities = self.estimate(tokens, mask)
        # All but those of the gaussian kernel are directions already.
        directions = unit(prototypes) if self.kernel == "gaussian" or self.compat is not None else prototypes
        if not self.detach_tokens and self.compat is None:
            kept = tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
            sums = responsibilities.transpose(1, 2) @ (unit(kept) if self.kernel == "cosine" else kept)
            directions = torch.where((responsibilities > 0).any(1).unsqueeze(-1), unit(sums), directions)
        known = prototypes.new_ones(len(prototypes), dtype=torch.bool) if mask is None else mask.any(1)
        if self.compat is None:
            # Divided after the product, which is smaller than the groups.
            length = torch.linalg.vector_norm(groups, dim=-1, keepdim=True)
            length = torch.where(length > 1e-12, length, torch.ones_like(length))
            similarity = groups @ directions.transpose(1, 2) / length
            matched = match(similarity, self.matching)
            own = own_similarity(similarity, matched)
            accepted = self._accept(similarity.detach(), matched) & known.unsqueeze(1)
            loss = symmetric_contrast(similarity, matched, accepted, scale)
        else:
            # In the published order, to the last bit: prototypes that are all the same leave the matching to rounding.
            similarity = unit(groups) @ directions.transpose(1, 2)
            matched = match(-similarity)
            own = own_similarity(similarity, matched)
            loss, accepted = gmm_published.contrast(similarity, matched, scale, self.reject_threshold)
        if self.training and (self.compat is None or self.dim == 1):
            self._move(prototypes, known)
        pairs = ((matched >= 0) & known.unsqueeze(1)).sum().clamp_min(1)
        return GroupPrototypes(
            loss=loss,
            prototypes=prototypes.to(dtype),
            responsibilities=responsibilities.to(dtype),
            match=matched,
            similarity=own.to(dtype),
            accepted=accepted,
            accept_rate=(accepted.sum() / pairs).to(dtype),
            prototype_cosine=_mean_cosine(directions.detach(), known).to(dtype),
        )

    @torch.no_grad()
    def estimate(self, tokens: Tensor, mask: Tensor | None = None) -> Mixture:
        """Find the prototypes of tokens ``[B, L, D]``, without matching and without changing anything."""
        start = self.mu.to(tokens.dtype)
        if self.compat is not None:
            return gmm_published.em(tokens, start, self.iterations)
        if self.estimator == "random":
            return _random_tokens(tokens, mask, start)
        if mask is not None:
            tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
        bandwidth: float | Tensor = self.bandwidth
        if self.kernel != "cosine":
            count = tokens.shape[1] if mask is None else mask.sum(1).clamp_min(1)
            length = (torch.linalg.vector_norm(tokens, dim=-1).sum(1) / count).clamp_min(1e-6)
            bandwidth = bandwidth * length
            if self.kernel == "gaussian":  # its means are not directions: they start at the tokens' length
                bandwidth, start = bandwidth * length, start * length[:, None, None]
        options: dict[str, Any] = {"iterations": self.iterations, "kernel": self.kernel, "bandwidth": bandwidth}
        return em(tokens, start, mask, hard=self.estimator == "kmeans", **options)

    def _accept(self, similarity: Tensor, matched: Tensor) -> Tensor:
        if self.reject_on == "minmax":
            low, high = similarity.amin(1, keepdim=True), similarity.amax(1, keepdim=True)
            similarity = (similarity - low) / (high - low).clamp_min(1e-6)
        return (own_similarity(similarity, matched) > self.reject_threshold) & (matched >= 0)

    @torch.no_grad()
    def _move(self, prototypes: Tensor, known: Tensor) -> None:
        # A sum is finite only where every value is, and of directions it does not overflow.
        usable = known & prototypes.sum((1, 2)).isfinite()
        total = torch.where(usable[:, None, None], prototypes, 0.0).sum(0).to(self.mu.dtype)
        move(self.mu, total, usable.sum().to(self.mu.dtype), self.momentum, self.compat is None)

    def extra_repr(self) -> str:
        """Sizes and modes, as in the constructor."""
        compat = f", compat={self.compat!r}" if self.compat else ""
        return (
            f"dim={self.dim}, num_prototypes={self.num_prototypes}, iterations={self.iterations}, "
            f"kernel={self.kernel!r}, bandwidth={self.bandwidth}, estimator={self.estimator!r}, "
            f"matching={self.matching!r}, reject_threshold={self.reject_threshold}{compat}"
        )

    def _check(self, tokens: Tensor, group_tokens: Tensor, mask: Tensor | None) -> None:
        me = type(self).__name__
        remedy = "construct the regularizer with dim = the channels of the tokens, and project words to it"
        checks.shape(me, "tokens", tokens, ("B", "L", self.dim), remedy)
        checks.shape(me, "group_tokens", group_tokens, (len(tokens), "G", self.dim), remedy)
        for name, value in (("tokens", tokens), ("group_tokens", group_tokens)):
            checks.floating(me, name, value)
            checks.not_empty(me, name, value)
            checks.device(me, name, value, self.mu.device)
        if mask is not None:
            checks.shape(me, "token_mask", mask, tokens.shape[:2], "True where a token counts")
            checks.device(me, "token_mask", mask, self.mu.device)
            if mask.dtype != torch.bool:
                raise TypeError(f"{me}: token_mask must be bool, got {mask.dtype}; True where a token counts")
        if self.compat is not None:
            if mask is not None:
                raise ValueError(f"{me}: the published code knows no token_mask; leave it out or leave compat out")
            if group_tokens.shape[1] != self.num_prototypes:
                raise ValueError(
                    f'{me}: compat="pgseg-repo" needs as many groups as prototypes ({self.num_prototypes}), got '
                    f"{group_tokens.shape[1]}"
                )
        wanted = tokens.device.type == "cpu" if self.check_values is None else self.check_values
        if wanted and not torch.compiler.is_compiling():
            checks.finite(me, "tokens", tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0.0))
            checks.finite(me, "group_tokens", group_tokens)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        theirs = state_dict.get(prefix + "mu")
        if theirs is not None and theirs.shape != self.mu.shape:
            raise RuntimeError(
                f"{type(self).__name__}: the state_dict's mu is {tuple(theirs.shape)} and this module's is "
                f"{tuple(self.mu.shape)}, as (num_prototypes, dim); construct the module with the checkpoint's sizes"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.library.custom_op("protoseg::move_average", mutates_args=("mu",))
def move(mu: Tensor, total: Tensor, count: Tensor, momentum: float, normalize: bool) -> None:
    """Move the shared prototypes towards the mean over the images of all ranks; without an image they stay.

    Args:
        mu: ``[K, D]``.
        total: ``[K, D]``, the sum of this rank's prototypes.
        count: ``[]``, over how many images.
        momentum: Share of the old.
        normalize: Scale the result to unit length.
    """
    total = distributed.all_gather(total.unsqueeze(0)).sum(0)
    count = distributed.all_gather(count.reshape(1)).sum()
    moved = momentum * mu + (1 - momentum) * total / count.clamp_min(1.0)
    mu.copy_(torch.where(count > 0, unit(moved) if normalize else moved, mu))


@move.register_fake
def _(mu: Tensor, total: Tensor, count: Tensor, momentum: float, normalize: bool) -> None:
    return None


def _random_tokens(tokens: Tensor, mask: Tensor | None, start: Tensor) -> Mixture:
    """Random tokens of each image as prototypes, again from the first where there are too few."""
    batch, length, dim = tokens.shape
    draws = torch.rand(batch, length, device=tokens.device)
    if mask is not None:
        draws = draws.masked_fill(~mask, -1.0)
    number = torch.full((batch, 1), length, device=tokens.device) if mask is None else mask.sum(1, keepdim=True)
    places = torch.arange(len(start), device=tokens.device) % number.clamp_min(1)
    chosen = draws.argsort(1, descending=True).gather(1, places)
    prototypes = unit(tokens.gather(1, chosen.unsqueeze(-1).expand(-1, -1, dim)))
    prototypes = torch.where((number > 0).unsqueeze(-1), prototypes, start)
    scores = tokens @ prototypes.transpose(1, 2)
    shares = torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
    return Mixture(prototypes, shares if mask is None else shares * mask.unsqueeze(-1))


def _mean_cosine(directions: Tensor, known: Tensor) -> Tensor:
    """Mean cosine of two prototypes of an image, which have unit length."""
    count = directions.shape[1]
    pairs = directions.sum(1).square().sum(-1) - directions.square().sum((1, 2))
    # 0 / 0: of one prototype, or of no image, nobody knows.
    return (pairs * known).sum() / (known.sum() * count * (count - 1))
