"""Maps as other code bases read them: a ``.npy`` with a dictionary."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.functional import with_background
from protoseg.utils import checks
from protoseg.utils.files import replacing

__all__ = ["Form", "save_maps"]

Form = Literal["irn", "psa", "puzzle", "sipe", "clip-es"]


def save_maps(path: Path | str, maps: Tensor, labels: Tensor, *, form: Form = "irn", stride: int = 4) -> None:
    """Write a picture's maps as the next stage of a code base reads them.

    ``keys`` are the present classes, counted from 0 without background; where background is among them, it is 0 and the
    others count from 1. Maps are float32 in 0..1, of the picture's size, but for ``cam``, a tensor at ``1 / stride`` of
    its sides, rounded up:

    - ``"irn"``, which AMN, AdvCAM and ReCAM have from IRN: ``{"keys", "cam", "high_res"}``, without background
    - ``"psa"``, which SEAM, EPS, OC-CSE, MCTformer and WeakTr have from PSA: ``{class: map}``, without background
    - ``"puzzle"``, PuzzleCAM: ``{"keys", "cam", "hr_cam"}``, background among the keys and not among the maps
    - ``"sipe"``, SIPE and SFC: ``{"keys", "IS_CAM", "IS_CAM1"}``, background first, one minus the largest
    - ``"clip-es"``, CLIP-ES: ``{"keys", "attn_highres"}``, without background

    They are read with ``np.load(path, allow_pickle=True).item()``. The file is replaced in one step.

    Args:
        path: Its name, which ends in ``.npy``.
        maps: ``[C, H, W]`` of the picture's size, one of :class:`protoseg.tap.Maps`.
        labels: ``[C]`` multi-hot.
        form: Of the dictionary.
        stride: Of ``cam``, at least 1.

    Raises:
        ValueError: Wrong shapes, a name with another ending, values outside 0..1, an unknown form or a stride below 1.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_maps(f"{folder}/2007_000032.npy", torch.rand(3, 9, 13), torch.tensor([0, 1, 1]))
        ...     read = np.load(f"{folder}/2007_000032.npy", allow_pickle=True).item()
        >>> read["keys"].tolist(), tuple(read["cam"].shape), read["high_res"].shape
        ([1, 2], (2, 3, 4), (2, 9, 13))
    """
    me, path = "save_maps", Path(path)
    checks.choice(me, "form", form, get_args(Form))
    checks.positive(me, "stride", stride)
    checks.shape(me, "maps", maps, ("C", "H", "W"), "pass one picture's maps, without background")
    checks.shape(me, "labels", labels, (len(maps),), "pass one picture's labels")
    checks.within_unit_interval(me, "maps", maps)
    if path.suffix != ".npy":
        raise ValueError(f"{me}: path must end in .npy, got {path.name!r}")

    keys = (labels > 0).nonzero()[:, 0].cpu()
    written = _dictionary(form, maps.detach().float().cpu()[keys], keys, stride)
    with replacing(path) as file, file.open("wb") as stream:
        np.save(stream, np.array(written, dtype=object), allow_pickle=True)


def _dictionary(form: Form, maps: Tensor, keys: Tensor, stride: int) -> dict[Any, Any]:
    behind_background = F.pad(keys + 1, (1, 0)).numpy()
    if form == "irn":
        return {"keys": keys.numpy(), "cam": _strided(maps, stride), "high_res": maps.numpy()}
    if form == "psa":
        return dict(zip(keys.tolist(), maps.numpy(), strict=True))
    if form == "puzzle":
        return {"keys": behind_background, "cam": _strided(maps, stride), "hr_cam": maps.numpy()}
    if form == "clip-es":
        return {"keys": keys.numpy(), "attn_highres": maps.numpy()}
    whole = np.ones((1, *maps.shape[1:]), np.float32)
    if len(keys):
        whole = with_background(maps[None])[0].numpy()
    return {"keys": behind_background, "IS_CAM": whole, "IS_CAM1": whole.copy()}


def _strided(maps: Tensor, stride: int) -> Tensor:
    size = [(side - 1) // stride + 1 for side in maps.shape[-2:]]
    if not len(maps):
        return torch.zeros(0, *size)
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)
