"""Class activation maps: normalize, background, multi-scale inference, masks, thresholds without masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.utils import checks
from protoseg.utils.numeric import full_precision

__all__ = [
    "margin_map",
    "max_normalize",
    "multi_scale",
    "otsu_threshold",
    "quantile_threshold",
    "to_mask",
    "with_background",
]

_EPS = 1e-8


def max_normalize(cam: Tensor) -> Tensor:
    r"""Clip a class activation map at 0 and divide each channel by its own maximum.

    .. math:: M(j) = \frac{\mathrm{ReLU}(m(j))}{\max_{j'} \mathrm{ReLU}(m(j'))}

    The maximum counts as a constant in the gradient, so that a loss on maps cannot be met by lowering their own peak.
    One fine-tuning run on MSRC-15 gave a CAM of 0.436 (train) and 0.397 (val) this way and 0.431 and 0.392 the other.

    Args:
        cam: ``[..., H, W]`` raw scores.

    Returns:
        ``[..., H, W]`` in ``[0, 1]``. A channel without a positive score is all zero, and so is its gradient.

    Example:
        >>> max_normalize(torch.tensor([[[-1.0, 2.0, 4.0]]])).tolist()
        [[[0.0, 0.5, 1.0]]]
    """
    cam = full_precision(cam).relu()
    # With a gradient, the cheapest way to match a broad target would be to lower the peak, against the classifier.
    peak = cam.detach().amax(dim=(-2, -1), keepdim=True)
    return cam / torch.where(peak > _EPS, peak, torch.ones_like(peak))


def margin_map(foreground: Tensor, background: Tensor, sharpness: float = 3.0) -> Tensor:
    r"""Judge a foreground score against the background's, on a scale where 1/2 is undecided.

    .. math:: \tilde M_c(j) = \mathrm{clamp}\bigl(\kappa\,(s_c(j) - s_0(j)) + \tfrac12,\ 0,\ 1\bigr)

    Not in the CPAL paper, which compares a cosine with a constant.

    Args:
        foreground: ``[B, C, H, W]`` scores.
        background: ``[B, 1, H, W]`` scores of the background.
        sharpness: :math:`\kappa` above 0.

    Returns:
        ``[B, C, H, W]`` in ``[0, 1]``.
    """
    return (sharpness * (full_precision(foreground) - full_precision(background)) + 0.5).clamp(0.0, 1.0)


def with_background(cam: Tensor, power: float = 1.0) -> Tensor:
    r"""Put a background channel in front of normalized maps.

    .. math:: M_0(j) = \bigl(1 - \max_c M_c(j)\bigr)^{\alpha}

    Args:
        cam: ``[..., C, H, W]`` in ``[0, 1]``, absent classes 0.
        power: :math:`\alpha` above 0; larger means less background.

    Returns:
        ``[..., C+1, H, W]``.

    Raises:
        ValueError: ``power`` is not above 0.

    Example:
        >>> with_background(torch.tensor([[[0.2]], [[0.7]]])).flatten().tolist()
        [0.30000001192092896, 0.20000000298023224, 0.699999988079071]
    """
    checks.positive("with_background", "power", power)
    if cam.dim() < 3:
        raise ValueError(f"with_background: cam must have shape (..., C, H, W), got {tuple(cam.shape)}")
    background = 1 - cam.amax(-3, keepdim=True)
    return torch.cat([background if power == 1 else background**power, cam], -3)


def multi_scale(
    model: Callable[[Tensor], Sequence[Tensor]],
    images: Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = True,
    multiple: int = 8,
) -> tuple[Tensor, ...]:
    """Run a model on several sizes of a picture, and mirrored, and average what it returns.

    Raw scores are averaged, on the grid of the first scale, before any clipping or normalizing.

    Args:
        model: Takes ``[B, 3, H, W]`` and returns one or more maps ``[B, ?, h, w]``, such as features and CAM.
        images: ``[B, 3, H, W]``, normalized as the model wants them.
        scales: Factors above 0.
        flip: Also the mirrored picture, its maps mirrored back.
        multiple: Sides are rounded to a multiple of it, at least one, so that strides divide them.

    Returns:
        The model's maps, averaged.

    Raises:
        ValueError: Wrong rank, no scale, or one that is not above 0; or the model returns what is no map.
        TypeError: The model returns one tensor instead of a sequence of maps.

    Example:
        >>> (mean,) = multi_scale(lambda x: (x.mean(1, keepdim=True),), torch.ones(1, 3, 16, 16), scales=(1, 2))
        >>> mean.shape, mean.mean().item()
        (torch.Size([1, 1, 16, 16]), 1.0)
    """
    checks.shape("multi_scale", "images", images, ("B", "C", "H", "W"))
    if not scales or min(scales) <= 0:
        raise ValueError(f"multi_scale: scales must be one or more numbers above 0, got {tuple(scales)}")

    total: list[Tensor] = []
    for scale in scales:
        size = [max(1, round(side * scale / multiple)) * multiple for side in images.shape[-2:]]
        scaled = images
        if size != list(images.shape[-2:]):
            scaled = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)

        for mirrored in (False, True) if flip else (False,):
            maps = _several_maps(model(scaled.flip(-1) if mirrored else scaled), len(images))
            if mirrored:
                maps = [each.flip(-1) for each in maps]
            if not total:
                total = [torch.zeros_like(each) for each in maps]
            for mean, each in zip(total, maps, strict=True):
                mean += _resize(each, mean.shape[-2:])

    runs = len(scales) * (1 + flip)
    return tuple(mean / runs for mean in total)


def to_mask(cam: Tensor, labels: Tensor, threshold: float | Tensor) -> Tensor:
    """Turn normalized maps into class indices.

    A pixel takes its best class among those present when that class's score is at least the threshold, else
    background: the rule that :class:`protoseg.metrics.ThresholdSweep` scores.

    Args:
        cam: ``[..., C, H, W]`` in ``[0, 1]``, foreground only.
        labels: ``[..., C]`` multi-hot.
        threshold: In ``[0, 1]``; or ``[C]``, one for each class, where the best class is the one that exceeds its own
            by most.

    Returns:
        ``[..., H, W]`` int64, 0 = background, 1..C = classes.

    Raises:
        ValueError: Shapes that do not belong together, a threshold outside ``[0, 1]``, labels that are no multi-hot
            rows (class indices are not), or maps of the present classes outside ``[0, 1]`` or with NaN.

    Example:
        >>> to_mask(torch.tensor([[[0.9, 0.1]], [[1.0, 1.0]]]), torch.tensor([1, 0]), 0.5).tolist()
        [[1, 0]]
    """
    if not isinstance(threshold, Tensor):
        checks.unit_interval("to_mask", "threshold", threshold)
    if cam.shape[:-2] != labels.shape:
        raise ValueError(
            f"to_mask: cam [..., C, H, W] and labels [..., C] must agree, got {tuple(cam.shape)} and "
            f"{tuple(labels.shape)}; leave the background channel out"
        )
    checks.multi_hot("to_mask", "labels", labels)
    # In float32, as the sweep compares, whatever the type of the maps.
    present = labels.bool()[..., None, None]
    scores = torch.where(present, cam.float(), torch.zeros((), device=cam.device))
    checks.within_unit_interval("to_mask", "cam", scores)
    scores = scores.clamp_min(0).masked_fill(~present, -1.0)
    if not isinstance(threshold, Tensor):
        best, index = scores.max(-3)
        return torch.where(best >= threshold, index + 1, 0)

    checks.shape("to_mask", "threshold", threshold, (cam.shape[-3],), "one threshold for each class")
    checks.within_unit_interval("to_mask", "threshold", threshold, slack=0.0)
    above = (scores - threshold.to(scores)[:, None, None]).masked_fill(~present, -torch.inf)
    best, index = above.max(-3)
    return torch.where(best >= 0, index + 1, 0)


def otsu_threshold(histogram: Tensor) -> float:
    r"""Choose a threshold without masks: the one that separates the scores best (Otsu, 1979).

    .. math:: t^* = \arg\max_t\ \omega_0(t)\,\omega_1(t)\,(\mu_0(t) - \mu_1(t))^2

    Args:
        histogram: ``[bins + 1]`` counts of best present-class scores, entry ``i`` for scores from ``i / bins`` up, as
            :attr:`protoseg.metrics.ThresholdSweep.score_histogram`.

    Returns:
        One of ``i / bins``; the middle of the range where several do equally well, and 0.5 for an empty histogram.

    Example:
        >>> otsu_threshold(torch.tensor([8.0, 2.0, 0.0, 0.0, 5.0]))
        0.75
    """
    counts = _histogram("otsu_threshold", histogram)
    if counts.sum() == 0:
        return 0.5
    bins = len(counts) - 1
    levels = torch.arange(bins + 1, dtype=torch.float64, device=counts.device)
    below, above = counts.cumsum(0)[:-1], counts.sum() - counts.cumsum(0)[:-1]
    low = (counts * levels).cumsum(0)[:-1]
    high = (counts * levels).sum() - low
    between = below * above * (low / below.clamp_min(1) - high / above.clamp_min(1)).square()
    best = (between >= between.max() * (1 - 1e-9)).nonzero().flatten() + 1
    return float(best[len(best) // 2]) / bins


def quantile_threshold(histogram: Tensor, foreground: float) -> float:
    """Choose a threshold without masks so that a given share of the pixels becomes foreground.

    Args:
        histogram: As for :func:`otsu_threshold`.
        foreground: Share of the pixels in ``[0, 1]`` that shall score at least the threshold, from what the user
            knows of the pictures.

    Returns:
        The ``i / bins`` whose share is nearest.

    Raises:
        ValueError: ``foreground`` outside ``[0, 1]`` or an empty histogram.

    Example:
        >>> quantile_threshold(torch.tensor([6.0, 2.0, 2.0]), 0.2)
        1.0
    """
    checks.unit_interval("quantile_threshold", "foreground", foreground)
    counts = _histogram("quantile_threshold", histogram)
    if counts.sum() == 0:
        raise ValueError("quantile_threshold: histogram must hold at least one pixel, got an empty one")
    share = counts.flip(0).cumsum(0).flip(0) / counts.sum()
    return int((share - foreground).abs().argmin()) / (len(counts) - 1)


def _several_maps(found: Sequence[Tensor] | Tensor, images: int) -> list[Tensor]:
    """What a model returned to :func:`multi_scale`, if it is that: mirroring anything else would mix its entries."""
    if isinstance(found, Tensor):
        raise TypeError(
            f"multi_scale: the model must return a sequence of maps, got one tensor {tuple(found.shape)}; put it in a "
            "tuple"
        )
    for each in found:
        if not isinstance(each, Tensor) or each.dim() != 4 or len(each) != images:
            got = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(
                f"multi_scale: the model must return maps of shape ({images}, ?, h, w), got {got}; leave logits out"
            )
    return list(found)


def _histogram(where: str, histogram: Tensor) -> Tensor:
    checks.shape(where, "histogram", histogram, ("bins + 1",))
    if len(histogram) < 2 or bool((histogram < 0).any()):
        raise ValueError(f"{where}: histogram must hold two or more counts of at least 0, got {histogram.tolist()}")
    return histogram.cpu().double()


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
