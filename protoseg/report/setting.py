"""How a report is set: the frame of its page, and numbers, line plots and pictures as text within it."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from protoseg.utils.extras import require
from protoseg.utils.files import replacing

DASH = "\N{EN DASH}"
_LONGEST_SIDE = 400  # pixels of a picture in the file; it is shown at about half of that
_INK, _GRID = "#5b6573", "#e7eaee"

_STYLE = """
:root { color-scheme: light; --ink: #17202c; --soft: #5b6573; --line: #e3e7ec; --page: #f5f6f8; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 36px 20px 48px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -.01em; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 24px 0 8px; }
p { margin: 4px 0 16px; color: var(--soft); max-width: 78ch; }
header p { margin: 4px 0 0; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 14px 0 24px; }
nav a { color: #0b6bcb; text-decoration: none; }
nav a:hover { text-decoration: underline; }
section, .card { background: #fff; border: 1px solid var(--line); border-radius: 12px; }
section { padding: 22px 24px; margin-top: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 14px; }
.card { padding: 14px 18px; }
.card h3 { margin: 0; font-size: 13px; }
.card b { display: block; font-size: 29px; line-height: 1.3; letter-spacing: -.02em; }
.card small { color: var(--soft); font-size: 12.5px; }
.card b, table, dd { font-variant-numeric: tabular-nums; }
.up { color: #13794a; }
.down { color: #b3261e; }
.scroll { overflow-x: auto; margin: 0 -24px; padding: 0 24px; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; font-size: 12.5px; color: var(--soft); }
.numbers th, .numbers td { padding: 7px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
.numbers .n { text-align: right; }
.numbers tbody th { color: var(--ink); font-size: 14px; }
.numbers tr:last-child > * { border-bottom: 0; }
.numbers tbody .first > * { border-top: 2px solid var(--line); }
.numbers .best { font-weight: 700; }
.numbers .left { border-left: 1px solid var(--line); }
.keys { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-bottom: 12px; }
.keys { color: var(--soft); font-size: 13px; }
.dot, .heat { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px; }
.heat { width: 110px; margin-left: 7px; }
.plots, .bars, .halves { display: grid; }
.plots { gap: 16px 26px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); }
.plots.wide { grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
figure { margin: 0; max-width: 660px; }
figcaption { font-weight: 600; font-size: 13.5px; overflow-wrap: anywhere; }
.plot { display: block; width: 100%; height: auto; }
.plot * { stroke-linejoin: round; }
.plot text { font-family: inherit !important; }
.bars { gap: 12px 36px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.class { display: grid; grid-template-columns: 92px 1fr; gap: 12px; align-items: center; font-size: 13px; }
.class > span { overflow-wrap: anywhere; line-height: 1.25; }
.bar { display: grid; grid-template-columns: 1fr 38px; gap: 8px; align-items: center; height: 14px; }
.bar i { display: block; background: #f0f2f5; border-radius: 3px; }
.bar i i { height: 9px; }
.bar span { text-align: right; font-size: 11.5px; color: var(--soft); font-variant-numeric: tabular-nums; }
.pictures { table-layout: fixed; border-collapse: separate; border-spacing: 6px 0; }
.pictures { width: calc(100% + 12px); margin: 0 -6px; }
.pictures th { padding: 0; }
.pictures td { padding: 0; vertical-align: top; color: var(--soft); }
.pictures .row { padding: 12px 0 5px; font-weight: 400; }
.pictures .row code { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
.pictures .row span { margin-left: 6px; padding: 1px 9px; border-radius: 99px; }
.pictures .row span { background: #eaf2fb; color: #0a4d92; }
.pictures .row b { float: right; }
.pictures .row b::before { content: "score "; font-weight: 400; }
.pictures img { display: block; width: 100%; border-radius: 5px; background: var(--line); }
.halves { gap: 0 40px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
dl { display: grid; grid-template-columns: minmax(90px, max-content) 1fr; gap: 5px 20px; }
dl { margin: 0; font-size: 14px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--page); border-radius: 8px; padding: 10px 14px; margin: 6px 0 0; overflow-x: auto; }
@media (max-width: 640px) {
  main { padding: 20px 10px 32px; }
  h1 { font-size: 24px; }
  section { padding: 16px; }
  .cards, .plots { grid-template-columns: 1fr 1fr; gap: 10px; }
  .plots.wide { grid-template-columns: 1fr; }
  .scroll { margin: 0 -16px; padding: 0 16px; }
  .pictures { min-width: calc(var(--columns) * 130px); }
}
@media print {
  body { background: #fff; }
  nav { display: none; }
  tr, figure, .card, .class { break-inside: avoid; }
}
"""


class Line(NamedTuple):
    """One curve of a plot: points (x, y), a colour as #rrggbb, and whether it is drawn thin and pale."""

    points: Sequence[tuple[float, float]]
    colour: str
    pale: bool = False


class Mark(NamedTuple):
    """One point of a plot, filled or as a ring."""

    x: float
    y: float
    colour: str
    filled: bool


def document(title: str, body: str) -> str:
    """A whole page; ``title`` is escaped, ``body`` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def write(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` in one step, so that no reader sees half a file and no crash leaves one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write_text(text, encoding="utf-8")


def number(value: Any) -> float | None:
    """``value``, of any type that has a number, as a float; None when it is missing, NaN, infinite or no number."""
    try:
        some = float(value)
    except (TypeError, ValueError):
        return None
    return some if math.isfinite(some) else None


def percent(value: object) -> str:
    """A share 0..1 as a percentage with one digit, a dash when there is none."""
    share = number(value)
    return DASH if share is None else f"{100 * share:.1f}"


def fixed(value: object, digits: int = 3) -> str:
    """A number with ``digits`` digits, a dash when there is none."""
    some = number(value)
    return DASH if some is None else f"{some:.{digits}f}"


def difference(value: float | None) -> str:
    """A difference of shares in points with its sign and colour, as HTML; a dash when there is none."""
    if value is None:
        return DASH
    text = f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")
    kind = "" if text[1:] == "0.0" else ' class="up"' if value > 0 else ' class="down"'
    return f"<span{kind}>{text}</span>"


def duration(value: object) -> str:
    """Seconds as people say them, a dash when there are none."""
    seconds = number(value)
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def finite(points: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
    """The points (x, y) whose both numbers are finite; None, NaN and infinity leave a point out."""
    pairs = ((number(x), number(y)) for x, y in points)
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean of y over a window around each point, a twentieth of the curve wide and half of that at its ends.

    The window is centred, so a falling curve is not drawn too high, as a running average would draw it.
    """
    reach = max(1, len(points) // 40)
    out = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        out.append((x, sum(window) / len(window)))
    return out


def plot(lines: Sequence[Line], marks: Sequence[Mark], *, label: str, x_label: str, size: tuple[float, float]) -> str:
    """Curves as an ``<svg>`` element that scales with the page and uses its font.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "write_report", "examples")
    Figure = require("matplotlib.figure", "write_report", "examples").Figure
    MaxNLocator = require("matplotlib.ticker", "write_report", "examples").MaxNLocator

    # A Figure of its own, not pyplot: no window system, no global state of the caller is touched.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "protoseg", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            x, y = zip(*line.points, strict=True)
            axes.plot(x, y, color=line.colour, lw=1 if line.pale else 1.8, alpha=0.3 if line.pale else 1)
        for mark in marks:
            face, edge = (mark.colour, "white") if mark.filled else ("white", mark.colour)
            axes.plot(mark.x, mark.y, "o", ms=7, mfc=face, mec=edge, mew=1.6)
        axes.grid(axis="y", color=_GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(length=0, colors=_INK)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(axis="y", scilimits=(-2, 5), useOffset=False)
        axes.margins(x=0.02)
        axes.set_xlabel(x_label, color=_INK)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    # What a page does not need: the XML head, metadata and name spaces (they hold addresses), the style
    # (it would reach beyond the picture), numbered names (they would repeat), and the fixed size.
    head = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"
    svg = re.sub(head, "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:\w+)?|id)="([^"]*://[^"]*|[\w.]+_\d+)"', "", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    start = f'<svg class="plot" role="img" aria-label="{escape(label)}" {view.group() if view else ""}>'
    return re.sub(r"^<svg[^>]*>", lambda _: start, svg)


def data_uri(image: Tensor) -> str:
    """``[3, H, W]`` uint8 as the address of a JPEG that the address itself holds, at most 400 pixels long.

    Raises:
        ImportError: PIL is not installed.
    """
    Image = require("PIL.Image", "write_report", "examples")
    picture = Image.fromarray(image.detach().cpu().permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
