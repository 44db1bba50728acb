"""Pixel-adaptive refinement of maps by the picture's colors, and a plug for anything else, such as a dense CRF."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.utils import checks

__all__ = ["Refiner", "load_refiner", "pixel_adaptive_refine"]

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

    # 1. How alike a pixel and its neighbors are, in units of the local spread of colors.
    pictures, maps = images.float(), maps.float()
    around = torch.stack([view for d in dilations for view in _neighbors(pictures, d)], 2)
    floor = 1e-4 * pictures.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-8)
    spread = around.std(2, keepdim=True).maximum(floor.unsqueeze(2))
    distance = ((around - pictures.unsqueeze(2)).abs() / spread).mean(1, keepdim=True)
    share = torch.softmax(-sharpness * distance, dim=2)

    # 2. Rounds of means over the neighbors, weighted by that.
    for _ in range(iterations):
        neighbors = (view for dilation in dilations for view in _neighbors(maps, dilation))
        summed = torch.zeros_like(maps)
        for weight, view in zip(share.unbind(2), neighbors, strict=True):
            summed.addcmul_(weight, view)
        maps = summed
    return maps


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
