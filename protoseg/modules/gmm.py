"""GMMPrototypeRegularizer: non-learnable prototypical regularization (PGSeg, arXiv 2310.19001)."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from protoseg.functional import (
    Kernel,
    Matching,
    Mixture,
    em,
    match,
    own_similarity,
    symmetric_contrast,
)
from protoseg.modules.base import PrototypeModule, computed_again
from protoseg.utils import checks, distributed
from protoseg.utils.numeric import full_precision, no_autocast, unit

__all__ = ["Estimator", "GMMPrototypeRegularizer", "GroupPrototypes", "RejectOn"]

Estimator = Literal["gmm", "kmeans", "random"]
RejectOn = Literal["cosine", "minmax"]
LARGEST_SCALE = 100.0
PATIENCE = 100  # passes without an accepted pair before a warning


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


class GMMPrototypeRegularizer(PrototypeModule):
    r"""Pulls each group token to a prototype of its own, which EM finds in the tokens that are grouped.

    For tokens :math:`x_l` and group tokens :math:`g` of an image (section 4.1 of the paper):

    1. Prototypes: EM (:func:`protoseg.functional.em`), ``iterations`` rounds without gradient, from the shared
       :math:`\mu` of the buffer ``mu``.
    2. Matching: one-to-one, with the largest total cosine (:func:`protoseg.functional.match`).
    3. Rejection: a pair counts only where its own cosine exceeds :math:`\phi`.
    4. Loss: :func:`protoseg.functional.symmetric_contrast` of the pairs that are left, with temperature :math:`t`.

    In ``train()`` the buffer then moves: :math:`\mu \leftarrow \gamma \mu + (1 - \gamma) \bar\mu` with the mean
    prototypes over the images of all ranks, and back to unit length.

    In a process group all ranks share one :math:`\mu` and one temperature, those of rank 0 at the first pass, whether
    the module is inside ``DistributedDataParallel`` or beside it.

    The gradient reaches the group tokens and the temperature; the tokens only with ``detach_tokens=False``. The same
    class serves image tokens and word tokens, the latter projected to ``dim``, with a ``token_mask`` for the padding.

    Deviations from the published code, each of which :class:`protoseg.modules.PublishedPrototypeRegularizer` undoes:

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
        learnable_temperature: Train its logarithm, at most 100 for :math:`1/t`, as the published code does. Leave the
            parameter ``log_scale`` out of weight decay: AdamW's default takes :math:`1/t` from 10 to 8 in 2000 steps.
        estimator: ``"gmm"``; to compare with: ``"kmeans"`` (hard shares) and ``"random"`` (K random tokens).
        matching: ``"hungarian"``; to compare with: ``"greedy"`` and ``"none"`` (each group its best prototype).
        detach_tokens: Keep the gradient from the tokens, as the paper does. False lets it through the last M-step, the
            shares being constant: for tokens that come out of a projection which nothing else would train.
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
        check_values: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(check_values)
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

        self.iterations = iterations
        self.kernel: Kernel = kernel
        self.bandwidth = bandwidth
        self.momentum = momentum
        self.reject_threshold = reject_threshold
        self.reject_on: RejectOn = reject_on
        self.temperature = temperature
        self.estimator: Estimator = estimator
        self.matching: Matching = matching
        self.detach_tokens = detach_tokens
        self._agreed = False
        self._rejected = 0  # passes in a row in which no pair was accepted
        self.log_scale = nn.Parameter(torch.zeros((), device=device), requires_grad=learnable_temperature)
        self.register_buffer("mu", torch.empty(num_prototypes, dim, device=device))
        self.reset_parameters()

    @property
    def num_prototypes(self) -> int:
        """``K``."""
        return self.mu.shape[0]

    @property
    def dim(self) -> int:
        """``D``."""
        return self.mu.shape[1]

    def reset_parameters(self) -> None:
        """Draw the shared prototypes anew and set the temperature back."""
        with torch.no_grad():
            self.log_scale.fill_(-math.log(self.temperature))
            self.mu.normal_()
            self.mu.copy_(unit(self.mu))

    def forward(self, tokens: Tensor, group_tokens: Tensor, token_mask: Tensor | None = None) -> GroupPrototypes:
        """Compute prototypes, matches and loss; in ``train()`` then move ``mu``. See the class for shapes, errors."""
        self._check(tokens, group_tokens, token_mask)
        if self.training:
            self._agree()
        inputs = (tokens, group_tokens)
        again = self.training and computed_again()
        mu = self._passes.recall(type(self).__name__, inputs) if again else self.mu.clone()

        with no_autocast(group_tokens.device):
            out, known = self._steps(tokens, group_tokens, token_mask, mu)
            if self.training and not again:
                self._passes.keep(inputs, mu)
                self._move(out.prototypes, known)
                self._tell_rejection(out.accepted)
        dtype = group_tokens.dtype
        return out._replace(
            prototypes=out.prototypes.to(dtype),
            responsibilities=out.responsibilities.to(dtype),
            similarity=out.similarity.to(dtype),
            accept_rate=out.accept_rate.to(dtype),
            prototype_cosine=out.prototype_cosine.to(dtype),
        )

    def _steps(
        self, tokens: Tensor, group_tokens: Tensor, mask: Tensor | None, mu: Tensor
    ) -> tuple[GroupPrototypes, Tensor]:
        """The output in full precision, and the images that have a token ``[B]``."""
        groups = full_precision(group_tokens)
        tokens = tokens.to(groups.dtype)
        known = groups.new_ones(len(groups), dtype=torch.bool) if mask is None else mask.any(1)

        # 1. Prototypes, and their directions.
        prototypes, responsibilities = self._estimate(tokens, mask, mu)
        directions = self._directions(prototypes, responsibilities, tokens, mask)

        # 2 to 4. Matching, rejection, loss.
        scale = distributed.mean_gradient(self.log_scale).to(groups.dtype).exp().clamp_max(LARGEST_SCALE)
        loss, similarity, matched, accepted = self._contrast(groups, directions, known, scale)

        pairs = ((matched >= 0) & known.unsqueeze(1)).sum().clamp_min(1)
        out = GroupPrototypes(
            loss=loss,
            prototypes=prototypes,
            responsibilities=responsibilities,
            match=matched,
            similarity=own_similarity(similarity, matched),
            accepted=accepted,
            accept_rate=accepted.sum() / pairs,
            prototype_cosine=_mean_cosine(directions.detach(), known),
        )
        return out, known

    @torch.no_grad()
    def estimate(self, tokens: Tensor, mask: Tensor | None = None) -> Mixture:
        """Find the prototypes of tokens ``[B, L, D]``, without matching and without changing anything."""
        return self._estimate(tokens, mask, self.mu)

    @torch.no_grad()
    def _estimate(self, tokens: Tensor, mask: Tensor | None, mu: Tensor) -> Mixture:
        """Step 1 from the start ``mu``."""
        start = mu.to(tokens.dtype)
        if self.estimator == "random":
            return _random_tokens(tokens, mask, start)
        if mask is not None:
            tokens = tokens.masked_fill(~mask.unsqueeze(-1), 0.0)

        # The bandwidth is in units of the tokens' own length.
        bandwidth: float | Tensor = self.bandwidth
        if self.kernel != "cosine":
            count = tokens.shape[1] if mask is None else mask.sum(1).clamp_min(1)
            length = (torch.linalg.vector_norm(tokens, dim=-1).sum(1) / count).clamp_min(1e-6)
            bandwidth = bandwidth * length
            if self.kernel == "gaussian":
                # Its means are not directions: they start at the tokens' length.
                bandwidth = bandwidth * length
                start = start * length[:, None, None]

        hard = self.estimator == "kmeans"
        return em(tokens, start, mask, iterations=self.iterations, kernel=self.kernel, bandwidth=bandwidth, hard=hard)

    def _directions(self, prototypes: Tensor, responsibilities: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Prototypes of unit length; those of EM, but for the gaussian kernel, have it already."""
        directions = prototypes
        if self.kernel == "gaussian":
            directions = unit(prototypes)
        if self.detach_tokens:
            return directions

        # The last M-step once more, with a gradient to the tokens.
        kept = tokens if mask is None else tokens.masked_fill(~mask.unsqueeze(-1), 0.0)
        if self.kernel == "cosine":
            kept = unit(kept)
        sums = responsibilities.transpose(1, 2) @ kept
        served = (responsibilities > 0).any(1).unsqueeze(-1)
        return torch.where(served, unit(sums), directions)

    def _contrast(
        self, groups: Tensor, directions: Tensor, known: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Steps 2 to 4: loss, similarity ``[B, G, K]``, matches ``[B, G]`` and accepted pairs ``[B, G]``."""
        # Divided after the product, which is smaller than the groups.
        length = torch.linalg.vector_norm(groups, dim=-1, keepdim=True)
        length = torch.where(length > 1e-12, length, torch.ones_like(length))
        similarity = groups @ directions.transpose(1, 2) / length

        matched = match(similarity, self.matching)
        accepted = self._accept(similarity.detach(), matched) & known.unsqueeze(1)
        return symmetric_contrast(similarity, matched, accepted, scale), similarity, matched, accepted

    def _accept(self, similarity: Tensor, matched: Tensor) -> Tensor:
        """Step 3."""
        if self.reject_on == "minmax":
            low, high = similarity.amin(1, keepdim=True), similarity.amax(1, keepdim=True)
            similarity = (similarity - low) / (high - low).clamp_min(1e-6)
        return (own_similarity(similarity, matched) > self.reject_threshold) & (matched >= 0)

    @torch.no_grad()
    def _move(self, prototypes: Tensor, known: Tensor) -> None:
        """Move ``mu`` towards the mean prototypes of all ranks, and back to unit length."""
        total, count = self._arrivals(prototypes, known)
        move(self.mu, total, count, self.momentum, True)

    def _arrivals(self, prototypes: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the prototypes of all images that are finite, and how many they are."""
        # A sum is finite only where every value is, and of directions it does not overflow.
        usable = known & prototypes.sum((1, 2)).isfinite()
        total = torch.where(usable[:, None, None], prototypes, 0.0).sum(0)
        return total.to(self.mu.dtype), usable.sum().to(self.mu.dtype)

    @torch.no_grad()
    def _agree(self) -> None:
        """Take the state of rank 0, once: ranks may have drawn different ones."""
        if self._agreed or torch.compiler.is_compiling() or distributed.world_size() == 1:
            return
        distributed.broadcast(self.mu)
        distributed.broadcast(self.log_scale)
        self._agreed = True

    def _tell_rejection(self, accepted: Tensor) -> None:
        """Warn where no pair has been accepted for long: then nothing is trained."""
        if not self._looks_at_values(accepted):
            return
        self._rejected = 0 if bool(accepted.any()) else self._rejected + 1
        if self._rejected == PATIENCE:
            warnings.warn(
                f"{type(self).__name__}: no pair was accepted in {PATIENCE} passes, so that the loss trains nothing; "
                f"lower reject_threshold={self.reject_threshold}, or look whether groups and tokens are of one space",
                stacklevel=3,
            )

    def extra_repr(self) -> str:
        """Sizes and modes, as in the constructor."""
        return (
            f"dim={self.dim}, num_prototypes={self.num_prototypes}, iterations={self.iterations}, "
            f"kernel={self.kernel!r}, bandwidth={self.bandwidth}, estimator={self.estimator!r}, "
            f"matching={self.matching!r}, reject_threshold={self.reject_threshold}"
        )

    def _check(self, tokens: Tensor, group_tokens: Tensor, mask: Tensor | None) -> None:
        me = type(self).__name__
        remedy = "construct the regularizer with dim = the channels of the tokens, and project words to it"
        checks.shape(me, "tokens", tokens, ("B", "L", self.dim), remedy)
        checks.shape(me, "group_tokens", group_tokens, (len(tokens), "G", self.dim), remedy)
        for name, value in (("tokens", tokens), ("group_tokens", group_tokens)):
            checks.floating(me, name, value)
            checks.not_empty(me, name, value)
        if mask is not None:
            checks.shape(me, "token_mask", mask, tokens.shape[:2], "True where a token counts")
            checks.boolean(me, "token_mask", mask)
        self._same_device(self.mu.device, tokens=tokens, group_tokens=group_tokens, token_mask=mask)
        if self._looks_at_values(tokens):
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
