"""VisionPrototypeLearner: prototypes of classes in CLIP's vision space (VPL, arXiv 2412.19650)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.modules.base import PrototypeModule
from protoseg.utils import checks, distributed
from protoseg.utils.numeric import block_size, full_precision, no_autocast, summing_dtype, unit

__all__ = ["Fit", "VisionPrototypeLearner", "VisionPrototypes"]


class VisionPrototypes(NamedTuple):
    """What :class:`VisionPrototypeLearner` returns.

    Attributes:
        loss: ``[]``, the mean KL over the images that have a tag; zero and connected to the graph where none has.
        target: ``[n, C]``, what the text prototypes say, without gradient; sum 1, or 0 for an image without tags.
        probabilities: ``[n, C]``, what the vision prototypes say; sum 1.
    """

    loss: Tensor
    target: Tensor
    probabilities: Tensor


class Fit(NamedTuple):
    """How :meth:`VisionPrototypeLearner.fit` went.

    Attributes:
        start: Mean KL with the text prototypes as vision prototypes, in nats.
        end: Mean KL of the result.
        iterations: Steps of L-BFGS.
        evaluations: Passes over the features.
        images: Images that count, of all processes: those that have a tag.
    """

    start: float
    end: float
    iterations: int
    evaluations: int
    images: int


class VisionPrototypeLearner(PrototypeModule):
    r"""Learns a prototype per class in vision space that says of pictures what the class's text says.

    CLIP's texts and pictures lie apart, so that a text prototype :math:`t_c` is a poor center of a class's pictures.
    For unit features :math:`x_i` of pictures, vision prototypes :math:`v_c` on the unit sphere minimize (VPL, phase 1)

    .. math::
        \frac{1}{n} \sum_i \mathrm{KL}(P_i \,\|\, Q_i), \quad
        P_{ic} \propto y_{ic} \exp(\langle x_i, t_c \rangle / \tau_T), \quad
        Q_{ic} = \mathrm{softmax}_c(\langle x_i, v_c \rangle / \tau_I)

    with the picture's tags :math:`y_i`, all 1 where they are not known, and :math:`\tau_I > \tau_T`: the flatter
    :math:`Q` has to move its prototypes towards the pictures to be as sure as :math:`P`. Without tags and with
    :math:`\tau_I = \tau_T` the text prototypes are the optimum.

    :meth:`fit` finds the optimum for features that are all at hand; the call computes the same loss for a batch, to
    train ``vision`` with an optimizer; under DDP the mean over the ranks is the loss of the whole batch. In a process
    group :meth:`fit` counts the features of all ranks.

    The softmax does not see what all prototypes share, and the optimum has next to none of it. Where :math:`Q` is sure
    of nearly all pictures, the optimum rests on the few others and strays from what the pictures of a class have in
    common; higher temperatures keep it there (measured in ``benchmarks/results/speed-fit.md``).

    Not stated in the paper: the direction of the KL (here that of InMaP, its relative), the optimizer (here L-BFGS to a
    tolerance; InMaP takes 2000 steps of projected gradient), balancing, and what tags restrict. 0.01 and 0.03 suit
    OpenAI's CLIP alone; with another network give its own temperature, ``1 / logit_scale.exp()``, and two to three
    times that.

    Args:
        text_prototypes: ``[C, D]`` of any length above 0, one per class.
        text_temperature: :math:`\tau_T` above 0.
        vision_temperature: :math:`\tau_I` above 0; 0.03 in the paper.
        balance: Rounds of Sinkhorn in :meth:`fit` that give all classes their fair share of :math:`P`: the same for
            each, or with tags what their pictures would give if all tags of a picture shared it evenly. 20 in InMaP.
        check_values: Whether a call looks for features that are not of unit length and labels other than 0 and 1, which
            waits for the device. By default on the CPU only; never while compiling. :meth:`fit` always does.

    Shape:
        - features: ``[n, D]``, of unit length
        - labels: ``[n, C]``, 1 = the class is in the picture
        - output: :class:`VisionPrototypes`

    Raises:
        ValueError: Wrong shapes or sizes, features that are not of unit length, labels that are not 0 and 1, NaN.
        TypeError: Features are not floating point.

    Example:
        >>> text = torch.eye(3)[:2] + torch.tensor([0.0, 0.0, 3.0])  # the gap between texts and pictures
        >>> tags = torch.eye(2).repeat(8, 1)
        >>> pictures = torch.nn.functional.normalize(torch.eye(3)[:2].repeat(8, 1) + 0.1, dim=-1)
        >>> learner = VisionPrototypeLearner(text, text_temperature=0.1, vision_temperature=0.2).fit(pictures, tags)
        >>> (learner.prototypes @ pictures[0]).argmax().item(), learner.last_fit.end < learner.last_fit.start
        (0, True)
    """

    text: Tensor

    def __init__(
        self,
        text_prototypes: Tensor,
        *,
        text_temperature: float = 0.01,
        vision_temperature: float = 0.03,
        balance: int = 0,
        check_values: bool | None = None,
    ) -> None:
        super().__init__(check_values)
        me = type(self).__name__
        checks.shape(me, "text_prototypes", text_prototypes, ("C", "D"))
        checks.floating(me, "text_prototypes", text_prototypes)
        checks.not_empty(me, "text_prototypes", text_prototypes)
        if not text_prototypes.is_meta:
            checks.finite(me, "text_prototypes", text_prototypes)
            if not bool((text_prototypes != 0).any(-1).all()):
                raise ValueError(f"{me}: every text prototype needs a direction, and one is 0")
        checks.positive(me, "text_temperature", text_temperature)
        checks.positive(me, "vision_temperature", vision_temperature)
        checks.between(me, "balance", balance, 0)

        self.text_temperature = text_temperature
        self.vision_temperature = vision_temperature
        self.balance = balance
        self.register_buffer("text", unit(full_precision(text_prototypes.detach())).clone())
        self.vision = nn.Parameter(self.text.clone())
        self.last_fit: Fit | None = None

    @property
    def prototypes(self) -> Tensor:
        """The vision prototypes, ``[C, D]``, of unit length, without gradient; the call's loss trains ``vision``."""
        return unit(self.vision.detach())

    @property
    def centered_text(self) -> Tensor:
        """The text prototypes without their mean, ``[C, D]``, of unit length: what any gain has to be compared with."""
        return unit(self.text - self.text.mean(0))

    def forward(self, features: Tensor, labels: Tensor | None = None) -> VisionPrototypes:
        """Compute the loss of a batch. See the class for shapes and errors."""
        self._check(features, labels)
        self._same_device(self.text.device, features=features, labels=labels)
        if self._looks_at_values(features):
            self._check_values(features, labels)
        with no_autocast(features.device):
            text, vision = full_precision(self.text), full_precision(self.vision)
            features = features.to(text.dtype)

            target = self._target(features, text, labels)
            log_q = (features @ unit(vision).T / self.vision_temperature).log_softmax(-1)

            # Divided by the images of all ranks, so that the mean over the ranks is the loss of the whole batch.
            count = distributed.all_sum((target > 0).any(-1).sum()).clamp_min(1)
            loss = F.kl_div(log_q, target, reduction="none").sum() * distributed.world_size() / count
            return VisionPrototypes(loss, target, log_q.exp())

    @torch.no_grad()
    def fit(
        self, features: Tensor, labels: Tensor | None = None, *, tolerance: float = 1e-7, max_iterations: int = 1000
    ) -> VisionPrototypeLearner:
        """Find the best vision prototypes for features that are all at hand, from where ``vision`` is.

        L-BFGS with a line search on the sphere. Beside the features it holds one table of images and classes.

        Args:
            features: ``[n, D]`` of unit length, of this process; they may be in half precision.
            labels: ``[n, C]``, 1 = the class is in the picture; an image without any does not count.
            tolerance: It stops when no part of the gradient is larger, or when a step changes the mean KL, or each
                part of the prototypes, by less than a hundredth of it.
            max_iterations: It warns when it stops for this reason.

        Returns:
            The learner itself; ``last_fit`` says how it went.

        Raises:
            ValueError: As of the class, or no image has a tag.
            RuntimeWarning: As a warning: the tolerance was not reached.
        """
        self._agree_on_errors(features, labels)
        with no_autocast(features.device):
            text = full_precision(self.text)
            target = text.new_empty(len(features), len(text))
            for some in _slices(features, target.device):
                tags = None if labels is None else labels[some].to(target.device)
                target[some] = self._target(features[some].to(target.device), text, tags)
            if self.balance:
                _sinkhorn(target, labels, self.balance)
            images = int(distributed.all_sum((target > 0).any(-1).sum()))
            if images == 0:
                raise ValueError(f"{type(self).__name__}: no image has a tag; without labels all images count")

            # On the sphere from the start: the slope of a long vector is too small for the tolerance.
            objective = _Objective(self.vision_temperature, features, target, images)
            start = objective(text.clone())[0]
            vision = nn.Parameter(_on_the_sphere(full_precision(self.vision.detach())))
            iterations = _minimize(vision, objective, tolerance, max_iterations)
            found = unit(vision.detach())
            end = objective(found)[0]
            self.vision.copy_(found)
        self.last_fit = Fit(start, end, iterations, objective.calls, images)
        return self

    def _agree_on_errors(self, features: Tensor, labels: Tensor | None) -> None:
        """Raise on every rank where one of them was given something wrong; the others would wait for it for ever."""
        mine: Exception | None = None
        try:
            self._check(features, labels)
            self._check_values(features, labels)
        except (TypeError, ValueError) as error:
            mine = error
        wrong = distributed.all_sum(torch.tensor(float(mine is not None), device=self.text.device))
        if mine is not None:
            raise mine
        if wrong > 0:
            raise ValueError(f"{type(self).__name__}: another process of the group was given wrong features or labels")

    def extra_repr(self) -> str:
        """Sizes and temperatures, as in the constructor."""
        classes, dim = self.text.shape
        return (
            f"classes={classes}, dim={dim}, text_temperature={self.text_temperature}, "
            f"vision_temperature={self.vision_temperature}, balance={self.balance}"
        )

    def _target(self, features: Tensor, text: Tensor, labels: Tensor | None) -> Tensor:
        logits = (features.to(text.dtype) @ text.T / self.text_temperature).detach()
        if labels is None:
            return logits.softmax(-1)
        absent = ~(labels > 0)
        # Of an image without tags the softmax is 0 / 0.
        return logits.masked_fill(absent, -torch.inf).softmax(-1).masked_fill(absent, 0.0)

    def _check(self, features: Tensor, labels: Tensor | None) -> None:
        me = type(self).__name__
        classes, dim = self.text.shape
        checks.shape(me, "features", features, ("n", dim), "take embeddings of the network that the texts are from")
        checks.floating(me, "features", features)
        if distributed.world_size() == 1:  # else another rank may have pictures
            checks.not_empty(me, "features", features)
        if labels is not None:
            checks.shape(me, "labels", labels, (len(features), classes), "one row per picture, one column per class")

    def _check_values(self, features: Tensor, labels: Tensor | None) -> None:
        me = type(self).__name__
        for some in _slices(features, features.device):
            if labels is not None:
                checks.multi_hot(me, "labels", labels[some])
            off = (features[some].detach().float().norm(dim=-1) - 1).abs().max()
            if not bool(off < 1e-2):  # also of NaN
                raise ValueError(
                    f"{me}: features must be of unit length, and one is off by {float(off):.3g}; "
                    "divide them by their norm, and look for NaN"
                )


class _Objective:
    """Mean KL of all images and its gradient, chunk by chunk, over all processes."""

    def __init__(self, temperature: float, features: Tensor, target: Tensor, images: int) -> None:
        self.temperature = temperature
        self.features = features
        self.target = target
        self.images = images
        self.sums = summing_dtype(target.device)
        self.entropy = sum(
            float(torch.special.entr(target[some]).sum(dtype=self.sums)) for some in _slices(features, target.device)
        )
        self.calls = 0

    @torch.no_grad()  # L-BFGS turns gradients on
    def __call__(self, vision: Tensor) -> tuple[float, Tensor]:
        """Return the mean KL of ``vision`` scaled to unit length, and its gradient by ``vision``."""
        self.calls += 1
        prototypes, temperature = unit(vision), self.temperature
        total = torch.zeros(prototypes.numel() + 1, dtype=self.sums, device=vision.device)
        slope = total[1:].view_as(prototypes)
        total[0] -= self.entropy
        scaled = prototypes.T / temperature
        for some in _slices(self.features, vision.device):
            part, target = self.features[some].to(prototypes), self.target[some]
            log_q = (part @ scaled).log_softmax(-1)
            total[0] -= (target * log_q).sum(dtype=self.sums)
            # Images without tags pull at nothing.
            off = log_q.exp_().mul_(target.sum(-1, keepdim=True)).sub_(target)
            slope += off.T @ part
        total = distributed.all_sum(total)
        gradient = total[1:].view_as(prototypes).to(prototypes.dtype) / (temperature * self.images)
        # Back through the scaling to unit length.
        gradient = gradient - (gradient * prototypes).sum(-1, keepdim=True) * prototypes
        return float(total[0]) / self.images, gradient / vision.norm(dim=-1, keepdim=True)


def _on_the_sphere(vision: Tensor) -> Tensor:
    """Rows of unit length; those that have it already stay as they are, to the last bit."""
    length = torch.linalg.vector_norm(vision, dim=-1, keepdim=True)
    off = (length - 1).abs() > 1e-3
    return torch.where(off, unit(vision), vision)


def _minimize(vision: nn.Parameter, objective: _Objective, tolerance: float, most: int) -> int:
    """Move ``vision`` to the minimum; returns the number of steps."""
    optimizer = torch.optim.LBFGS(
        [vision], max_iter=most, max_eval=4 * most, tolerance_grad=tolerance, tolerance_change=tolerance / 100,
        history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        value, vision.grad = objective(vision)
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    vision.grad = None
    iterations = int(optimizer.state[vision]["n_iter"])
    if iterations >= most:
        warnings.warn(
            f"VisionPrototypeLearner: {most} steps did not reach the tolerance {tolerance}; raise max_iterations",
            RuntimeWarning,
            stacklevel=4,
        )
    return iterations


def _sinkhorn(target: Tensor, labels: Tensor | None, rounds: int) -> None:
    """Scale columns to the classes' fair shares and rows to 1, in turn and in place."""
    parts = list(_slices(target, target.device))
    sums = summing_dtype(target.device)
    wanted = torch.zeros(target.shape[1], dtype=sums, device=target.device)
    for some in parts:
        fair = torch.ones_like(target[some]) if labels is None else labels[some].to(target)
        wanted += (fair / fair.sum(-1, keepdim=True).clamp_min(1)).sum(0, dtype=sums)
    wanted = distributed.all_sum(wanted)
    for _ in range(rounds):
        column = distributed.all_sum(sum((target[some].sum(0, dtype=sums) for some in parts), torch.zeros_like(wanted)))
        scale = (wanted / column.clamp_min(1e-30)).to(target.dtype)
        for some in parts:
            part = target[some].mul_(scale)
            part /= part.sum(-1, keepdim=True).clamp_min(1e-30)


def _slices(table: Tensor, device: torch.device) -> Iterator[slice]:
    """Rows at a time for work on ``device``: in the CPU's cache, elsewhere few launches and no copy of all rows."""
    step = max(1, min(block_size(device), 2**24) // table.shape[1])
    return (slice(first, first + step) for first in range(0, len(table), step))
