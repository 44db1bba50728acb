"""Tags and shapes from COCO, LabelMe, CVAT and VOC files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from protoseg.data.images import pillow
from protoseg.data.tables import Tags, merge, read_text

__all__ = ["Annotations", "Shape", "decode_rle", "draw", "encode_rle", "join", "parse_xml", "read_json", "read_xml"]


class Shape(NamedTuple):
    """An object in a picture.

    Attributes:
        label: Name of its class.
        polygons: Rings of x and y in pixels, ``[x, y, x, y, ...]``; empty where only a box is known.
        runs: Lengths of runs off and on, in turn, and the window that they fill: (left, top, width, height, whether
            down the columns, as COCO counts).
    """

    label: str
    polygons: tuple[tuple[float, ...], ...] = ()
    runs: tuple[tuple[int, ...], tuple[int, int, int, int, bool]] | None = None

    @property
    def has_area(self) -> bool:
        """Whether its outline is known."""
        return bool(self.polygons) or self.runs is not None


class Annotations(NamedTuple):
    """What such files say.

    Attributes:
        tags: Names of classes by picture.
        shapes: Outlines by picture, where every object has one.
    """

    tags: Tags
    shapes: dict[str, tuple[Shape, ...]]


def parse_xml(path: Path) -> ElementTree.Element:
    """Parse XML that may come from anybody: a document type, in which entities are declared, is refused.

    Raises:
        ValueError: The file is broken or declares a document type.
    """
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()

    def refuse(*_: object) -> None:
        raise ValueError(f"{path}: it declares a document type, which is not read; take the line <!DOCTYPE ...> out")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise ValueError(f"{path}: broken XML ({error}); write the file again") from error
    return builder.close()


def read_xml(path: Path) -> Annotations | None:
    """Read CVAT's XML for images, or VOC's of one picture; ``None`` where it is neither.

    Raises:
        ValueError: The file is broken.
    """
    root = parse_xml(path)
    if root.tag == "annotations":
        return _cvat(path, root)
    if root.tag != "annotation":
        return None
    name = (root.findtext("filename") or "").strip()
    # A file that was renamed keeps its old name inside.
    found = {path.stem: tuple(dict.fromkeys((thing.findtext("name") or "").strip() for thing in root.iter("object")))}
    if any("" in tags for tags in found.values()):
        raise ValueError(f"{path}: an object has no name; give it one of the classes")
    note = () if not name or Path(name).stem == path.stem else (f"{path.name}: its picture is called {name} inside",)
    return Annotations(Tags(found, None, note), {})


def _cvat(path: Path, root: ElementTree.Element) -> Annotations:
    order = tuple(
        dict.fromkeys(
            name.text.strip() for name in root.iterfind("./meta//label/name") if name.text and name.text.strip()
        )
    )
    rows: dict[str, tuple[str, ...]] = {}
    shapes: dict[str, tuple[Shape, ...]] = {}
    for image in root.iterfind("image"):
        name = image.get("name", "")
        objects = [_cvat_shape(path, thing) for thing in image if thing.get("label")]
        merge(rows, name, [each.label for each in objects])
        tagged = {str(thing.get("label")) for thing in image.iterfind("tag")}
        outlined = [each for each in objects if each.has_area]
        # A tag of the whole picture has no outline, and needs none where an object of its class has one.
        bare = {each.label for each in objects if not each.has_area}
        if bare <= tagged & {each.label for each in outlined}:
            shapes[name] = tuple(outlined)
    if not any(shapes.values()):
        shapes = {}
    return Annotations(Tags(rows, order or None, (f"{path.name}: CVAT, {len(rows)} pictures",)), shapes)


def _cvat_shape(path: Path, thing: ElementTree.Element) -> Shape:
    label = str(thing.get("label"))
    try:
        if thing.tag == "polygon":
            points = tuple(float(each) for pair in thing.get("points", "").split(";") for each in pair.split(","))
            return Shape(label, (points,))
        if thing.tag == "mask":
            runs = tuple(int(each) for each in thing.get("rle", "").split(","))
            left, top, width, height = (int(thing.get(key, "0")) for key in ("left", "top", "width", "height"))
            return Shape(label, (), (runs, (left, top, width, height, False)))
    except ValueError as error:
        raise ValueError(f"{path}: a {thing.tag} of {label!r} has broken numbers ({error})") from error
    return Shape(label)


def read_json(path: Path) -> Annotations | None:
    """Read COCO's ``instances*.json`` or LabelMe's JSON of one picture; ``None`` where it is neither.

    Raises:
        ValueError: The file is broken.
    """
    text, _ = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON ({error}); write the file again") from error
    if not isinstance(content, dict):
        return None
    try:
        if isinstance(content.get("images"), list):
            return _coco(path, content)
        if "shapes" in content or "imagePath" in content:
            return _labelme(path, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: a field is missing or of another form than expected: {error!r}") from error
    return None


def _coco(path: Path, content: Mapping[str, Any]) -> Annotations:
    # Only the numbers count: COCO's 80 classes have numbers up to 90.
    categories = {
        each["id"]: str(each["name"]) for each in sorted(content.get("categories", []), key=lambda c: c["id"])
    }
    names = {each["id"]: str(each.get("file_name") or each["id"]) for each in content["images"]}
    sizes = {each["id"]: (each.get("width"), each.get("height")) for each in content["images"]}
    rows: dict[str, tuple[str, ...]] = dict.fromkeys(names.values(), ())
    objects: dict[str, list[Shape]] = {name: [] for name in names.values()}
    lost = 0
    for each in content.get("annotations", []):
        if each["image_id"] not in names:
            lost += 1
            continue
        number = each["category_id"]
        label = categories.get(number, str(number))
        name = names[each["image_id"]]
        merge(rows, name, [label])
        objects[name].append(_coco_shape(label, each.get("segmentation"), sizes[each["image_id"]]))
    shapes = {name: tuple(found) for name, found in objects.items() if all(each.has_area for each in found)}
    if not any(shapes.values()):
        shapes = {}
    notes = [f"{path.name}: COCO, {len(rows)} pictures, {len(categories)} classes"]
    if lost:
        notes.append(f"{path.name}: {lost} annotations of pictures that it does not list were left out")
    order = tuple(dict.fromkeys(categories.values())) or None
    return Annotations(Tags(rows, order, tuple(notes)), shapes)


def _coco_shape(label: str, found: Any, size: tuple[Any, Any]) -> Shape:
    if isinstance(found, list) and found and all(isinstance(ring, list) and len(ring) >= 6 for ring in found):
        return Shape(label, tuple(tuple(map(float, ring)) for ring in found))
    if isinstance(found, dict) and "counts" in found:
        height, width = map(int, found.get("size") or (size[1], size[0]))
        counts = found["counts"]
        runs = decode_rle(counts) if isinstance(counts, str) else tuple(map(int, counts))
        return Shape(label, (), (runs, (0, 0, width, height, True)))
    return Shape(label)


def decode_rle(text: str) -> tuple[int, ...]:
    """Lengths of the runs in COCO's compressed text.

    Each number has five bits a character, lowest first, a sixth that says whether more follow, and a sign; from the
    third run on it is the difference to the run before the last.

    Example:
        >>> decode_rle("04")
        (0, 4)
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        code = ord(character) - 48
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return tuple(runs)


def encode_rle(inside: NDArray[np.bool_]) -> str:
    """COCO's compressed text of a mask ``[H, W]``, run by run down the columns; the reverse of `decode_rle`.

    Example:
        >>> decode_rle(encode_rle(np.array([[True, False], [True, False]])))
        (0, 2, 2)
    """
    flat = np.concatenate([[False], inside.T.ravel()])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(np.concatenate([[0], edges, [inside.size]])).tolist()
    text = []
    for place, run in enumerate(runs):
        value = run - runs[place - 2] if place > 2 else run
        more = True
        while more:
            bits = value & 31
            value >>= 5
            # What is left is nothing but the sign that the highest of the five bits says already.
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return "".join(text)


def _labelme(path: Path, content: Mapping[str, Any]) -> Annotations:
    flags = [str(name) for name, on in (content.get("flags") or {}).items() if on is True]
    objects = []
    for each in content.get("shapes") or []:
        label, kind = str(each["label"]).strip(), each.get("shape_type") or "polygon"
        points = [float(value) for point in each.get("points") or [] for value in point]
        polygon = kind == "polygon" and len(points) >= 6
        objects.append(Shape(label, (tuple(points),) if polygon else ()))
    # The file's own name goes before what it says: exported files are renamed, and paths inside are of another machine.
    name = Path(str(content.get("imagePath") or path.name).replace("\\", "/")).name
    name = name if Path(name).stem == path.stem else path.stem
    rows: dict[str, tuple[str, ...]] = {}
    merge(rows, name, [*flags, *(each.label for each in objects)])
    complete = all(each.has_area for each in objects) and (objects or not flags)
    return Annotations(Tags(rows), {name: tuple(objects)} if complete else {})


def draw(shapes: Sequence[Shape], classes: Sequence[str], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw outlines into a mask ``[H, W]``, the largest first, so that a small object is seen before a large one.

    Args:
        shapes: Of one picture; those of other classes are void.
        classes: The foreground names.
        size: Height and width of the picture as stored.
    """
    mask = np.zeros(size, np.uint8)
    for shape in sorted(shapes, key=_area, reverse=True):
        index = 0  # of a shape without a label, which cuts a hole
        if shape.label:
            index = classes.index(shape.label) + 1 if shape.label in classes else 255
        mask[_fill(shape, size)] = index
    return mask


def _area(shape: Shape) -> float:
    if shape.runs is not None:
        return sum(shape.runs[0][1::2])
    rings = [np.array(ring, np.float64).reshape(-1, 2) for ring in shape.polygons]
    return sum(abs(float(np.sum(np.roll(x, -1) * y - x * np.roll(y, -1)))) / 2 for x, y in (ring.T for ring in rings))


def _fill(shape: Shape, size: tuple[int, int]) -> NDArray[np.bool_]:
    height, width = size
    if shape.runs is not None:
        return _expand(shape, size)
    module = pillow()
    from PIL import ImageDraw

    inside = np.zeros(size, bool)
    for ring in shape.polygons:
        layer = module.new("1", (width, height))
        ImageDraw.Draw(layer).polygon(ring, fill=1, outline=1)
        inside |= np.asarray(layer)
    return inside


def _expand(shape: Shape, size: tuple[int, int]) -> NDArray[np.bool_]:
    assert shape.runs is not None
    runs, (left, top, width, height, down) = shape.runs
    if sum(runs) > width * height or min(runs, default=0) < 0 or width * height > size[0] * size[1]:
        raise ValueError(f"the runs of {shape.label!r} do not fit a window of {width} x {height} in {size}")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    flat = np.pad(flat, (0, width * height - len(flat)))
    window = flat.reshape(width, height).T if down else flat.reshape(height, width)
    inside = np.zeros(size, bool)
    rows, columns = slice(max(top, 0), top + height), slice(max(left, 0), left + width)
    place = inside[rows, columns]
    place |= window[: place.shape[0], : place.shape[1]]
    return inside


def join(annotations: Iterable[Annotations]) -> Annotations:
    """Join files of one picture each."""
    rows: dict[str, tuple[str, ...]] = {}
    shapes: dict[str, tuple[Shape, ...]] = {}
    notes: list[str] = []
    order: tuple[str, ...] | None = None
    for each in annotations:
        for name, tags in each.tags.rows.items():
            merge(rows, name, tags)
        shapes |= each.shapes
        notes += each.tags.notes
        order = each.tags.classes if order is None else order
    return Annotations(Tags(rows, order, tuple(notes)), shapes)
