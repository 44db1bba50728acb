"""One HTML file that shows what a run found: numbers, curves, thresholds, classes and pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protoseg.report import setting
from protoseg.report.overlays import HEAT, overlay, palette
from protoseg.report.setting import Line, Mark

__all__ = ["Picture", "write_report"]

_SHOWN = 6  # pictures of each kind: best, worst, without a score
_NAMES = {
    "cam": "CAM",
    "instance": "Instance",
    "pacam": "PACAM",
    "zeroshot": "Zero-shot",
    "text": "Text",
    "text_centred": "Text, centred",
    "vision": "Vision",
    "vision_affinity": "Vision, affinity",
    "train": "training",
    "eval": "evaluation",
}
_COLOURS = {
    "cam": "#8a94a3", "instance": "#e08a00", "pacam": "#0b6bcb", "segmentation": "#1a8f5a",
    "text": "#8a94a3", "text_centred": "#e08a00", "vision": "#0b6bcb", "vision_affinity": "#8b5cf6",
}  # fmt: skip
_MORE_COLOURS = ("#8b5cf6", "#c2410c", "#0e7490", "#be185d", "#4d7c0f")


class Picture(NamedTuple):
    """A picture for the report.

    Attributes:
        id: Its name.
        image: ``[3, H, W]`` uint8.
        truth: ``[H, W]`` integer mask (0 = background, 1..C, 255 = void), or None when there is none.
        panels: What to show beside it, by column heading: ``[H, W]`` floating point maps 0..1, integer masks.
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
            ``versions`` (name -> version), ``maps`` (split -> map -> ``miou``, ``threshold``, ``per_class``,
            ``miou_mask_free``, ``threshold_mask_free``, ``contrast``), and ``pseudo_masks`` and ``segmentation``
            (split -> ``miou`` and, if known, ``per_class``). ``per_class`` is class name -> IoU or None. All are 0..1.
        history: Curves by name, such as loss terms and learning rate: sequences of (epoch, value).
        sweeps: Split -> map -> (thresholds ``[T]``, mIoU ``[T]``), tensors or sequences, 0..1.
        pictures: Pictures to choose from. The six best and six worst by score are shown, none twice, and
            up to six without a score.
        classes: Names of the C foreground classes in the order of the mask values 1..C, for the legend.
        config: The run's settings by name; ``command``, if there, is shown as the line that repeats the run.

    Raises:
        ImportError: There are curves but no matplotlib, or pictures but no PIL (the extra ``examples``).
        TypeError: A picture is not uint8, see :func:`overlay`.
        ValueError: A panel or truth does not have the size of its picture.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "report.html"
        ...     write_report(path, title="A run", metrics={"maps": {"eval": {"cam": {"miou": 0.4}}}})
        ...     "40.0" in path.read_text(encoding="utf-8")
        True
    """
    config = config or {}
    sections = (
        ("results", "Results", _results(metrics)),
        ("training", "Training", _curves(history or {})),
        ("thresholds", "Thresholds", _sweeps(sweeps or {}, _maps(metrics))),
        ("classes", "Classes", _classes(metrics)),
        ("pictures", "Pictures", _pictures(pictures, classes)),
        ("run", "Run", _run(metrics, config)),
    )
    links, bodies = "", ""
    for name, heading, html in sections:
        if html:
            links += f'<a href="#{name}">{heading}</a>'
            bodies += f'<section id="{name}"><h2>{heading}</h2>{html}</section>\n'
    head = f"<header><h1>{escape(title)}</h1>{_subtitle(metrics)}<nav>{links}</nav></header>\n"
    setting.write(Path(path), setting.document(title, f"{head}{_cards(metrics)}\n{bodies}"))


def _name(key: str) -> str:
    return escape(_NAMES.get(key, key.replace("_", " ")))


def _colour(key: str) -> str:
    # A name without a colour gets one from its letters: the same in every section and in every run.
    return _COLOURS.get(key) or _MORE_COLOURS[sum(key.encode()) % len(_MORE_COLOURS)]


def _dot(colour: str) -> str:
    return f'<i class="dot" style="background:{colour}"></i>'


def _legend(entries: Iterable[str]) -> str:
    return f'<div class="keys">{"".join(f"<span>{entry}</span>" for entry in entries)}</div>'


def _part(metrics: Mapping[str, Any], key: str) -> dict[str, Any]:
    """``metrics[key]`` without its empty splits; a stage that has not run may be absent, None or empty."""
    return {split: values for split, values in (metrics.get(key) or {}).items() if values}


def _maps(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        split: {key: value for key, value in maps.items() if value} for split, maps in _part(metrics, "maps").items()
    }


def _minus(a: object, b: object) -> float | None:
    x, y = setting.number(a), setting.number(b)
    return None if x is None or y is None else x - y


def _plain(names: Iterable[str]) -> str:  # what the other maps are compared with
    return "text" if "text" in names else "cam"


def _memory(metrics: Mapping[str, Any]) -> str | None:
    memory = setting.number(metrics.get("peak_memory_mb"))
    return None if memory is None else f"{memory:,.0f} MB"


def _subtitle(metrics: Mapping[str, Any]) -> str:
    version = (metrics.get("versions") or {}).get("protoseg")
    facts = (("method ", metrics.get("method")), ("seed ", metrics.get("seed")), ("protoseg ", version))
    text = " · ".join(f"{name}{value}" for name, value in facts if value is not None)
    return f"<p>{escape(text)}</p>" if text else ""


def _cards(metrics: Mapping[str, Any]) -> str:
    """The few numbers that a reader wants first."""
    cards = []
    for split, maps in _maps(metrics).items():
        known = {key: miou for key in maps if (miou := setting.number(maps[key].get("miou"))) is not None}
        if known:
            best = max(known, key=lambda key: known[key])
            plain = _plain(known)
            over = _minus(known[best], known.get(plain))
            note = "" if over is None or best == plain else f"<br>{setting.difference(over)} over {_name(plain)}"
            cards.append((_name(best), setting.percent(known[best]), f"mIoU, {_name(split)}{note}"))
    for key, heading in (("pseudo_masks", "Pseudo masks"), ("segmentation", "Segmentation")):
        for split, values in _part(metrics, key).items():
            cards.append((heading, setting.percent(values.get("miou")), f"mIoU, {_name(split)}"))
    if setting.number(metrics.get("seconds")) is not None:
        memory = _memory(metrics)
        cards.append(("Time", setting.duration(metrics["seconds"]), f"{memory} at the peak" if memory else ""))
    html = "".join(f'<div class="card"><h3>{h}</h3><b>{v}</b><small>{note}</small></div>' for h, v, note in cards)
    return f'<div class="cards">{html}</div>' if html else ""


def _results(metrics: Mapping[str, Any]) -> str:
    rows, plain = [], _plain({key for maps in _maps(metrics).values() for key in maps})
    for split, maps in _maps(metrics).items():
        scores = [setting.number(value.get("miou")) for value in maps.values()]
        top = max((score for score in scores if score is not None), default=None)
        for i, (key, value) in enumerate(maps.items()):
            blind = value.get("miou_mask_free")
            over = None if key == plain else _minus(scores[i], maps.get(plain, {}).get("miou"))
            cells = (
                setting.percent(scores[i]),
                setting.difference(over),
                setting.fixed(value.get("threshold")),
                setting.percent(blind),
                setting.fixed(value.get("threshold_mask_free")),
                setting.difference(_minus(blind, scores[i])),
                setting.fixed(value.get("contrast")),
            )
            best = scores[i] is not None and scores[i] == top
            rows.append(_result(split if i == 0 else "", _dot(_colour(key)) + _name(key), cells, best))
    for key, heading in (("pseudo_masks", "Pseudo masks"), ("segmentation", "Segmentation network")):
        for split, values in _part(metrics, key).items():
            rows.append(_result(split, heading, (setting.percent(values.get("miou")), *[setting.DASH] * 6)))
    if not rows:
        return ""
    return (
        "<p>Mean IoU over background and classes, in percent. A threshold chosen with masks is the best of a "
        "sweep and flatters; one chosen without masks is what a user without masks gets, and the column after "
        "it says what that costs. Contrast needs no masks either: the share of the features' variance in a picture "
        "that lies between the regions of its map. More is likely better, but flatters a map that is made from the "
        "picture's own prototypes."
        '</p><div class="scroll"><table class="numbers"><thead>'
        '<tr><th colspan="2"></th><th class="n" colspan="3">Threshold chosen with masks</th>'
        '<th class="n left" colspan="3">Threshold chosen without masks</th>'
        '<th class="n left"></th></tr>'
        f'<tr><th>Pictures</th><th>Map</th><th class="n">mIoU</th><th class="n">over {_name(plain)}</th>'
        '<th class="n">threshold</th><th class="n left">mIoU</th><th class="n">threshold</th>'
        '<th class="n">change</th><th class="n left">contrast</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _result(split: str, heading: str, cells: Sequence[str], best: bool = False) -> str:
    kinds = ["n best" if best else "n", "n", "n", "n left", "n", "n", "n left"]
    html = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(kinds, cells, strict=True))
    first = ' class="first"' if split else ""
    return f'<tr{first}><td>{_name(split)}</td><th scope="row">{heading}</th>{html}</tr>'


def _curves(history: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    figures, noisy = "", False
    for name, curve in history.items():
        points = setting.finite(curve)
        points = points[:: 1 + len(points) // 2000]  # more could not be told apart, and would swell the file
        if points:
            lines = [Line(points, _COLOURS["pacam"])]
            if len(points) > 60:
                noisy = True
                lines = [Line(points, _COLOURS["pacam"], True), Line(setting.smooth(points), _COLOURS["pacam"])]
            svg = setting.plot(lines, (), label=name, x_label="epoch", size=(3.2, 2.1))
            figures += f"<figure><figcaption>{_name(name)}</figcaption>{svg}</figure>"
    note = "<p>Pale: logged values. Full: their moving average.</p>" if noisy else ""
    return f'{note}<div class="plots">{figures}</div>' if figures else ""


def _sweeps(sweeps: Mapping[str, Mapping[str, tuple[Any, Any]]], chosen: Mapping[str, Any]) -> str:
    figures = ""
    for split, maps in sweeps.items():
        lines, marks = [], []
        for key, (thresholds, miou) in maps.items():
            points = [(t, 100 * y) for t, y in setting.finite(zip(thresholds, miou, strict=True))]
            if points:
                lines.append(Line(points, _colour(key)))
            value = chosen.get(split, {}).get(key, {})
            for suffix in ("", "_mask_free"):
                x, y = setting.number(value.get(f"threshold{suffix}")), setting.number(value.get(f"miou{suffix}"))
                if x is not None and y is not None:
                    marks.append(Mark(x, 100 * y, _colour(key), filled=not suffix))
        if lines:
            svg = setting.plot(lines, marks, label=f"mIoU by threshold, {split}", x_label="threshold", size=(5.2, 2.9))
            figures += f"<figure><figcaption>mIoU in percent, {_name(split)} pictures</figcaption>{svg}</figure>"
    if not figures:
        return ""
    keys = dict.fromkeys(key for maps in sweeps.values() for key in maps)
    legend = _legend([*(_dot(_colour(key)) + _name(key) for key in keys), "● with masks", "○ without masks"])
    return (
        "<p>A pixel is foreground where its best class scores at least the threshold. A broad top forgives a "
        "threshold that is off; a narrow one does not. The points are the thresholds chosen with and without "
        f'masks.</p>{legend}<div class="plots wide">{figures}</div>'
    )


def _classes(metrics: Mapping[str, Any]) -> str:
    """A group of bars for each class, a bar for each map."""
    splits: dict[str, dict[str, Mapping[str, Any]]] = {}
    for split, maps in _maps(metrics).items():
        splits[split] = {key: value["per_class"] for key, value in maps.items() if value.get("per_class")}
    for split, value in _part(metrics, "segmentation").items():
        if value.get("per_class"):
            splits.setdefault(split, {})["segmentation"] = value["per_class"]
    html = ""
    for split, tables in splits.items():
        groups = ""
        for name in dict.fromkeys(name for table in tables.values() for name in table):
            bars = "".join(_bar(_colour(key), table.get(name)) for key, table in tables.items())
            groups += f'<div class="class"><span>{escape(str(name))}</span><div>{bars}</div></div>'
        if groups:
            legend = _legend(_dot(_colour(key)) + _name(key) for key in tables)
            html += f'<h3>IoU in percent, {_name(split)} pictures</h3>{legend}<div class="bars">{groups}</div>'
    return html


def _bar(colour: str, value: object) -> str:
    width = 100 * min(max(setting.number(value) or 0, 0), 1)
    filled = f'<i style="width:{width:.1f}%;background:{colour}"></i>'
    return f'<div class="bar"><i>{filled}</i><span>{setting.percent(value)}</span></div>'


def _pictures(pictures: Sequence[Picture], classes: Sequence[str]) -> str:
    scored = [(score, p) for p in pictures if (score := setting.number(p.score)) is not None]
    ranked = [p for _, p in sorted(scored, key=lambda pair: -pair[0])]
    groups = {
        "Best": ranked[: min(_SHOWN, (len(ranked) + 1) // 2)],
        "Worst": ranked[::-1][: min(_SHOWN, len(ranked) // 2)],
        "Without a score": [p for p in pictures if setting.number(p.score) is None][:_SHOWN],
    }
    shown = [p for group in groups.values() for p in group]
    if not shown:
        return ""
    html = _picture_legend(shown, classes)
    columns = list(dict.fromkeys(name for p in shown for name in p.panels))
    if any(p.truth is not None for p in shown):
        columns.insert(0, "truth")
    for heading, group in groups.items():
        if group:
            heads = "".join(f"<th>{_name(name)}</th>" for name in ("image", *columns))
            rows = "".join(_picture(p, columns) for p in group)
            style = f'class="pictures" style="--columns:{len(columns) + 1}"'
            html += (
                f'<h3>{heading}</h3><div class="scroll"><table {style}>'
                f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
            )
    return html


def _layers(picture: Picture) -> dict[str, Tensor]:
    truth = {} if picture.truth is None else {"truth": picture.truth}
    return {**truth, **picture.panels}


def _picture(picture: Picture, columns: Sequence[str]) -> str:
    layers = _layers(picture)
    cells = f"<td>{_image(picture.image, f'{picture.id}: image')}</td>"
    for name in columns:
        shown = setting.DASH
        if name in layers:
            shown = _image(overlay(picture.image, layers[name]), f"{picture.id}: {name}")
        cells += f"<td>{shown}</td>"
    tags = "".join(f"<span>{escape(str(tag))}</span>" for tag in picture.tags)
    head = f"<b>{setting.percent(picture.score)}</b><code>{escape(picture.id)}</code>{tags}"
    return f'<tr><th class="row" colspan="{len(columns) + 1}">{head}</th></tr><tr>{cells}</tr>'


def _image(image: Tensor, label: str) -> str:
    return f'<img alt="{escape(label)}" src="{setting.data_uri(image)}">'


def _picture_legend(pictures: Sequence[Picture], classes: Sequence[str]) -> str:
    """The colours of the heat maps, and of the classes that occur in the masks."""
    layers = [layer for picture in pictures for layer in _layers(picture).values()]
    masks = [layer.flatten().long().cpu() for layer in layers if not layer.is_floating_point()]
    entries = []
    if len(masks) < len(layers):
        steps = ",".join(f"rgb{colour}" for colour in HEAT)
        entries.append(f'score 0<i class="heat" style="background:linear-gradient(90deg,{steps})"></i>1')
    for value in sorted(set(torch.cat(masks).tolist()) - {0}) if masks else ():
        name = "void" if value == 255 else classes[value - 1] if value <= len(classes) else f"class {value}"
        entries.append(_dot(f"rgb{tuple(palette()[value].tolist())}") + escape(str(name)))
    return _legend(entries)


def _run(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    facts = {
        "method": metrics.get("method"),
        "seed": metrics.get("seed"),
        "time": None if metrics.get("seconds") is None else setting.duration(metrics["seconds"]),
        "peak memory": _memory(metrics),
        **(metrics.get("versions") or {}),
    }
    settings = dict(config)
    command = settings.pop("command", None)
    html = "" if command is None else f"<h3>Command</h3><pre>{escape(_text(command))}</pre>"
    halves = "".join(
        f"<div><h3>{heading}</h3><dl>{entries}</dl></div>"
        for heading, entries in (("Facts", _entries(facts)), ("Settings", _entries(settings)))
        if entries
    )
    return f'{html}<div class="halves">{halves}</div>' if halves else html


def _entries(values: Mapping[str, Any]) -> str:
    return "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(_text(value))}</dd>"
        for key, value in values.items()
        if value is not None
    )


def _text(value: object) -> str:
    """A setting as text: what has parts as JSON, the rest as Python writes it."""
    return json.dumps(value, default=str) if isinstance(value, (dict, list, tuple, bool)) else str(value)
