"""One HTML file that shows what a run found: numbers, curves, thresholds, classes and pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protoseg import _page
from protoseg._overlay import HEAT, overlay, palette
from protoseg._page import Line, Mark

__all__ = ["Picture", "overlay", "write_report"]

_SHOWN = 6  # pictures of each kind: best, worst, without a score
_NAMES = {"cam": "CAM", "instance": "Instance", "pacam": "PACAM", "eval": "held-out", "train": "training"}
_COLOURS = {"cam": "#8a94a3", "instance": "#e08a00", "pacam": "#0b6bcb", "segmentation": "#1a8f5a"}
_MORE_COLOURS = ("#8b5cf6", "#c2410c", "#0e7490", "#be185d", "#4d7c0f")


class Picture(NamedTuple):
    """A picture for the report.

    Attributes:
        id: Its name.
        image: ``[3, H, W]`` uint8.
        truth: ``[H, W]`` integer mask (0 = background, 1..C, 255 = void), or None when there is none.
        panels: What to show beside it, by column heading: ``[H, W]`` floating point maps in 0..1 or integer masks.
        score: What pictures are ranked by, such as the picture's IoU, 0..1; None if unknown.
        tags: Names of the classes in the picture.
    """

    id: str
    image: Tensor
    truth: Tensor | None
    panels: Mapping[str, Tensor]
    score: float | None = None
    tags: Sequence[str] = ()


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    metrics: Mapping[str, Any],
    history: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    sweeps: Mapping[str, Mapping[str, tuple[Any, Any]]] | None = None,
    pictures: Sequence[Picture] = (),
    classes: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write one HTML file that needs no other: no script, no network, pictures and plots inside.

    A part that is missing is left out of the page, and so is the section that would show it; a number that is
    missing or NaN is a dash. All text is escaped. The file appears in one step: no reader sees half of it.

    Args:
        path: The file, conventionally ``report.html``; missing folders are made.
        title: The heading.
        metrics: What ``metrics.json`` holds. Read are ``method``, ``seed``, ``seconds``, ``peak_memory_mb``,
            ``versions`` (name -> version); ``maps`` (split -> map -> ``miou``, ``threshold``, ``per_class`` (class name ->
            IoU or None), ``miou_mask_free``, ``threshold_mask_free``); ``pseudo_masks`` and ``segmentation``
            (split -> ``miou`` and, at will, ``per_class``). All IoU and thresholds are 0..1.
        history: Curves by name, such as loss terms and learning rate, each a sequence of (step, value).
        sweeps: Split -> map -> (thresholds ``[T]``, mIoU ``[T]``), tensors or sequences, 0..1.
        pictures: Pictures to choose from. The six best and six worst by score are shown, none twice, and up to six
            without a score.
        classes: Names of the C foreground classes in the order of the mask values 1..C, for the legend.
        config: The run's settings by name; ``command``, if there, is shown as the line that repeats the run.

    Raises:
        ImportError: There are curves but no matplotlib, or pictures but no PIL (the extra ``examples`` has both).
        TypeError: A picture is not uint8, see :func:`overlay`.
        ValueError: A panel or truth has not the size of its picture.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "report.html"
        ...     write_report(path, title="A run", metrics={"seed": 0, "maps": {"eval": {"cam": {"miou": 0.4}}}})
        ...     "40.0" in path.read_text(encoding="utf-8")
        True
    """
    sections = [
        ("results", "Results", _results(metrics)),
        ("training", "Training", _curves(history or {})),
        ("thresholds", "Thresholds", _sweeps(sweeps or {}, metrics)),
        ("classes", "Classes", _classes(metrics)),
        ("pictures", "Pictures", _pictures(pictures, classes)),
        ("run", "Run", _run(metrics, config or {})),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    body = [f"<header><h1>{escape(title)}</h1><nav>{links}</nav></header>", _cards(metrics)]
    body += [f'<section id="{name}"><h2>{heading}</h2>{html}</section>' for name, heading, html in sections]
    _page.write(Path(path), _page.document(title, "\n".join(body)))


def _name(key: str) -> str:
    return escape(_NAMES.get(key, key.replace("_", " ")))


def _colour(key: str) -> str:
    # Any other name gets a colour of its own that is the same in every section, and in every run.
    return _COLOURS.get(key) or _MORE_COLOURS[sum(key.encode()) % len(_MORE_COLOURS)]


def _keys(keys: Iterable[str], *more: str) -> str:
    """The legend of colours, one entry for each of ``keys``; ``more`` is HTML."""
    spans = [
        f'<span><i class="dot" style="background:{_colour(key)}"></i>{_name(key)}</span>'
        for key in dict.fromkeys(keys)
    ]
    return f'<div class="keys">{"".join([*spans, *(f"<span>{html}</span>" for html in more)])}</div>'


def _part(metrics: Mapping[str, Any], key: str) -> dict[str, Any]:
    """``metrics[key]`` without its empty splits; a stage that has not run may be absent, None or empty."""
    return {split: values for split, values in (metrics.get(key) or {}).items() if values}


def _difference(a: object, b: object) -> float | None:
    x, y = _page.number(a), _page.number(b)
    return None if x is None or y is None else x - y


def _cards(metrics: Mapping[str, Any]) -> str:
    cards = []
    for split, maps in _part(metrics, "maps").items():
        known = {
            key: value["miou"] for key, value in maps.items() if _page.number(value.get("miou")) is not None
        }
        if known:
            best = max(known, key=lambda key: float(known[key]))
            over = _difference(known[best], known.get("cam"))
            note = f"{_page.points(over)} over CAM" if over is not None and best != "cam" else "the best map"
            cards.append((_page.percent(known[best]), f"{_name(best)}, {_name(split)}", note))
    for key, heading in (("pseudo_masks", "Pseudo masks"), ("segmentation", "Segmentation")):
        for split, values in _part(metrics, key).items():
            cards.append((_page.percent(values.get("miou")), f"{heading}, {_name(split)}", "mIoU in percent"))
    if _page.number(metrics.get("seconds")) is not None:
        memory = _page.number(metrics.get("peak_memory_mb"))
        note = "" if memory is None else f"{memory:,.0f} MB at the peak"
        cards.append((_page.duration(metrics["seconds"]), "Time", note))
    html = "".join(
        f'<div class="card"><span>{heading}</span><b>{value}</b><small>{note}</small></div>'
        for value, heading, note in cards
    )
    return f'<div class="cards">{html}</div>' if html else ""


def _results(metrics: Mapping[str, Any]) -> str:
    rows = []
    for split, maps in _part(metrics, "maps").items():
        top = max((_page.number(value.get("miou")) or 0 for value in maps.values()), default=0)
        for i, (key, value) in enumerate(maps.items()):
            miou, blind = value.get("miou"), value.get("miou_mask_free")
            best = " best" if miou is not None and miou == top else ""
            over = None if key == "cam" else _difference(miou, maps.get("cam", {}).get("miou"))
            cells = [
                f'<td class="n{best}">{_page.percent(miou)}</td>',
                *(
                    f'<td class="n">{text}</td>'
                    for text in (
                        _page.points(over),
                        _page.fixed(value.get("threshold")),
                        _page.percent(blind),
                        _page.fixed(value.get("threshold_mask_free")),
                        _page.points(_difference(blind, miou)),
                    )
                ),
            ]
            rows.append(
                _result_row(
                    split, f'<i class="dot" style="background:{_colour(key)}"></i>{_name(key)}', cells, i == 0
                )
            )
    for key, heading in (("pseudo_masks", "pseudo masks"), ("segmentation", "segmentation network")):
        for split, values in _part(metrics, key).items():
            cells = [
                f'<td class="n">{_page.percent(values.get("miou"))}</td>',
                f'<td class="n">{_page.DASH}</td>' * 5,
            ]
            rows.append(_result_row(split, heading, cells, True))
    if not rows:
        return ""
    return (
        "<p>Mean IoU over background and classes, in percent. A threshold chosen with masks is the best of a sweep and "
        "flatters; one chosen without masks is what a user without masks gets, and costs what the last column says.</p>"
        '<div class="scroll"><table class="numbers"><thead>'
        '<tr><th colspan="2"></th><th class="g" colspan="3">Threshold chosen with masks</th>'
        '<th class="g" colspan="3">Threshold chosen without masks</th></tr>'
        '<tr><th>Pictures</th><th>Map</th><th class="n">mIoU</th><th class="n">over CAM</th><th class="n">threshold</th>'
        '<th class="n">mIoU</th><th class="n">threshold</th><th class="n">change</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _result_row(split: str, heading: str, cells: Sequence[str], first: bool) -> str:
    mark = ' class="first"' if first else ""
    return f'<tr{mark}><td>{_name(split) if first else ""}</td><th scope="row">{heading}</th>{"".join(cells)}</tr>'


def _finite(points: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
    pairs = ((float(x), math.nan if y is None else float(y)) for x, y in points)
    return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Moving average over about a twentieth of the curve, without the pull towards zero at its start."""
    keep = 1 - 20 / len(points)
    total = weight = 0.0
    out = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        out.append((x, total / weight))
    return out


def _curves(history: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    figures = []
    for name, curve in history.items():
        points = _finite(curve)
        if not points:
            continue
        colour = _COLOURS["pacam"]
        noisy = len(points) > 60
        lines = (
            [Line(points, colour, True), Line(_smooth(points), colour)] if noisy else [Line(points, colour)]
        )
        svg = _page.plot(lines, (), label=name, x_label="step", size=(3.7, 2.1))
        figures.append(f"<figure><figcaption>{_name(name)}</figcaption>{svg}</figure>")
    return (
        f'<p>Pale: every logged value. Full: their moving average.</p><div class="plots">{"".join(figures)}</div>'
        if figures
        else ""
    )


def _sweeps(sweeps: Mapping[str, Mapping[str, tuple[Any, Any]]], metrics: Mapping[str, Any]) -> str:
    figures = []
    for split, maps in sweeps.items():
        lines, marks = [], []
        for key, (thresholds, miou) in maps.items():
            points = [(t, 100 * y) for t, y in _finite(zip(thresholds, miou, strict=True))]
            if not points:
                continue
            lines.append(Line(points, _colour(key)))
            chosen = _part(metrics, "maps").get(split, {}).get(key, {})
            for suffix, filled in (("", True), ("_mask_free", False)):
                x, y = (
                    _page.number(chosen.get("threshold" + suffix)),
                    _page.number(chosen.get("miou" + suffix)),
                )
                if x is not None and y is not None:
                    marks.append(Mark(x, 100 * y, _colour(key), filled))
        if lines:
            svg = _page.plot(
                lines, marks, label=f"mIoU by threshold, {split}", x_label="threshold", size=(5.2, 2.9)
            )
            figures.append(
                f"<figure><figcaption>mIoU in percent, {_name(split)} pictures</figcaption>{svg}</figure>"
            )
    if not figures:
        return ""
    legend = _keys(
        (key for maps in sweeps.values() for key in maps), "● chosen with masks", "○ chosen without masks"
    )
    return (
        "<p>A pixel is foreground where its best class scores at least the threshold. A broad top forgives a threshold "
        f'that is off; a narrow one does not.</p>{legend}<div class="plots wide">{"".join(figures)}</div>'
    )


def _classes(metrics: Mapping[str, Any]) -> str:
    """IoU of each class: one group of bars a class, one bar a map."""
    series: dict[str, dict[str, Mapping[str, Any]]] = {}
    for split, maps in _part(metrics, "maps").items():
        series[split] = {key: value["per_class"] for key, value in maps.items() if value.get("per_class")}
    for split, values in _part(metrics, "segmentation").items():
        if values.get("per_class"):
            series.setdefault(split, {})["segmentation"] = values["per_class"]
    html = []
    for split, tables in series.items():
        groups = []
        for name in dict.fromkeys(name for table in tables.values() for name in table):
            bars = "".join(_bar(_colour(key), table.get(name)) for key, table in tables.items())
            groups.append(f'<div class="class"><span>{escape(str(name))}</span><div>{bars}</div></div>')
        if groups:
            html.append(
                f'<h3>IoU in percent, {_name(split)} pictures</h3>{_keys(tables)}<div class="bars">{"".join(groups)}</div>'
            )
    return "".join(html)


def _bar(colour: str, value: object) -> str:
    width = 100 * min(max(_page.number(value) or 0, 0), 1)
    return f'<div class="bar"><i><i style="width:{width:.1f}%;background:{colour}"></i></i><span>{_page.percent(value)}</span></div>'


def _pictures(pictures: Sequence[Picture], classes: Sequence[str]) -> str:
    scored = [picture for picture in pictures if _page.number(picture.score) is not None]
    scored.sort(key=lambda picture: -float(picture.score or 0))
    groups = {
        "Best": scored[: min(_SHOWN, (len(scored) + 1) // 2)],
        "Worst": scored[::-1][: min(_SHOWN, len(scored) // 2)],
        "Without a score": [picture for picture in pictures if _page.number(picture.score) is None][:_SHOWN],
    }
    shown = [picture for group in groups.values() for picture in group]
    if not shown:
        return ""
    layers = [
        layer for p in shown for layer in (*p.panels.values(), *(() if p.truth is None else (p.truth,)))
    ]
    html = [_legend(layers, classes)]
    columns = list(dict.fromkeys(name for picture in shown for name in picture.panels))
    truth = ["truth"] if any(picture.truth is not None for picture in shown) else []
    for heading, group in groups.items():
        if group:
            heads = "".join(f"<th>{_name(name)}</th>" for name in ["image", *truth, *columns])
            rows = "".join(_picture(picture, bool(truth), columns) for picture in group)
            width = 1 + len(truth) + len(columns)
            html.append(
                f'<h3>{heading}</h3><div class="scroll"><table class="pictures" style="--columns:{width}">'
                f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
            )
    return "".join(html)


def _picture(picture: Picture, truth: bool, columns: Sequence[str]) -> str:
    layers = [("truth", picture.truth)] if truth else []
    layers += [(name, picture.panels.get(name)) for name in columns]
    cells = [f"<td>{_image(picture.image, f'{picture.id}: image')}</td>"]
    for name, layer in layers:
        shown = (
            _page.DASH if layer is None else _image(overlay(picture.image, layer), f"{picture.id}: {name}")
        )
        cells.append(f"<td>{shown}</td>")
    tags = "".join(f'<span class="tag">{escape(str(tag))}</span>' for tag in picture.tags)
    score = f"<b>{_page.percent(picture.score)}</b>"
    row = f'<th class="row" colspan="{len(cells)}">{score}<code>{escape(picture.id)}</code>{tags}</th>'
    return f"<tr>{row}</tr><tr>{''.join(cells)}</tr>"


def _image(image: Tensor, label: str) -> str:
    return f'<img alt="{escape(label)}" src="{_page.data_uri(image)}">'


def _legend(layers: Sequence[Tensor], classes: Sequence[str]) -> str:
    """The colours of the heat maps, and of the classes that occur in the masks."""
    masks = [layer.flatten().long() for layer in layers if not layer.is_floating_point()]
    values = sorted(set(torch.cat(masks).tolist()) - {0}) if masks else []
    entries = []
    if len(masks) < len(layers):
        steps = ",".join(f"rgb{colour}" for colour in HEAT)
        entries.append(f'score 0<i class="heat" style="background:linear-gradient(90deg,{steps})"></i>1')
    for value in values:
        name = "void" if value == 255 else classes[value - 1] if value <= len(classes) else f"class {value}"
        colour = tuple(palette()[value].tolist())
        entries.append(f'<i class="dot" style="background:rgb{colour}"></i>{escape(str(name))}')
    return _keys((), *entries)


def _run(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    memory = _page.number(metrics.get("peak_memory_mb"))
    facts = {
        "method": metrics.get("method"),
        "seed": metrics.get("seed"),
        "time": _page.duration(metrics["seconds"]) if metrics.get("seconds") is not None else None,
        "peak memory": None if memory is None else f"{memory:,.0f} MB",
        **(metrics.get("versions") or {}),
    }
    command = config.get("command")
    repeat = "" if command is None else f"<h3>Command</h3><pre>{escape(_text(command))}</pre>"
    lists = [
        ("Facts", facts),
        ("Settings", {key: value for key, value in config.items() if key != "command"}),
    ]
    halves = [
        f"<div><h3>{heading}</h3>{_list(entries)}</div>" for heading, entries in lists if _list(entries)
    ]
    return repeat + (f'<div class="halves">{"".join(halves)}</div>' if halves else "")


def _list(entries: Mapping[str, Any]) -> str:
    items = [
        f"<dt>{escape(str(key))}</dt><dd>{escape(_text(value))}</dd>"
        for key, value in entries.items()
        if value is not None
    ]
    return f"<dl>{''.join(items)}</dl>" if items else ""


def _text(value: object) -> str:
    """A setting as text: containers as JSON, which reads the same in every Python."""
    return json.dumps(value, default=str) if isinstance(value, (dict, list, tuple, bool)) else str(value)
