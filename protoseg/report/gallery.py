"""What a person without masks wants to know: how the masks look, what they are in numbers, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from protoseg.report.formats import data_uri, number, percent
from protoseg.report.outlines import Label, bright, outlined, place_names

__all__ = ["Picture", "large_pictures", "left_out", "overview"]

LISTED = 40  # of what was left out
SIDE = 960  # pixels of a picture that is shown large


class Picture(NamedTuple):
    """A picture for the report.

    Attributes:
        id: Its name.
        image: ``[3, H, W]`` uint8.
        truth: ``[H, W]`` integer mask (0 = background, 1..C, 255 = void), or None when there is none.
        panels: What to show beside it, by column heading: ``[H, W]`` floating point maps 0..1, integer masks.
        score: What pictures are ranked by, such as the picture's IoU, 0..1; None if unknown.
        tags: Names of the classes in the picture.
        mask: ``[H, W]`` integer mask that the run made.
        large: Whether the picture is shown large with its mask, before all else.
    """

    id: str
    image: Tensor
    truth: Tensor | None
    panels: Mapping[str, Tensor]
    score: float | None = None
    tags: Sequence[str] = ()
    mask: Tensor | None = None
    large: bool = True


def large_pictures(pictures: Sequence[Picture], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Those to be shown large, each with its mask's outlines and names, and a line below it."""
    wanted = [picture for picture in pictures if picture.large]
    return [_card(picture, picture.mask, classes) for picture in wanted if picture.mask is not None]


def _card(picture: Picture, mask: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    drawn = outlined(picture.image, mask, longest=SIDE)
    height, width = drawn.image.shape[-2:]
    labels = place_names(drawn.centers, classes, (height, width))

    inside = {label.name for label in labels}
    missing = [tag for tag in picture.tags if tag not in inside]
    share = float(((mask > 0) & (mask < 255)).float().mean()) if mask.numel() else 0.0
    told = ", ".join(label.name for label in labels) or "no object found"
    return {
        "id": picture.id,
        "alt": f"{picture.id}: {told}",
        "uri": data_uri(drawn.image, SIDE),
        "width": width,
        "height": height,
        "labels": [_plain(label) for label in labels],
        "empty": not labels,
        "missing": missing if labels else [],
        "tags": picture.tags,
        "share": percent(share),
        "score": None if number(picture.score) is None else percent(picture.score),
    }


def _plain(label: Label) -> dict[str, Any]:
    """A name's place in whole tenths of pixels, and its colors as the page writes them."""
    places = {key: round(getattr(label, key), 1) for key in ("x", "y", "width", "height", "size")}
    middle = {"middle_x": round(label.x + label.width / 2, 1), "middle_y": round(label.y + label.height / 2, 1)}
    return {"name": label.name, "color": f"rgb{label.color}", **places, **middle}


def overview(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """How many masks there are, how many of them are empty, how much of them is foreground, and of each class."""
    found = (metrics.get("pseudo_masks") or {}).get("train") or {}
    count = found.get("count")
    if not count:
        return {}

    empties = list(found.get("empties") or ())
    by_class = []
    for place, (name, entry) in enumerate((found.get("classes") or {}).items(), 1):
        row = {"name": name, "color": f"rgb{bright(place)}", "tagged": entry["tagged"], "found": entry["found"]}
        row["share"] = percent(entry.get("share"))
        row["few"] = entry["found"] < entry["tagged"] / 2
        by_class.append(row)

    return {
        "count": count,
        "empty": found.get("empty", 0),
        "untagged": found.get("untagged", 0),
        "foreground": percent(found.get("foreground")),
        "empties": empties,
        "more": found.get("empty", 0) - found.get("untagged", 0) - len(empties),
        "classes": by_class,
    }


def left_out(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a run went on without, and why."""
    lines = list(_broken(metrics.get("broken") or {}))
    faults = list((metrics.get("survey") or {}).get("faults") or ())
    count = sum(amount for amount, _ in lines)
    if not count and not faults:
        return {}

    told = faults or [text for _, text in lines]
    return {"count": count, "lines": told[:LISTED], "more": max(0, len(told) - LISTED)}


def _broken(broken: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Counts with sentences; a recipe says how many there are of a kind, or which pictures."""
    for where, entry in broken.items():
        if isinstance(entry, Mapping):
            yield from ((1, f"{name}: {reason}") for name, reason in entry.items())
        elif number(entry):
            yield int(entry), f"{where}: {entry}"
