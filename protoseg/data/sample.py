"""What data sets give: a picture with tags, or a picture with a sentence; and the error of a file that is none."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

__all__ = ["Pair", "Sample", "T", "UnreadableFileError"]


class Sample(NamedTuple):
    """One picture with everything that is known about it.

    Attributes:
        id: Name without ending, unique in the data set; with folders where pictures lie in such.
        image: ``[3, H, W]`` uint8, RGB.
        labels: ``[C]`` float32, 1 where the foreground class is in the picture.
        mask: ``[H, W]`` uint8 or ``None``; 0 = background, 1..C = classes, 255 = void. For scoring only.
        caption: A sentence about the picture, or ``None``.
        size: Height and width of the picture's file where ``image`` may be smaller, else ``None``; scenes give theirs.
    """

    id: str
    image: Tensor
    labels: Tensor
    mask: Tensor | None = None
    caption: str | None = None
    size: tuple[int, int] | None = None


class Pair(NamedTuple):
    """A picture and what somebody said of it.

    Attributes:
        key: Its name: in a shard, what its files have in common; in a CSV, its path without the ending.
        image: ``[3, H, W]`` uint8, RGB; H and W differ from pair to pair.
        caption: The sentence, never empty.
        place: ``(worker, number)``: the ``number``-th pair, from 1, that this worker of this rank gives in the epoch;
            what `ShardPairs` needs to go on behind it. ``(0, 0)`` from other sources.
    """

    key: str
    image: Tensor
    caption: str
    place: tuple[int, int] = (0, 0)


class UnreadableFileError(ValueError):
    """A picture or mask is missing, truncated or of the wrong form; the message starts with its path."""

    def __init__(self, path: object, problem: str | None = None) -> None:
        # A data loader rebuilds a worker's error from its message alone.
        super().__init__(str(path) if problem is None else f"{path}: {problem}")


if TYPE_CHECKING:  # a default needs Python 3.13 or typing_extensions, which only a type checker is sure to have
    from typing_extensions import TypeVar

    T = TypeVar("T", default=Pair)
else:
    from typing import TypeVar

    T = TypeVar("T")
