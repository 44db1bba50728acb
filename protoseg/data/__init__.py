"""Pictures with image-level tags: made scenes and VOC-layout folders."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Sample", "UnreadableFileError"]


class Sample(NamedTuple):
    """One picture with everything that is known about it.

    Attributes:
        id: Name without folder or ending, unique in the data set.
        image: ``[3, H, W]`` uint8, RGB.
        labels: ``[C]`` float32, 1 where the foreground class is in the picture.
        mask: ``[H, W]`` uint8 or ``None``; 0 = background, 1..C = classes, 255 = void. For scoring only.
        caption: A sentence about the picture, or ``None``.
    """

    id: str
    image: Tensor
    labels: Tensor
    mask: Tensor | None = None
    caption: str | None = None


class UnreadableFileError(ValueError):
    """A picture or mask is missing, truncated or of the wrong form; the message starts with its path."""

    def __init__(self, path: object, problem: str | None = None) -> None:
        # A data loader rebuilds a worker's error from its message alone.
        super().__init__(str(path) if problem is None else f"{path}: {problem}")
