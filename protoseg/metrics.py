"""Mean IoU as PASCAL VOC defines it, a sweep over thresholds in one pass, and what can be said without masks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from protoseg.utils import checks, distributed

VOID = 255
"""The mask value of pixels that no metric counts."""

_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)  # not int8, which cannot hold VOID
_SLACK = 1e-4  # scores may leave 0..1 by this much: rounding in interpolation or half precision


class IoU(NamedTuple):
    """Intersection over union of a confusion matrix.

    Attributes:
        miou: Mean over background and all classes that occur in truth or prediction, 0..1; NaN when nothing
            was counted.
        per_class: ``[C+1]`` float64, background first, 0..1; NaN where a class is neither true nor predicted.
    """

    miou: float
    per_class: Tensor


class SweepPoint(NamedTuple):
    """One threshold of a sweep.

    Attributes:
        miou: As in :class:`IoU`.
        threshold: The threshold, 0..1.
        per_class: ``[C+1]``, as in :class:`IoU`.
    """

    miou: float
    threshold: float
    per_class: Tensor


class SweepResult(NamedTuple):
    """Mean IoU at every threshold of a sweep.

    Attributes:
        thresholds: ``[T]`` float32, ascending from 0 to 1.
        miou: ``[T]`` float64, as :attr:`IoU.miou`.
        per_class: ``[T, C+1]`` float64, as :attr:`IoU.per_class`.
    """

    thresholds: Tensor
    miou: Tensor
    per_class: Tensor

    @property
    def best(self) -> SweepPoint:
        """The threshold of the highest mean IoU, the lowest such on a tie; it is chosen with the masks."""
        return self._point(int(self.miou.argmax()))

    def at(self, threshold: float) -> SweepPoint:
        """The grid's threshold nearest to ``threshold`` (0..1; ``ValueError`` outside)."""
        checks.unit_interval("SweepResult.at", "threshold", threshold)
        return self._point(round(threshold * (len(self.thresholds) - 1)))

    def _point(self, index: int) -> SweepPoint:
        # i / bins, not thresholds[i]: the same float32 number, but it prints as 0.38 and not as 0.3799999952.
        threshold = index / (len(self.thresholds) - 1)
        return SweepPoint(float(self.miou[index]), threshold, self.per_class[index])


class ContrastResult(NamedTuple):
    """How well maps part features at every threshold.

    Attributes:
        thresholds: ``[T]`` float32, ascending from 0 to 1.
        contrast: ``[T]`` float64, 0..1; NaN when no picture was counted.
    """

    thresholds: Tensor
    contrast: Tensor

    @property
    def best(self) -> tuple[float, float]:
        """The highest contrast and its threshold, the lowest such on a tie."""
        index = int(self.contrast.argmax())
        return float(self.contrast[index]), index / (len(self.thresholds) - 1)


class PrototypeDiagnostics(NamedTuple):
    """Whether prototypes are distinct and in use; every field has the leading shape of the prototypes.

    Attributes:
        cosine: Mean cosine over all pairs of different prototypes, -1..1; near 1 they have collapsed. NaN
            when K = 1.
        effective: Perplexity of usage, 1..K: how many equally used prototypes would be as spread out. NaN if
            unknown.
        dead: Share of prototypes, 0..1, with less than a hundredth of an even share of the usage. NaN if
            unknown.
    """

    cosine: Tensor
    effective: Tensor
    dead: Tensor


class ConfusionMatrix:
    """Confusion matrix over background and C classes, accumulated over a data set, and its mean IoU.

    Intersections and unions are summed over all pictures before they are divided, as PASCAL VOC does; the
    mean of each picture's IoU is another quantity. A class that is neither true nor predicted in the whole
    set has no IoU and is left out of the mean (VOC's own code meets no such class); one that is predicted but
    never true counts as 0.

    The matrix stays on the CPU, whatever device the masks are on.

    Args:
        num_classes: Foreground classes C, 1..254; value 0 is background and 255 is void.

    Attributes:
        matrix: ``[C+1, C+1]`` int64, row = truth, column = prediction.

    Example:
        >>> confusion = ConfusionMatrix(2)
        >>> confusion.update(prediction=torch.tensor([[0, 1], [1, 1]]), mask=torch.tensor([[0, 0], [1, 255]]))
        >>> miou, per_class = confusion.result()
        >>> miou, per_class.tolist()
        (0.5, [0.5, 0.5, nan])
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = _class_count("ConfusionMatrix", num_classes)
        self.matrix = _zeros(num_classes + 1, num_classes + 1)

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """Count a picture, or a batch of pictures of one size.

        Args:
            prediction: ``[H, W]`` or ``[B, H, W]`` integers 0..C.
            mask: Truth of the same shape, integers 0..C; pixels of 255 are not counted.

        Raises:
            TypeError: An argument is not an integer tensor.
            ValueError: The shape or a value is out of range; nothing has been counted then.
        """
        where, classes = "ConfusionMatrix.update", self.num_classes
        _integer(where, "prediction", prediction)
        checks.shape(where, "prediction", prediction, ("H", "W") if prediction.dim() == 2 else ("B", "H", "W"))
        _mask(where, mask, prediction.shape, classes)
        if prediction.numel() and not 0 <= int(prediction.min()) <= int(prediction.max()) <= classes:
            raise ValueError(
                f"{where}: prediction must hold 0 (background) to {classes}, got {int(prediction.min())} to "
                f"{int(prediction.max())}; void ({VOID}) is for masks only"
            )
        counted = mask != VOID
        truth = mask[counted].long()
        predicted = prediction.to(mask.device)[counted].long()
        counts = torch.bincount(truth * (classes + 1) + predicted, minlength=(classes + 1) ** 2)
        self.matrix += counts.view_as(self.matrix).cpu()

    def result(self) -> IoU:
        """Mean IoU and the IoU of each class over everything counted so far."""
        per_class = _iou(self.matrix)
        return IoU(float(per_class.nanmean()), per_class)

    def merge(self, other: ConfusionMatrix) -> ConfusionMatrix:
        """Add the counts of ``other`` in place and return self; ``ValueError`` if ``num_classes`` differs."""
        if other.num_classes != self.num_classes:
            raise ValueError(
                f"ConfusionMatrix.merge: other must have num_classes={self.num_classes}, got {other.num_classes}"
            )
        self.matrix += other.matrix
        return self

    def all_reduce(self) -> ConfusionMatrix:
        """Sum the counts over all ranks in place and return self; identity outside a process group.

        Every rank must call it, once, at the end: a second call would sum the sums.
        """
        _all_reduce(self.matrix)
        return self


class ThresholdSweep:
    """Mean IoU of class activation maps at every threshold, in one pass over the pictures.

    At threshold t a pixel takes its best class among those present in the picture if that class's score is at
    least t (equal counts as foreground), and background otherwise. Of equal scores the lower class wins.
    Classes that are absent by the labels are never predicted, and a picture without any class is background
    throughout.

    One histogram over (threshold reached, truth, best class) holds what all thresholds need, so the cost does
    not grow with their number. At its thresholds the result is exact: the same counts, to the bit, as ``score
    >= thresholds[i]`` in float32, the type in which scores of any precision are compared.

    The histograms stay on the CPU, whatever device the maps are on.

    Args:
        num_classes: Foreground classes C, 1..254.
        bins: Thresholds are i / bins for i = 0..bins.

    Attributes:
        thresholds: ``[bins+1]`` float32, ascending from 0 to 1.
        score_histogram: ``[bins+1]`` int64; entry i counts the pixels whose best present class scores at
            least ``thresholds[i]`` and less than the next. It never looks at a mask: all pixels count, void
            ones too, of all pictures with a class, so a threshold chosen from it is one chosen without masks.

    Example:
        >>> sweep = ThresholdSweep(2, bins=10)
        >>> maps = torch.tensor([[[0.9, 0.2]], [[0.0, 1.0]]])  # class 2 is absent, whatever its score
        >>> sweep.update(maps, labels=torch.tensor([1, 0]), mask=torch.tensor([[1, 0]]))
        >>> best = sweep.result().best
        >>> best.miou, best.threshold
        (1.0, 0.3)
        >>> sweep.result().at(0.2).miou
        0.25
    """

    def __init__(self, num_classes: int, *, bins: int = 200) -> None:
        if not isinstance(bins, int) or bins < 1:
            raise ValueError(f"ThresholdSweep: bins must be an integer of at least 1, got {bins!r}")
        self.num_classes = _class_count("ThresholdSweep", num_classes)
        self.bins = bins
        self.thresholds = _levels(bins)
        self.score_histogram = _zeros(bins + 1)
        # Pixels by truth, and by (last threshold that the score reaches, truth, best present class). What is
        # in no foreground column at a threshold is background, so pictures without a class need no entry in
        # the second.
        self._truth = _zeros(num_classes + 1)
        self._reached = _zeros(bins + 1, num_classes + 1, num_classes)

    @torch.no_grad()
    def update(self, maps: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """Count one picture.

        Args:
            maps: ``[C, H, W]`` scores of the foreground classes, floating point, 0..1 (1e-4 of rounding is
                forgiven and clamped). Channels of absent classes are not looked at, and may be left out: ``[P, H, W]``
                of the P present classes in their order will do.
            labels: ``[C]`` multi-hot, 1 = the class is in the picture.
            mask: ``[H, W]`` truth, integers 0..C or 255 = void. Without one only :attr:`score_histogram`
                grows.

        Raises:
            TypeError: ``maps`` is not floating point or ``mask`` not of an integer type.
            ValueError: A shape differs or a value is NaN or out of range; nothing has been counted then.
        """
        where, classes = "ThresholdSweep.update", self.num_classes
        checks.shape(where, "labels", labels, (classes,))
        checks.multi_hot(where, "labels", labels)
        present = labels.to(maps.device).nonzero().flatten()
        own = len(maps) == len(present) < classes
        channels: int = len(present) if own else classes
        checks.shape(where, "maps", maps, (channels, "H", "W"), "background has no map here")
        checks.floating(where, "maps", maps)
        if mask is not None:
            _mask(where, mask, maps.shape[1:], classes)
            counted = (mask != VOID).to(maps.device)
            truth = mask.to(maps.device)[counted].long()

        if len(present) and maps[0].numel():
            scores = (maps if own else maps[present]).float()
            best, channel = scores.max(dim=0)  # propagates NaN
            _scores_in_range(where, scores, best)
            bin_of = torch.bucketize(best.clamp_(0, 1), self.thresholds.to(maps.device), right=True) - 1
            self.score_histogram += torch.bincount(bin_of.flatten(), minlength=self.bins + 1).cpu()
            if mask is not None:
                entry = (bin_of[counted] * (classes + 1) + truth) * classes + present[channel[counted]]
                counts = torch.bincount(entry, minlength=self._reached.numel())
                self._reached += counts.view_as(self._reached).cpu()
        if mask is not None:
            self._truth += torch.bincount(truth, minlength=classes + 1).cpu()

    def result(self) -> SweepResult:
        """Mean IoU and the IoU of each class at every threshold, over everything counted so far.

        A class's IoU is NaN at the thresholds where it is neither true nor predicted, and then left out of
        the mean.
        """
        foreground = self._reached.flip(0).cumsum(0).flip(0)  # what reaches i or a later threshold
        background = self._truth[:, None] - foreground.sum(2, keepdim=True)
        per_class = _iou(torch.cat([background, foreground], dim=2))
        return SweepResult(self.thresholds, per_class.nanmean(1), per_class)

    def merge(self, other: ThresholdSweep) -> ThresholdSweep:
        """Add the counts of ``other`` in place and return self; ``ValueError`` if classes or bins differ."""
        if (other.num_classes, other.bins) != (self.num_classes, self.bins):
            raise ValueError(
                f"ThresholdSweep.merge: other must have num_classes={self.num_classes} and bins={self.bins}, "
                f"got {other.num_classes} and {other.bins}"
            )
        for mine, theirs in zip(self._counts(), other._counts(), strict=True):
            mine += theirs
        return self

    def all_reduce(self) -> ThresholdSweep:
        """Sum the counts over all ranks in place and return self; identity outside a process group.

        Every rank must call it, once, at the end: a second call would sum the sums.
        """
        for counts in self._counts():
            _all_reduce(counts)
        return self

    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.score_histogram, self._truth, self._reached


class RegionContrast:
    r"""How much of the features' variance in a picture lies between the regions of its map; needs no masks.

    .. math::
        \eta^2(t) = \frac{1}{D} \sum_d
            \frac{\sum_r n_r (\bar F_{dr} - \bar F_d)^2}{\sum_j (F_d(j) - \bar F_d)^2}

    is Fisher's correlation ratio, with the regions :math:`r` that threshold :math:`t` makes as :class:`ThresholdSweep`
    does: background, and one for each present class. It is averaged over channels that vary and over pictures with a
    class. A map whose regions are the objects has more of it than one that shows their parts or spills over them: of
    two maps of the same features the one with more is likely the better. ``docs/cpal.md`` has how often that held.
    Figures of different features do not compare, and a map made from the picture's own prototypes is flattered.

    Not in the paper. Everything is counted on the CPU, whatever device features and maps are on.

    Args:
        num_classes: Foreground classes C.
        bins: Thresholds are i / bins for i = 0..bins.

    Attributes:
        thresholds: ``[bins+1]`` float32, ascending from 0 to 1.

    Example:
        >>> features = torch.tensor([[[0.0, 0.1, 5.0, 5.1]]])
        >>> whole, part = RegionContrast(1), RegionContrast(1)
        >>> whole.update(features, torch.tensor([[[0.0, 0.1, 0.8, 1.0]]]), labels=torch.tensor([1]))
        >>> part.update(features, torch.tensor([[[0.0, 0.2, 0.1, 1.0]]]), labels=torch.tensor([1]))
        >>> [round(each.result().best[0], 2) for each in (whole, part)]
        [1.0, 0.35]
    """

    def __init__(self, num_classes: int, *, bins: int = 50) -> None:
        if not isinstance(bins, int) or bins < 1:
            raise ValueError(f"RegionContrast: bins must be an integer of at least 1, got {bins!r}")
        checks.positive("RegionContrast", "num_classes", num_classes)
        self.num_classes = num_classes
        self.bins = bins
        self.thresholds = _levels(bins)
        self._pictures = _zeros()
        self._shares = _zeros(bins + 1, dtype=torch.float64)

    @property
    def pictures(self) -> int:
        """How many were counted."""
        return int(self._pictures)

    @torch.no_grad()
    def update(self, features: Tensor, maps: Tensor, labels: Tensor) -> None:
        """Count one picture; one without a class, or whose features are the same everywhere, says nothing.

        Args:
            features: ``[D, h, w]``, floating point.
            maps: ``[C, H, W]`` scores of the foreground classes, floating point, 0..1; resized to ``h w``, bilinearly.
            labels: ``[C]`` multi-hot, 1 = the class is in the picture.

        Raises:
            TypeError: Features or maps are not floating point.
            ValueError: A shape differs or a value is NaN or out of range; nothing has been counted then.
        """
        where = "RegionContrast.update"
        checks.shape(where, "features", features, ("D", "h", "w"))
        checks.floating(where, "features", features)
        checks.finite(where, "features", features)
        checks.shape(where, "maps", maps, (self.num_classes, "H", "W"), "background has no map here")
        checks.floating(where, "maps", maps)
        checks.shape(where, "labels", labels, (self.num_classes,))
        checks.multi_hot(where, "labels", labels)

        present = labels.cpu().nonzero().flatten()
        if not len(present) or not features.numel():
            return
        scores = maps[present.to(maps.device)].float().cpu()
        if scores.shape[1:] != features.shape[1:]:
            scores = F.interpolate(scores[None], features.shape[1:], mode="bilinear", align_corners=False)[0]
        best, channel = scores.flatten(1).max(0)
        _scores_in_range(where, scores, best)

        pixels = features.flatten(1).T.cpu().double()
        rounding = 1e-6 * pixels.abs().max()
        pixels = pixels - pixels.mean(0)
        deviation = pixels.square().mean(0).sqrt()
        varies = deviation > rounding
        if not bool(varies.any()):
            return
        pixels = pixels[:, varies] / deviation[varies]

        # Sums and sizes of the regions by (last threshold that the score reaches, class), then at every threshold.
        reached = torch.bucketize(best.clamp(0, 1), self.thresholds, right=True) - 1
        entry, shape = reached * len(present) + channel, (self.bins + 1, len(present), -1)
        sums = pixels.new_zeros((self.bins + 1) * len(present), pixels.shape[1]).index_add_(0, entry, pixels)
        sizes = torch.bincount(entry, minlength=len(sums)).to(pixels)
        sums, sizes = (each.view(shape).flip(0).cumsum(0).flip(0) for each in (sums, sizes))

        # What is in no region of a class is background; all sums together are 0.
        rest, size = sums.sum(1, keepdim=True), len(pixels) - sizes.sum(1, keepdim=True)
        between = torch.cat([sums, rest], 1).square().mean(2) / torch.cat([sizes, size], 1)[..., 0].clamp_min(1)
        self._shares += between.sum(1) / len(pixels)
        self._pictures += 1

    def result(self) -> ContrastResult:
        """The mean over the pictures counted so far, at every threshold."""
        return ContrastResult(self.thresholds, self._shares / self._pictures)

    def all_reduce(self) -> RegionContrast:
        """Sum over all ranks in place and return self; identity outside a process group.

        Every rank must call it, once, at the end: a second call would sum the sums.
        """
        for sums in (self._pictures, self._shares):
            _all_reduce(sums)
        return self


@torch.no_grad()
def prototype_diagnostics(prototypes: Tensor, assignment: Tensor | None = None) -> PrototypeDiagnostics:
    """Tell whether prototypes are distinct and in use.

    Usage u_k is the share of all assignment weight that prototype k has; its perplexity is exp(-sum_k u_k log
    u_k).

    Args:
        prototypes: ``[..., K, D]`` of any length; only directions matter.
        assignment: ``[..., L, K]`` non-negative weights of L tokens over the prototypes, with the same
            leading shape: soft responsibilities or one-hot choices. None: usage is unknown, and ``effective``
            and ``dead`` are NaN.

    Returns:
        :class:`PrototypeDiagnostics`, each field float32 ``[...]``.

    Raises:
        TypeError: A tensor is not floating point.
        ValueError: A shape differs, or an assignment is negative or NaN.

    Example:
        >>> prototypes = torch.eye(4)
        >>> assignment = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]])  # two of the four are used
        >>> cosine, effective, dead = prototype_diagnostics(prototypes, assignment)
        >>> cosine.item(), round(effective.item(), 4), dead.item()
        (0.0, 2.0, 0.5)
    """
    where = "prototype_diagnostics"
    checks.floating(where, "prototypes", prototypes)
    if prototypes.dim() < 2:
        raise ValueError(f"{where}: prototypes must have shape (..., K, D), got {tuple(prototypes.shape)}")
    leading, count = prototypes.shape[:-2], prototypes.shape[-2]
    unit = F.normalize(prototypes.float(), dim=-1)
    # The sum over all pairs is |sum of the vectors|^2; less the pairs of a prototype with itself.
    pairs = unit.sum(-2).square().sum(-1) - unit.square().sum((-2, -1))
    cosine = pairs / (count * (count - 1)) if count > 1 else torch.full_like(pairs, torch.nan)
    if assignment is None:
        unknown = torch.full_like(cosine, torch.nan)
        return PrototypeDiagnostics(cosine, unknown, unknown.clone())

    checks.floating(where, "assignment", assignment)
    checks.shape(where, "assignment", assignment, (*leading, "L", count), "one column for each prototype")
    if not bool((assignment >= 0).all()):
        lowest = assignment.min().item()
        raise ValueError(f"{where}: assignment must not be negative or NaN, got a minimum of {lowest:g}")
    weight = assignment.float().sum(-2)
    usage = weight / weight.sum(-1, keepdim=True)  # no weight at all: 0 / 0 = NaN, that is, unknown
    effective = torch.special.entr(usage).sum(-1).exp()
    dead = torch.where(effective.isnan(), effective, (usage * count < 0.01).float().mean(-1))
    return PrototypeDiagnostics(cosine, effective, dead)


def _zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Counts, on the CPU, that may be added to in inference mode and outside."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device="cpu")


def _levels(bins: int) -> Tensor:
    """Thresholds from 0 to 1, rounded once."""
    with torch.inference_mode(False):
        return (torch.arange(bins + 1, dtype=torch.float64, device="cpu") / bins).float()


def _iou(matrix: Tensor) -> Tensor:
    """``[..., C+1]`` float64 IoU of counts ``[..., C+1, C+1]``, NaN (0 / 0) where the union is empty."""
    hit = matrix.diagonal(dim1=-2, dim2=-1).double()
    return hit / (matrix.sum(-1) + matrix.sum(-2) - hit)


def _all_reduce(counts: Tensor) -> None:
    """Sum ``counts``, which is on the CPU, over all ranks in place; NCCL can only add what is on a GPU."""
    if distributed.world_size() > 1:
        shared = counts.cuda() if "nccl" in dist.get_backend() else counts
        dist.all_reduce(shared)
        counts.copy_(shared)


def _scores_in_range(where: str, scores: Tensor, best: Tensor) -> None:
    lowest, highest = float(scores.min()), float(best.max())
    if not (lowest >= -_SLACK and highest <= 1 + _SLACK):
        raise ValueError(
            f"{where}: maps must lie between 0 and 1 without NaN, got {lowest:g} to {highest:g} in the present "
            "classes; normalize the maps first"
        )


def _class_count(where: str, num_classes: int) -> int:
    if not isinstance(num_classes, int) or not 1 <= num_classes < VOID:
        raise ValueError(
            f"{where}: num_classes, without background, must be an integer of 1 to {VOID - 1}, got {num_classes!r}"
        )
    return num_classes


def _integer(where: str, name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{where}: {name} must be an integer tensor, got {got}; call {name}.long()")


def _mask(where: str, mask: Tensor, size: torch.Size, classes: int) -> None:
    _integer(where, "mask", mask)
    checks.shape(where, "mask", mask, tuple(size), "resize the prediction to the mask")
    wrong = (mask != VOID) & ((mask < 0) | (mask > classes))
    if bool(wrong.any()):
        raise ValueError(
            f"{where}: mask must hold 0 (background) to {classes}, or {VOID} (void), "
            f"got {sorted(set(mask[wrong].tolist()))[:8]}"
        )
