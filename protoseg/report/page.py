"""One HTML file that shows what a run found: numbers, curves, thresholds, classes and pictures.

``page.html`` holds the page, and a function here gives the values of each of its sections: text, numbers that are
text already, widths and pictures. What is empty has no section.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from protoseg.report.formats import DASH, LONGEST_SIDE, change, data_uri, duration, fixed, number, percent
from protoseg.report.gallery import Picture, large_pictures, left_out, overview
from protoseg.report.outlines import bright, outlined
from protoseg.report.overlays import HEAT, overlay
from protoseg.report.plots import Line, Mark, finite, plot, smooth
from protoseg.utils.extras import require
from protoseg.utils.files import replacing

__all__ = ["Picture", "write_report"]

_SHOWN = 6  # pictures of each kind: best, worst, without a score
_MOST_POINTS = 2000  # of a curve: more could not be told apart, and would swell the file
_NOISY = 60  # points from which on a curve is smoothed

_NAMES = {
    "cam": "CAM",
    "instance": "Instance",
    "pacam": "PACAM",
    "zeroshot": "Zero-shot",
    "text": "Text",
    "text_centered": "Text, centered",
    "vision": "Vision",
    "vision_affinity": "Vision, affinity",
    "train": "training",
    "eval": "evaluation",
}
# Masks that know nothing of the picture, which a network has to beat.
_TRIVIAL = {
    "background": "Background everywhere",
    "regions": "Random parts of random classes",
    "tag": "A true tag everywhere",
    "disc": "A true tag in a centered disc",
}
_COLORS = {
    "cam": "#8a94a3",
    "instance": "#e08a00",
    "pacam": "#0b6bcb",
    "segmentation": "#1a8f5a",
    "text": "#8a94a3",
    "text_centered": "#e08a00",
    "vision": "#0b6bcb",
    "vision_affinity": "#8b5cf6",
}
_MORE_COLORS = ("#8b5cf6", "#c2410c", "#0e7490", "#be185d", "#4d7c0f")
_CURVE_COLOR = "#0b6bcb"


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

    Pictures with masks come first, large, with bright outlines and the classes' names; then what the masks are in
    numbers and what was left out; scores, curves and maps follow. A part that is missing is left out of the page, and
    so is the section that would show it; a number that is missing or NaN is a dash. All text is escaped. The file
    appears in one step: no reader sees half of it.

    Args:
        path: The file, conventionally ``report.html``; missing folders are made.
        title: The heading.
        metrics: What ``metrics.json`` holds. Read are ``method``, ``seed``, ``seconds``, ``peak_memory_mb``,
            ``versions`` (name -> version), ``maps`` (split -> map -> ``miou``, ``threshold``, ``per_class``,
            ``miou_mask_free``, ``threshold_mask_free``, ``contrast``), and ``pseudo_masks`` and ``segmentation``
            (split -> ``miou`` and, if known, ``per_class``). ``per_class`` is class name -> IoU or None. All are 0..1.
            Of ``pseudo_masks`` also ``count``, ``empty``, ``untagged``, ``empties`` (names), ``foreground`` (a share)
            and ``classes`` (name -> ``tagged``, ``found``, ``share``). ``counted`` (split -> ``pictures``, ``scored``)
            says of how many pictures scores are, ``trivial`` (split -> name -> mIoU) what they have to beat,
            ``broken`` (split -> name -> reason) and ``survey`` (``facts`` and ``faults``, sentences) what was read and
            left out.
        history: Curves by name, such as loss terms and learning rate: sequences of (epoch, value).
        sweeps: Split -> map -> (thresholds ``[T]``, mIoU ``[T]``), tensors or sequences, 0..1.
        pictures: Pictures to choose from. Those that are large are all shown so, in their order. The maps of the six
            best and six worst by score are shown, none twice, and of up to six without a score.
        classes: Names of the C foreground classes in the order of the mask values 1..C, for the legend.
        config: The run's settings by name; ``command``, if there, is shown as the line that repeats the run.

    Raises:
        ImportError: There is no jinja2, or there are curves but no matplotlib, or pictures but no PIL (the extra
            ``recipes``).
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
    template = _template()

    page = template.render(
        title=title,
        subtitle=_subtitle(metrics),
        gallery=large_pictures(pictures, classes),
        masks=overview(metrics),
        left_out=left_out(metrics),
        cards=_cards(metrics),
        results=_results(metrics),
        training=_training(history or {}),
        thresholds=_thresholds(sweeps or {}, metrics),
        classes=_classes(metrics),
        maps=_pictures(pictures, classes),
        run=_run(metrics, config or {}),
    )

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write_text(page, encoding="utf-8")


def _template() -> Any:
    jinja2 = require("jinja2", "write_report", "recipes")

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("protoseg", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html")


def _subtitle(metrics: Mapping[str, Any]) -> str:
    versions = metrics.get("versions") or {}
    facts = {
        "method": metrics.get("method"),
        "seed": metrics.get("seed"),
        "protoseg": versions.get("protoseg"),
    }
    return " · ".join(f"{name} {value}" for name, value in facts.items() if value is not None)


def _cards(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The few numbers that a reader wants first."""
    cards = []

    for split, maps in _maps(metrics).items():
        scores = {key: number(value.get("miou")) for key, value in maps.items()}
        known = {key: score for key, score in scores.items() if score is not None}
        if known:
            cards.append(_best_map(split, known, metrics))

    for stage, heading in (("pseudo_masks", "Pseudo masks"), ("segmentation", "Segmentation")):
        for split, values in _part(metrics, stage).items():
            if number(values.get("miou")) is not None:
                cards.append(_score_card(heading, values["miou"], split, metrics))

    if number(metrics.get("seconds")) is not None:
        memory = _memory(metrics)
        note = f"{memory} at the peak" if memory else ""
        cards.append(_card("Time", duration(metrics["seconds"]), note))

    return cards


def _card(heading: str, value: str, note: str) -> dict[str, Any]:
    return {"heading": heading, "value": value, "note": note, "gain": None, "trivial": None}


def _score_card(heading: str, miou: object, split: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A score, of what, and the best score that takes no look at the pictures."""
    card = _card(heading, percent(miou), f"mIoU, {_split(split, metrics)}")
    plain = _trivial(metrics).get(split, {})
    if plain:
        best = max(plain, key=plain.__getitem__)
        card["trivial"] = f"{_TRIVIAL[best].lower()}: {percent(plain[best])}"
    return card


def _best_map(split: str, scores: Mapping[str, float], metrics: Mapping[str, Any]) -> dict[str, Any]:
    best = max(scores, key=scores.__getitem__)
    card = _score_card(_name(best), scores[best], split, metrics)

    plain = _plain(scores)
    if plain in scores and plain != best:
        card["gain"] = change(scores[best], scores[plain])
        card["plain"] = _name(plain)

    return card


def _results(metrics: Mapping[str, Any]) -> dict[str, Any]:
    splits = _maps(metrics)
    plain = _plain({key for maps in splits.values() for key in maps})

    # Of the groups of rows, those of one split follow each other, and end with what its scores have to beat.
    groups: dict[str, list[dict[str, Any]]] = {}
    for split, maps in splits.items():
        groups[split] = _map_rows(maps, plain)

    for stage, heading in (("pseudo_masks", "Pseudo masks"), ("segmentation", "Segmentation network")):
        for split, values in _part(metrics, stage).items():
            if "miou" in values:
                groups.setdefault(split, []).append(_one_row(heading, values["miou"]))

    for split, scores in _trivial(metrics).items():
        rows = [_one_row(_TRIVIAL[key], miou) for key, miou in scores.items()]
        groups.setdefault(split, []).extend({**row, "trivial": True} for row in rows)

    if not any(groups.values()):
        return {}

    scored = any(row["miou"] != DASH for rows in groups.values() for row in rows)
    named = [(_split(split, metrics), rows) for split, rows in groups.items()]
    return {"plain": _name(plain), "groups": named, "scored": scored}


def _one_row(heading: str, miou: object) -> dict[str, Any]:
    return {"label": {"name": heading, "color": ""}, **_scores({"miou": miou})}


def _trivial(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By split the scores of masks that know nothing of the picture, without those that are missing."""
    splits = {}
    for split, scores in _part(metrics, "trivial").items():
        known = {key: score for key in _TRIVIAL if (score := number(scores.get(key))) is not None}
        if known:
            splits[split] = known
    return splits


def _split(split: str, metrics: Mapping[str, Any]) -> str:
    """A split's name, and of how many of its pictures scores are."""
    counted = _part(metrics, "counted").get(split)
    if not counted:
        return _name(split)

    scored, pictures = counted["scored"], counted["pictures"]
    of = f"{pictures} pictures" if scored == pictures else f"{scored} of {pictures} pictures"
    return f"{_name(split)}, {of}"


def _map_rows(maps: Mapping[str, Any], plain: str) -> list[dict[str, Any]]:
    known = [score for value in maps.values() if (score := number(value.get("miou"))) is not None]
    top = max(known, default=None)
    plain_miou = maps.get(plain, {}).get("miou")

    rows = []
    for key, value in maps.items():
        row = {"label": _label(key), **_scores(value)}
        row["best"] = top is not None and number(value.get("miou")) == top
        if key != plain:
            row["gain"] = change(value.get("miou"), plain_miou)

        rows.append(row)

    return rows


def _scores(value: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a row, before it is compared with other rows."""
    miou = value.get("miou")
    mask_free = value.get("miou_mask_free")
    return {
        "miou": percent(miou),
        "best": False,
        "trivial": False,
        "gain": change(None, None),
        "threshold": fixed(value.get("threshold")),
        "miou_mask_free": percent(mask_free),
        "threshold_mask_free": fixed(value.get("threshold_mask_free")),
        "change_mask_free": change(mask_free, miou),
        "contrast": fixed(value.get("contrast")),
    }


def _training(history: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    figures = []
    smoothed = False
    for name, curve in history.items():
        points = finite(curve)
        points = points[:: 1 + len(points) // _MOST_POINTS]
        if not points:
            continue

        lines = [Line(points, _CURVE_COLOR)]
        if len(points) > _NOISY:
            lines = [Line(points, _CURVE_COLOR, pale=True), Line(smooth(points), _CURVE_COLOR)]
            smoothed = True

        # One epoch is no curve, but a point.
        marks = [Mark(*points[0], _CURVE_COLOR, filled=True)] if len(points) == 1 else []

        svg = plot(lines, marks, label=name, x_label="epoch", size=(3.2, 2.1))
        figures.append({"caption": _name(name), "svg": svg})

    return {"figures": figures, "smoothed": smoothed} if figures else {}


def _thresholds(sweeps: Mapping[str, Mapping[str, tuple[Any, Any]]], metrics: Mapping[str, Any]) -> dict[str, Any]:
    chosen = _maps(metrics)

    figures = []
    for split, maps in sweeps.items():
        lines = _sweep_lines(maps)
        if not lines:
            continue

        marks = _chosen_marks(maps, chosen.get(split, {}))
        svg = plot(lines, marks, label=f"mIoU by threshold, {split}", x_label="threshold", size=(5.2, 2.9))
        figures.append({"caption": f"mIoU in percent, {_name(split)} pictures", "svg": svg})

    keys = dict.fromkeys(key for maps in sweeps.values() for key in maps)
    return {"figures": figures, "legend": [_label(key) for key in keys]} if figures else {}


def _sweep_lines(maps: Mapping[str, tuple[Any, Any]]) -> list[Line]:
    lines = []
    for key, (thresholds, miou) in maps.items():
        points = finite(zip(thresholds, miou, strict=True))
        if points:
            lines.append(Line([(x, 100 * y) for x, y in points], _color(key)))

    return lines


def _chosen_marks(maps: Iterable[str], chosen: Mapping[str, Any]) -> list[Mark]:
    """The threshold that was chosen for each map with masks, and the one without."""
    marks = []
    for key in maps:
        value = chosen.get(key, {})
        for suffix in ("", "_mask_free"):
            threshold = number(value.get(f"threshold{suffix}"))
            miou = number(value.get(f"miou{suffix}"))
            if threshold is not None and miou is not None:
                marks.append(Mark(threshold, 100 * miou, _color(key), filled=not suffix))

    return marks


def _classes(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """By split, a group of bars for each class, with a bar for each map."""
    splits = []
    for split, tables in _tables(metrics).items():
        groups = []
        for name in dict.fromkeys(name for table in tables.values() for name in table):
            bars = [_bar(_color(key), table.get(name)) for key, table in tables.items()]
            groups.append({"name": name, "bars": bars})

        if groups:
            legend = [_label(key) for key in tables]
            splits.append({"split": _name(split), "legend": legend, "groups": groups})

    return splits


def _tables(metrics: Mapping[str, Any]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """IoU by split, map and class; the segmentation network counts as a map."""
    splits: dict[str, dict[str, Mapping[str, Any]]] = {}

    for split, maps in _maps(metrics).items():
        splits[split] = {key: value["per_class"] for key, value in maps.items() if value.get("per_class")}

    for split, value in _part(metrics, "segmentation").items():
        if value.get("per_class"):
            splits.setdefault(split, {})["segmentation"] = value["per_class"]

    return splits


def _bar(color: str, value: object) -> dict[str, str]:
    share = min(max(number(value) or 0, 0), 1)
    return {"color": color, "width": f"{100 * share:.1f}%", "score": percent(value)}


def _pictures(pictures: Sequence[Picture], classes: Sequence[str]) -> dict[str, Any]:
    groups = {heading: group for heading, group in _ranked(pictures).items() if group}
    shown = [picture for group in groups.values() for picture in group]
    if not shown:
        return {}

    columns = list(dict.fromkeys(name for picture in shown for name in _layers(picture)))

    tables = []
    for heading, group in groups.items():
        rows = [_row(picture, columns) for picture in group]
        tables.append({"heading": heading, "rows": rows, "scored": number(group[0].score) is not None})

    layers = [layer for picture in shown for layer in _layers(picture).values()]
    return {
        "heat": _heat_colors(layers),
        "legend": _mask_legend(layers, classes),
        "columns": [_name(column) for column in ("image", *columns)],
        "tables": tables,
    }


def _ranked(pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    """The best, the worst and those without a score; no picture is in two groups."""
    scores = [(number(picture.score), picture) for picture in pictures if picture.panels]
    unscored = [picture for score, picture in scores if score is None]

    scored = [(score, picture) for score, picture in scores if score is not None]
    scored.sort(key=lambda pair: -pair[0])
    ranked = [picture for _, picture in scored]

    best = min(_SHOWN, (len(ranked) + 1) // 2)
    worst = min(_SHOWN, len(ranked) // 2)
    return {
        "Best": ranked[:best],
        "Worst": ranked[::-1][:worst],
        "Not scored": unscored[:_SHOWN],
    }


def _row(picture: Picture, columns: Sequence[str]) -> dict[str, Any]:
    layers = _layers(picture)

    cells = [{"alt": f"{picture.id}: image", "uri": data_uri(picture.image)}]
    for column in columns:
        uri = ""
        if column in layers:
            uri = data_uri(_drawn(picture.image, layers[column]))

        cells.append({"alt": f"{picture.id}: {column}", "uri": uri})

    return {"id": picture.id, "score": percent(picture.score), "tags": picture.tags, "cells": cells}


def _drawn(image: Tensor, layer: Tensor) -> Tensor:
    """A heat map over the gray picture, a mask as outlines."""
    if layer.is_floating_point():
        return overlay(image, layer)

    return outlined(image, layer, shortest=LONGEST_SIDE, longest=LONGEST_SIDE).image


def _layers(picture: Picture) -> dict[str, Tensor]:
    """Its truth and its mask, where there are such, and its panels between them."""
    layers = {} if picture.truth is None else {"truth": picture.truth}
    layers |= picture.panels
    return layers if picture.mask is None else {**layers, "mask": picture.mask}


def _heat_colors(layers: Sequence[Tensor]) -> str:
    """The colors from 0 to 1, empty where there is no heat map."""
    if not any(layer.is_floating_point() for layer in layers):
        return ""

    return ",".join(f"rgb{color}" for color in HEAT)


def _mask_legend(layers: Sequence[Tensor], classes: Sequence[str]) -> list[dict[str, str]]:
    """The colors of the classes that occur in the masks."""
    values: set[int] = set()
    for layer in layers:
        if not layer.is_floating_point():
            values.update(layer.long().flatten().tolist())

    return [{"name": _class_name(value, classes), "color": f"rgb{bright(value)}"} for value in sorted(values - {0})]


def _class_name(value: int, classes: Sequence[str]) -> str:
    if value == 255:
        return "void"

    if value > len(classes):
        return f"class {value}"

    return classes[value - 1]


def _run(metrics: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    seconds = metrics.get("seconds")
    time = None if seconds is None else duration(seconds)
    facts = {
        "method": metrics.get("method"),
        "seed": metrics.get("seed"),
        "time": time,
        "peak memory": _memory(metrics),
        **(metrics.get("versions") or {}),
    }

    settings = dict(config)
    command = settings.pop("command", None)
    if command is not None:
        command = _text(command)

    read = list((metrics.get("survey") or {}).get("facts") or ())
    run = {"command": command, "read": read, "facts": _entries(facts), "settings": _entries(settings)}
    return run if any(run.values()) else {}


def _entries(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, _text(value)) for key, value in values.items() if value is not None]


def _text(value: object) -> str:
    """A setting as text: what has parts as JSON, the rest as Python writes it."""
    if isinstance(value, (dict, list, tuple, bool)):
        return json.dumps(value, default=str)

    return str(value)


def _part(metrics: Mapping[str, Any], key: str) -> dict[str, Any]:
    """``metrics[key]`` without its empty splits; a stage that has not run may be absent, None or empty."""
    return {split: values for split, values in (metrics.get(key) or {}).items() if values}


def _maps(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of every map by split, without the maps that have none."""
    splits = _part(metrics, "maps")
    return {split: {key: value for key, value in maps.items() if value} for split, maps in splits.items()}


def _plain(maps: Iterable[str]) -> str:
    """The map that the others are compared with."""
    return "text" if "text" in maps else "cam"


def _memory(metrics: Mapping[str, Any]) -> str | None:
    memory = number(metrics.get("peak_memory_mb"))
    return None if memory is None else f"{memory:,.0f} MB"


def _label(key: str) -> dict[str, str]:
    """A map's name with the color of its dot."""
    return {"name": _name(key), "color": _color(key)}


def _name(key: str) -> str:
    return _NAMES.get(key, key.replace("_", " "))


def _color(key: str) -> str:
    # A name without a color gets one from its letters: the same in every section and in every run.
    return _COLORS.get(key) or _MORE_COLORS[sum(key.encode()) % len(_MORE_COLORS)]
