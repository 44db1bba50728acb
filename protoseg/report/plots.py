"""Curves as pictures in SVG, drawn by matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from protoseg.report.formats import number
from protoseg.utils.extras import require

INK = "#5b6573"
GRID = "#e7eaee"
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "protoseg", "font.size": 9}


class Line(NamedTuple):
    """One curve of a plot: points (x, y), a color as #rrggbb, and whether it is drawn thin and pale."""

    points: Sequence[tuple[float, float]]
    color: str
    pale: bool = False


class Mark(NamedTuple):
    """One point of a plot, filled or as a ring."""

    x: float
    y: float
    color: str
    filled: bool


def finite(points: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
    """The points (x, y) whose both numbers are finite; None, NaN and infinity leave a point out."""
    pairs = [(number(x), number(y)) for x, y in points]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean of y over a window around each point, a twentieth of the curve wide and half of that at its ends.

    The window is centered, so a falling curve is not drawn too high, as a running average would draw it.
    """
    reach = max(1, len(points) // 40)

    out = []
    for place, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, place - reach) : place + reach + 1]]
        out.append((x, sum(window) / len(window)))

    return out


def plot(lines: Sequence[Line], marks: Sequence[Mark], *, label: str, x_label: str, size: tuple[float, float]) -> str:
    """Curves as an ``<svg>`` element that scales with the page and uses its font.

    Args:
        lines: The curves, each of one point or more.
        marks: Points on top of them.
        label: What the picture shows, for readers who do not see it; it is escaped.
        x_label: Below the axis.
        size: Width and height in inches, to which the font's size refers.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "write_report", "recipes")
    figures = require("matplotlib.figure", "write_report", "recipes")

    file = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        # A figure of its own, not pyplot: no window system, no global state of the caller is touched.
        figure = figures.Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, lines, marks)
        _set_style(axes, x_label)
        figure.savefig(file, format="svg", transparent=True)

    return _for_page(file.getvalue(), label)


def _draw(axes: Any, lines: Sequence[Line], marks: Sequence[Mark]) -> None:
    for line in lines:
        x, y = zip(*line.points, strict=True)
        if line.pale:
            axes.plot(x, y, color=line.color, lw=1, alpha=0.3)
        else:
            axes.plot(x, y, color=line.color, lw=1.8, alpha=1)

    for mark in marks:
        if mark.filled:
            axes.plot(mark.x, mark.y, "o", ms=7, mfc=mark.color, mec="white", mew=1.6)
        else:
            axes.plot(mark.x, mark.y, "o", ms=7, mfc="white", mec=mark.color, mew=1.6)


def _set_style(axes: Any, x_label: str) -> None:
    ticker = require("matplotlib.ticker", "write_report", "recipes")

    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)

    axes.tick_params(length=0, colors=INK)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.ticklabel_format(axis="y", scilimits=(-2, 5), useOffset=False)

    axes.margins(x=0.02)
    axes.set_xlabel(x_label, color=INK)


def _for_page(svg: str, label: str) -> str:
    """An SVG file as an element of a page, without what the page does not need."""
    # The XML head; metadata, which hold addresses; and the style, which would reach beyond the picture.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)

    # Name spaces, which are addresses too, and numbered names, which every plot of the page would repeat.
    svg = re.sub(r' (xmlns(:\w+)?|id)="([^"]*://[^"]*|[\w.]+_\d+)"', "", svg)

    # The fixed size: the page gives one.
    view = re.search(r'viewBox="[^"]*"', svg)
    view_box = view.group() if view else ""
    start = f'<svg class="plot" role="img" aria-label="{escape(label)}" {view_box}>'
    return re.sub(r"^<svg[^>]*>", lambda _: start, svg)
