"""Pixel-adaptive refinement of maps by the picture's colors, and a plug for anything else, such as a dense CRF."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.utils import checks

__all__ = ["Refiner", "load_refiner", "pixel_adaptive_refine"]

_TILE = 768  # pixels at the side of a tile with what it needs around it
Window = tuple[slice, slice]

Refiner = Callable[[Tensor, Tensor], Tensor]
"""Takes maps ``[B, C, H, W]`` and pictures ``[B, 3, H, W]`` uint8 to better maps of the same shape."""


@torch.no_grad()
def pixel_adaptive_refine(
    maps: Tensor,
    images: Tensor,
    *,
    iterations: int = 10,
    dilations: Sequence[int] = (1, 2, 4, 8),
    sharpness: float = 10.0,
) -> Tensor:
    r"""Let neighbors of the same color agree.

    .. math:: m^{t+1}(i) = \sum_{j \in N(i)} \alpha_{ij}\, m^t(j), \qquad
        \alpha_{ij} = \mathrm{softmax}_j \Bigl(- \kappa\,\tfrac13 \sum_{rgb} \frac{|I_i - I_j|}{\sigma_i}\Bigr)

    with :math:`N(i)` the eight neighbors at each dilation and :math:`\sigma_i` the standard deviation of the picture
    over them, for each color. After PAMR (Araslanov and Roth, "Single-stage semantic segmentation from image labels",
    2020), which divides by :math:`\sigma_i^2` and leaves the strength to it; here the distance is in standard
    deviations and the strength is :math:`\kappa`. Neighbors outside the picture repeat its edge.

    Large pictures are refined in tiles that overlap by as far as values travel, with the same result to the last bit;
    above pictures and maps that takes up to 300 MB, whatever their size (times B).

    Args:
        maps: ``[B, C, H, W]`` scores; each channel is refined alike, so a sum over channels of 1 stays 1.
        images: ``[B, 3, H, W]``, any range, as large as the maps.
        iterations: Rounds, at least 0.
        dilations: Distances of the neighbors in pixels.
        sharpness: :math:`\kappa` above 0.

    Returns:
        ``[B, C, H, W]`` float32, inside the range of ``maps``.

    Raises:
        ValueError: Sizes differ or an option is out of range.

    Example:
        >>> image = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(1, 3, 4, 4)
        >>> rough = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(1, 1, 4, 4)
        >>> fine = pixel_adaptive_refine(rough, image, dilations=(1,))
        >>> bool(fine[0, 0, 0, 1] > 0.4), bool(fine[0, 0, 0, 2] < 0.1)
        (True, True)
    """
    where = "pixel_adaptive_refine"
    checks.shape(where, "maps", maps, ("B", "C", "H", "W"))
    checks.shape(where, "images", images, (maps.shape[0], 3, *maps.shape[2:]), "resize the maps to the pictures")
    checks.positive(where, "sharpness", sharpness)
    if iterations < 0 or not dilations or min(dilations) < 1:
        raise ValueError(
            f"{where}: iterations must be at least 0 and dilations numbers of at least 1, "
            f"got {iterations} and {tuple(dilations)}"
        )

    # What a tile computes is right as far from its edges as values travel; only the picture's own edges are repeated.
    halo = iterations * max(dilations)
    largest = torch.maximum(images.amax((1, 2, 3), keepdim=True), -images.amin((1, 2, 3), keepdim=True).float())
    floor = 1e-4 * largest.clamp_min(1e-8)
    result = torch.empty(maps.shape, dtype=torch.float32, device=maps.device)
    for target, source, inner in _tiles(maps.shape[-2], maps.shape[-1], halo):
        tile = _refine(
            maps[..., source[0], source[1]].float(),
            images[..., source[0], source[1]].float(),
            floor,
            iterations,
            dilations,
            sharpness,
        )
        result[..., target[0], target[1]] = tile[..., inner[0], inner[1]]
    return result


def _tiles(height: int, width: int, halo: int) -> Iterator[tuple[Window, Window, Window]]:
    """Windows that part a map, what each needs around it, and where it lies in that."""
    side = max(_TILE - 2 * halo, _TILE // 4)
    whole = height * width <= _TILE**2
    rows, columns = (range(1), range(1)) if whole else (range(-(-height // side)), range(-(-width // side)))
    for row in rows:
        for column in columns:
            ends = [(0, height), (0, width)]
            if not whole:
                ends = [
                    (place * side, min((place + 1) * side, length))
                    for place, length in ((row, height), (column, width))
                ]
            wide = [
                (max(0, first - halo), min(length, last + halo))
                for (first, last), length in zip(ends, (height, width), strict=True)
            ]
            inner = [slice(first - start, last - start) for (first, last), (start, _) in zip(ends, wide, strict=True)]
            target = [slice(first, last) for first, last in ends]
            source = [slice(first, last) for first, last in wide]
            yield (target[0], target[1]), (source[0], source[1]), (inner[0], inner[1])


def _refine(
    maps: Tensor, pictures: Tensor, floor: Tensor, iterations: int, dilations: Sequence[int], sharpness: float
) -> Tensor:
    """Refine maps whole.

    Every step is one operation on each pixel, in an order that does not depend on the size, so that a pixel's value is
    the same to the last bit whatever tile it lies in.
    """
    count = 8 * len(dilations)

    # 1. The deviation of each color over the neighbors.
    mean = torch.zeros_like(pictures)
    for view in _views(pictures, dilations):
        mean += view
    mean /= count
    spread = torch.zeros_like(pictures)
    for view in _views(pictures, dilations):
        difference = view - mean
        spread += difference.mul_(difference)
    spread = spread.div_(count - 1).sqrt_().maximum(floor)

    # 2. Each neighbor's share, the softmax over distances in color.
    shares = []
    for view in _views(pictures, dilations):
        red, green, blue = (view - pictures).abs_().div_(spread).unbind(1)
        shares.append((red + green).add_(blue).div_(3).mul_(-sharpness).unsqueeze(1))
    highest = shares[0]
    for share in shares[1:]:
        highest = highest.maximum(share)
    total = torch.zeros_like(highest)
    for share in shares:
        share.sub_(highest).exp_()
        total += share
    for share in shares:
        share /= total

    # 3. Rounds in which every pixel takes the mean of its neighbors by their shares.
    for _ in range(iterations):
        summed = torch.zeros_like(maps)
        for share, view in zip(shares, _views(maps, dilations), strict=True):
            summed += share * view
        maps = summed
    return maps


def _views(maps: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """The neighbors at all distances, each as a map ``[B, C, H, W]``."""
    for dilation in dilations:
        yield from _neighbors(maps, dilation)


def _neighbors(maps: Tensor, dilation: int) -> list[Tensor]:
    """The eight neighbors at a distance, each as a map ``[B, C, H, W]``, views of one padded copy."""
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (dilation,) * 4, mode="replicate")
    offsets = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    return [padded[..., y * dilation :, x * dilation :][..., :height, :width] for y, x in offsets]


def load_refiner(name: str) -> Refiner | None:
    """Find a refiner by name.

    Args:
        name: ``"pamr"`` for :func:`pixel_adaptive_refine`, ``"none"``, or ``"package.module:function"`` for one of the
            user's own, such as a dense CRF: a function of maps ``[B, N+1, H, W]`` in ``[0, 1]``, background in front,
            and pictures ``[B, 3, H, W]`` uint8, that returns better maps.

    Returns:
        The function, or ``None`` for ``"none"``.

    Raises:
        ValueError: A name of another form, or one that leads to nothing that can be called.

    Example:
        >>> load_refiner("pamr") is pixel_adaptive_refine
        True
    """
    if name == "none":
        return None
    if name == "pamr":
        return pixel_adaptive_refine

    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"load_refiner: name must be 'pamr', 'none' or 'package.module:function', got {name!r}")

    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"load_refiner: {name!r} cannot be imported; {error}; is its folder on PYTHONPATH?") from error

    if not callable(found):
        raise ValueError(f"load_refiner: {name!r} must be callable, got {type(found).__name__}")
    refiner: Refiner = found
    return refiner
