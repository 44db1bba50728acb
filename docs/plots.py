"""Bars and curves with words that can still be read on a phone: for the gallery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

STYLE: Any = {
    "font.size": 16,  # a phone shows a plot at half of its width
    "axes.titlesize": 16,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
COLORS = ("#4269d0", "#efb118", "#8a8f98")
SIZE = (7.6, 3.2)  # of a panel, in inches


class Bars(NamedTuple):
    """A panel of bars.

    Attributes:
        title: Above it.
        names: Below the bars.
        heights: Of the bars, by what their color means.
    """

    title: str
    names: Sequence[str]
    heights: Mapping[str, Sequence[float]]


class Curves(NamedTuple):
    """A panel of curves over 1, 2, 3 and so on.

    Attributes:
        title: Above it.
        values: Of the curves, by what their color means.
    """

    title: str
    values: Mapping[str, Sequence[float]]


def write_bars(panels: Sequence[Bars], path: Path) -> None:
    """Draw panels of bars, one below the other."""
    with rc_context(STYLE):
        figure, axes = _blank(len(panels))
        for axis, panel in zip(axes, panels, strict=True):
            places = np.arange(len(panel.names))
            width = 0.8 / len(panel.heights)
            for number, (name, heights) in enumerate(panel.heights.items()):
                axis.bar(places + width * number, heights, width, label=name, color=COLORS[number])

            axis.set_xticks(places + width * (len(panel.heights) - 1) / 2, panel.names)
            _head(axis, panel.title, legend=len(panel.heights) > 1)
        figure.savefig(path)


def write_curves(panels: Sequence[Curves], path: Path, x_label: str) -> None:
    """Draw panels of curves from 0, one below the other; the first one says what the colors mean."""
    with rc_context(STYLE):
        figure, axes = _blank(len(panels))
        for number, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
            for color, (name, values) in zip(COLORS, panel.values.items(), strict=False):
                axis.plot(range(1, len(values) + 1), values, "o-", label=name, color=color, linewidth=2.5)

            axis.set_ylim(0, 1.1 * max(map(max, panel.values.values())))
            _head(axis, panel.title, legend=number == 0)
        axes[-1].set_xlabel(x_label)
        figure.savefig(path)


def _head(axis: Any, title: str, *, legend: bool) -> None:
    """Write the title above a panel and, between the two, what the colors mean."""
    axis.set_title(title, loc="left", pad=36 if legend else None)
    if legend:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, handlelength=1, ncols=len(COLORS))


def _blank(panels: int) -> tuple[Figure, list[Any]]:
    """An empty figure, not pyplot's, and its panels."""
    width, height = SIZE
    figure = Figure(figsize=(width, height * panels), dpi=100, layout="constrained")
    return figure, list(figure.subplots(panels, squeeze=False)[:, 0])
