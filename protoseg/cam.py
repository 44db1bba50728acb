"""Class activation maps: background, multi-scale inference, masks, and thresholds that need no masks."""

from __future__ import annotations

import torch
from torch import Tensor


def with_background(cam: Tensor, power: float = 1.0) -> Tensor:
    r"""Put a background channel in front of normalised maps.

    .. math:: M_0(j) = \bigl(1 - \max_c M_c(j)\bigr)^{\alpha}

    Args:
        cam: ``[..., C, H, W]`` in ``[0, 1]``, absent classes 0.
        power: :math:`\alpha` above 0; larger means less background.

    Returns:
        ``[..., C+1, H, W]``.
    """
    background = 1 - cam.amax(-3, keepdim=True)
    return torch.cat([background if power == 1 else background**power, cam], -3)
