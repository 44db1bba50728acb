"""Maps as other code bases read them: a ``.npy`` with a dictionary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.utils import checks
from protoseg.utils.files import replacing

__all__ = ["save_maps"]


def save_maps(path: Path | str, maps: Tensor, labels: Tensor, *, stride: int = 4) -> None:
    """Write a picture's maps as IRN, AMN and PSA read them: ``{"keys", "cam", "high_res"}``.

    ``keys`` are the present classes, from 0 without background (int64 ``[N]``); ``cam`` their maps at ``1 / stride`` of
    the picture's sides, rounded up, a tensor; ``high_res`` the maps of its size, an array. Both are float32 in 0..1.
    They read the file with ``np.load(path, allow_pickle=True).item()``. It is replaced in one step.

    Args:
        path: Its name, which ends in ``.npy``.
        maps: ``[C, H, W]`` of the picture's size, one of :class:`protoseg.tap.Maps`.
        labels: ``[C]`` multi-hot.
        stride: Of ``cam``, at least 1.

    Raises:
        ValueError: Wrong shapes, a name with another ending, values outside 0..1, or a stride below 1.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_maps(f"{folder}/2007_000032.npy", torch.rand(3, 9, 13), torch.tensor([0, 1, 1]))
        ...     read = np.load(f"{folder}/2007_000032.npy", allow_pickle=True).item()
        >>> read["keys"].tolist(), tuple(read["cam"].shape), read["high_res"].shape
        ([1, 2], (2, 3, 4), (2, 9, 13))
    """
    me, path = "save_maps", Path(path)
    checks.positive(me, "stride", stride)
    checks.shape(me, "maps", maps, ("C", "H", "W"), "pass one picture's maps, without background")
    checks.shape(me, "labels", labels, (len(maps),), "pass one picture's labels")
    checks.within_unit_interval(me, "maps", maps)
    if path.suffix != ".npy":
        raise ValueError(f"{me}: path must end in .npy, got {path.name!r}")

    keys = (labels > 0).nonzero()[:, 0].cpu()
    high = maps.detach().float().cpu()[keys]
    size = [(side - 1) // stride + 1 for side in maps.shape[-2:]]
    small = torch.zeros(0, *size)
    if len(keys):
        small = F.interpolate(high[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    written = {"keys": keys.numpy(), "cam": small.clamp(0, 1), "high_res": high.numpy()}
    with replacing(path) as file, file.open("wb") as stream:
        np.save(stream, np.array(written, dtype=object), allow_pickle=True)
