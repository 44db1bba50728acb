"""How a report is set: the frame of the page, numbers, line plots and pictures as text that stands in the file."""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DASH = "–"
_LONGEST_SIDE = 400  # pixels of a picture in the file; it is shown at about half of that
_INK, _GRID = "#5b6573", "#e7eaee"

_STYLE = """
:root { --ink: #17202c; --soft: #5b6573; --line: #e3e7ec; --page: #f5f6f8; --accent: #0b6bcb; color-scheme: light; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 36px 20px 48px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.02em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -.01em; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 24px 0 8px; }
p { margin: 4px 0 16px; color: var(--soft); max-width: 78ch; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 14px 0 24px; }
nav a { color: var(--accent); text-decoration: none; } nav a:hover { text-decoration: underline; }
section { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px; margin-top: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 14px; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 12px; padding: 14px 18px; }
.card b { display: block; font-size: 29px; line-height: 1.25; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.card span { display: block; font-weight: 600; font-size: 13px; } .card small { color: var(--soft); font-size: 12.5px; }
.scroll { overflow-x: auto; margin: 0 -24px; padding: 0 24px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 12.5px; color: var(--soft); }
.numbers th, .numbers td { padding: 7px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
.numbers .n { text-align: right; } .numbers .g { text-align: center; } .numbers tbody th { color: var(--ink); font-size: 14px; }
.numbers tr:last-child > * { border-bottom: 0; } .numbers tr.first > * { border-top: 2px solid var(--line); }
.numbers .best { font-weight: 700; } .up { color: #13794a; } .down { color: #b3261e; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px; vertical-align: -.5px; }
.keys { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 12px; font-size: 13px; color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 14px 28px; }
.plots.wide { grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 13.5px; }
.plot { display: block; width: 100%; height: auto; } .plot * { stroke-linejoin: round; }
.plot text { font-family: inherit !important; }
.bars { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); gap: 12px 36px; }
.class { display: grid; grid-template-columns: 92px 1fr; gap: 0 12px; align-items: center; font-size: 13px; }
.class > span { overflow-wrap: anywhere; line-height: 1.25; }
.bar { display: grid; grid-template-columns: 1fr 38px; gap: 8px; align-items: center; height: 14px; font-size: 11.5px; }
.bar i { display: block; background: #f0f2f5; border-radius: 3px; } .bar i i { height: 9px; }
.bar span { text-align: right; color: var(--soft); font-variant-numeric: tabular-nums; }
.pictures { table-layout: fixed; } .pictures td { padding: 0 6px 0 0; vertical-align: top; color: var(--soft); }
.pictures thead th { padding: 0 0 2px; } .pictures .row { padding: 12px 0 5px; font-size: 13.5px; color: var(--ink); }
.pictures img { display: block; width: 100%; border-radius: 5px; background: var(--line); }
.row code { font-weight: 600; } .tag { background: #eaf2fb; color: #0a4d92; border-radius: 99px; padding: 1px 9px; margin-left: 6px;
  font-weight: 500; font-size: 12px; } .row b { float: right; font-variant-numeric: tabular-nums; }
.heat { display: inline-block; width: 110px; height: 10px; border-radius: 3px; margin: 0 7px; vertical-align: -.5px; }
dl { display: grid; grid-template-columns: minmax(110px, max-content) 1fr; gap: 5px 20px; margin: 0; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--page); border-radius: 8px; padding: 10px 14px; margin: 6px 0 16px; overflow-x: auto; }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 0 40px; }
@media (max-width: 640px) { main { padding: 20px 10px 32px; } h1 { font-size: 24px; } section { padding: 16px; }
  .scroll { margin: 0 -16px; padding: 0 16px; } .pictures { min-width: calc(var(--columns) * 130px); } }
@media print { body { background: #fff; } nav { display: none; } section, .card { break-inside: avoid-page; } }
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
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def write(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` in one step, so that a reader never sees half a file, nor a crash leaves one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def number(value: object) -> float | None:
    """``value`` as a float, None when it is missing, NaN, infinite or no number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def percent(value: object) -> str:
    """A share 0..1 as a percentage with one digit, a dash when there is none."""
    share = number(value)
    return DASH if share is None else f"{100 * share:.1f}"


def fixed(value: object, digits: int = 3) -> str:
    """A number with ``digits`` digits, a dash when there is none."""
    some = number(value)
    return DASH if some is None else f"{some:.{digits}f}"


def points(value: float | None) -> str:
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
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def plot(
    lines: Sequence[Line], marks: Sequence[Mark], *, label: str, x_label: str, size: tuple[float, float]
) -> str:
    """Curves as an ``<svg>`` element that scales with the page and uses its font.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('write_report: plots need matplotlib; pip install "protoseg[examples]"') from error
    # A Figure of its own, not pyplot: no window system, no global state of the caller is touched.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "protoseg", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            x, y = zip(*line.points, strict=True)
            axes.plot(x, y, color=line.colour, lw=1 if line.pale else 1.8, alpha=0.3 if line.pale else 1)
        for mark in marks:
            face = mark.colour if mark.filled else "white"
            axes.plot(
                mark.x, mark.y, "o", ms=7, mfc=face, mec=mark.colour if not mark.filled else "white", mew=1.6
            )
        axes.grid(axis="y", color=_GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(length=0, colors=_INK)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(x_label, color=_INK)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    # What a page does not need: the XML head, metadata and name spaces (they hold addresses), the style element (it
    # would reach beyond the picture), numbered names (they would repeat), and the fixed size.
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
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('write_report: pictures need pillow; pip install "protoseg[examples]"') from error
    picture = Image.fromarray(image.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
