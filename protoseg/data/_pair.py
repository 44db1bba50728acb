"""A picture with its sentence, as every source of pairs gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

__all__ = ["Pair", "T"]


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


if TYPE_CHECKING:  # a default needs Python 3.13 or typing_extensions, which only a type checker is sure to have
    from typing_extensions import TypeVar

    T = TypeVar("T", default=Pair)
else:
    from typing import TypeVar

    T = TypeVar("T")
