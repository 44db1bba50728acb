"""Draw the layers that import-linter checks: ``python docs/make_layers.py`` writes ``_static/layers.svg``.

The layers and their order are those of the contract in pyproject.toml. The boxes bring their own background, so that
the drawing is legible on a light page and on a dark one. Needs Python 3.11 for tomllib.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import tomllib

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "_static" / "layers.svg"

# What is in a part, one text a line; a part beside another one has half the width.
WORDS = {
    "recipes": ["full pipelines, the command protoseg"],
    "report": ["the page that a run leaves behind"],
    "clip": ["a frozen CLIP: features, maps, masks"],
    "models": ["backbones, weights, networks, decoders"],
    "data": ["pictures with tags", "or sentences"],
    "tap": ["a bank in a network", "of your own"],
    "modules": ["banks, regularizer, contrast"],
    "metrics": ["mIoU, thresholds, contrast"],
    "functional": ["the mathematics, as pure functions"],
    "utils": ["checks, precision, files, processes"],
}

# In pixels on a phone, where the drawing has its own size.
WIDTH = 340
GAP = 22
LINE = 19
EDGE = 9
STYLE = """
  rect { fill: #2a5b84; }
  text { fill: #ffffff; font-family: sans-serif; font-size: 14px; text-anchor: middle; }
  .name { font-family: monospace; font-size: 15px; font-weight: bold; }
  path { stroke: #7d8793; stroke-width: 2; fill: none; }
"""


def layers() -> list[list[str]]:
    """The parts of the package by layers, the highest first, as the contract names them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (each for each in settings["tool"]["importlinter"]["contracts"] if each["type"] == "layers")
    return [[part.strip().removeprefix("protoseg.") for part in layer.split("|")] for layer in contract["layers"]]


def shares(count: int) -> list[tuple[float, float]]:
    """Left edge and width of each of so many boxes side by side."""
    width = (WIDTH - GAP * (count - 1)) / count
    return [(place * (width + GAP), width) for place in range(count)]


def box(part: str, left: float, top: float, width: float, height: float) -> list[str]:
    """A part: its name, and below it what is in it."""
    middle = left + width / 2
    lines = [f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="6"/>']
    for number, text in enumerate([part, *WORDS[part]]):
        kind = ' class="name"' if number == 0 else ""
        baseline = top + EDGE + LINE * (number + 0.75)
        lines.append(f'<text{kind} x="{middle:g}" y="{baseline:g}">{escape(text)}</text>')
    return lines


def arrow(middle: float, top: float) -> str:
    """An arrow through the gap below a box."""
    tip = top + GAP - 3
    return f'<path d="M{middle:g} {top + 3:g} V{tip:g} m-5 -6 l5 6 l5 -6"/>'


def draw() -> str:
    """The drawing, as SVG."""
    rows = layers()
    body: list[str] = []
    top = 0.0
    for parts, below in zip(rows, [*rows[1:], []], strict=True):
        height = 2 * EDGE + LINE * (1 + max(len(WORDS[part]) for part in parts))
        for part, (left, width) in zip(parts, shares(len(parts)), strict=True):
            body += box(part, left, top, width, height)
        if below:
            body += [arrow(left + width / 2, top + height) for left, width in shares(max(len(parts), len(below)))]
        top += height + GAP

    size = f'width="{WIDTH}" height="{top - GAP:g}" viewBox="0 0 {WIDTH} {top - GAP:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="The layers of protoseg">'
    return "\n".join([head, f"<style>{STYLE}</style>", *body, "</svg>", ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Write ``layers.svg``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    args.output.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
