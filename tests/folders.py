"""The same pictures, tags and masks in every shape in which people have them."""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from protoseg.data import Scenes, VOCFolder, save_mask

MSRC15 = Path(__file__).parents[2] / "shared" / "data" / "msrc15"


class Item(NamedTuple):
    """A picture."""

    name: str
    pixels: NDArray[np.uint8]
    tags: tuple[str, ...]
    mask: NDArray[np.uint8]


def items(count: int) -> tuple[list[Item], tuple[str, ...]]:
    """Pictures of MSRC-15 where it is at hand, else made scenes, and their classes in order; PNG keeps their pixels."""
    source = VOCFolder(MSRC15, "train") if MSRC15.is_dir() else Scenes(count, size=48)
    step = max(1, len(source) // count)
    found = []
    for place in range(count):
        sample = source[place * step]
        tags = tuple(tag for tag, here in zip(source.classes, sample.labels, strict=True) if here)
        assert sample.mask is not None
        pixels = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
        # Small pictures: what is compared is how they are read.
        if MSRC15.is_dir():
            pixels, mask = pixels[::3, ::3], sample.mask.numpy()[::3, ::3]
        else:
            mask = sample.mask.numpy()
        found.append(Item(f"bild {place:03d}", np.ascontiguousarray(pixels), tags, np.ascontiguousarray(mask)))
    occurring = {tag for item in found for tag in item.tags}
    classes = tuple(sorted(occurring))
    place_of = {source.classes.index(name) + 1: classes.index(name) + 1 for name in classes}
    table = np.full(256, 255, np.uint8)
    table[0] = 0
    for old, new in place_of.items():
        table[old] = new
    return [item._replace(mask=table[item.mask]) for item in found], classes


def pictures(root: Path, given: Sequence[Item], folder: Callable[[Item], str] = lambda item: "") -> None:
    """Write the pictures as PNG."""
    for item in given:
        path = root / folder(item) / f"{item.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(item.pixels).save(path)


def table(path: Path, rows: Sequence[Sequence[str]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    def cell(text: str) -> str:
        return f'"{text}"' if delimiter in text else text

    text = "".join(delimiter.join(map(cell, row)) + "\r\n" for row in rows)
    path.write_bytes(text.encode(encoding))
    return path


def plain(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    pictures(root / "in", given)
    rows = [("id", "labels"), *((item.name, ", ".join(item.tags)) for item in given)]
    return [str(root / "in"), "--tags", str(table(root / "tags.csv", rows))]


def german(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    """Excel's CSV of a German Windows: semicolons, cp1252, paths, other columns."""
    pictures(root / "in", given)
    rows = [("Nr", "Bild", "Größe", "Schlagworte")]
    rows += [(str(n), rf"C:\Fotos\{item.name}.PNG", "12 kB", "|".join(item.tags)) for n, item in enumerate(given)]
    return [str(root / "in"), "--tags", str(table(root / "tags.csv", rows, ";", "cp1252"))]


def utf16(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    pictures(root / "in", given)
    rows = [("File Name", "Tags"), *((f"{item.name}.jpg", ";".join(item.tags)) for item in given)]
    path = table(root / "tags.txt", rows, "\t", "utf-16-le")
    path.write_bytes(codecs.BOM_UTF16_LE + path.read_bytes())
    return [str(root / "in"), "--tags", str(path)]


def tall(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    """A row for each tag, without a header."""
    pictures(root / "in", given)
    rows = [(f"{item.name}.png", tag) for item in given for tag in item.tags]
    rows += [(f"{item.name}.png", "") for item in given if not item.tags]
    return [str(root / "in"), "--tags", str(table(root / "tags.tsv", rows, "\t", "utf-8-sig"))]


def piped(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    pictures(root / "in", given)
    rows = [("image", "who", "what"), *((item.name, "me", json.dumps(list(item.tags))) for item in given)]
    path = table(root / "tags.csv", rows, "|")
    return [str(root / "in"), "--tags", str(path), "--id-column", "image", "--tags-column", "what"]


def onehot(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    pictures(root / "in", given)
    rows = [("image_id", *classes)]
    rows += [(item.name, *(str(int(name in item.tags)) for name in classes)) for item in given]
    return [str(root / "in"), "--tags", str(table(root / "tags.csv", rows))]


def subfolders(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    """Sub-folders, and umlauts that are composed in the table and not on the disk; the table lies with the pictures."""
    pictures(root / "in", given, lambda item: f"U\u0308bung {int(item.name[-3:]) // 20}/a.b")
    rows = [("path", "label")]
    rows += [(f"Übung {int(item.name[-3:]) // 20}/a.b/{item.name}.png", ",".join(item.tags)) for item in given]
    table(root / "in" / "tags.csv", rows)
    return [str(root / "in")]


def coco(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    """Outlines as runs, and numbers of classes with gaps."""
    pictures(root / "in", given)
    images, found = [], []
    for number, item in enumerate(given):
        height, width = item.mask.shape
        images.append({"id": number + 1, "file_name": f"{item.name}.png", "height": height, "width": width})
        for place, name in enumerate(classes, 1):
            if name not in item.tags:
                continue
            flat = np.concatenate([[0], (item.mask == place).T.ravel().astype(int)])
            edges = np.flatnonzero(np.diff(flat)).tolist()
            counts = np.diff([0, *edges, height * width]).tolist()
            segmentation = {"size": [height, width], "counts": counts}
            found.append({"image_id": number + 1, "category_id": 3 * place, "segmentation": segmentation, "iscrowd": 1})
    categories = [{"id": 3 * place, "name": name} for place, name in enumerate(classes, 1)]
    content = {"images": images, "annotations": found, "categories": categories}
    (root / "instances_train.json").write_text(json.dumps(content))
    return [str(root / "in"), "--tags", str(root / "instances_train.json")]


def labelme(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    pictures(root / "in", given)
    for item in given:
        shapes = [{"label": tag, "points": [[1, 1], [9, 9]], "shape_type": "rectangle"} for tag in item.tags]
        content = {"version": "5.0", "flags": {}, "shapes": shapes, "imagePath": f"..\\x\\{item.name}.png"}
        (root / "in" / f"{item.name}.json").write_text(json.dumps(content))
    return [str(root / "in")]


def cvat(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    pictures(root / "in", given)
    labels = "".join(f"<label><name>{escape(name)}</name></label>" for name in classes)
    images = "".join(
        f'<image id="{n}" name="{item.name}.png" width="9" height="9">'
        + "".join(f'<box label="{tag}" xtl="1" ytl="1" xbr="5" ybr="5"/>' for tag in item.tags)
        + "</image>"
        for n, item in enumerate(given)
    )
    text = f"<annotations><meta><task><labels>{labels}</labels></task></meta>{images}</annotations>"
    (root / "annotations.xml").write_text(text)
    return [str(root / "in"), "--tags", str(root / "annotations.xml")]


def voc_xml(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    pictures(root / "in", given)
    (root / "xml").mkdir()
    for item in given:
        things = "".join(f"<object><name>{tag}</name></object>" for tag in item.tags)
        text = f"<annotation><filename>{item.name}.png</filename>{things}</annotation>"
        (root / "xml" / f"{item.name}.xml").write_text(text)
    return [str(root / "in"), "--tags", str(root / "xml")]


def voc_layout(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    """Without a val split and without masks; names with spaces."""
    pictures(root / "in" / "JPEGImages", given)
    folder = root / "in" / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("".join(f"{item.name}\n" for item in given))
    (root / "in" / "classes.txt").write_text("\n".join(("background", *classes)))
    table(root / "in" / "labels.csv", [("id", "labels"), *((item.name, " ".join(item.tags)) for item in given)])
    return [str(root / "in")]


def pickled(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    pictures(root / "in", given)
    labels = {item.name: np.array([float(name in item.tags) for name in classes], np.float32) for item in given}
    np.save(root / "cls_labels.npy", labels, allow_pickle=True)  # type: ignore[arg-type]
    (root / "classes.txt").write_text("\n".join(classes))
    return [str(root / "in"), "--tags", str(root / "cls_labels.npy"), "--classes", str(root / "classes.txt")]


def numbered(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    pictures(root / "in", given)
    lines = [f"{item.name}.png " + " ".join(str(classes.index(tag)) for tag in item.tags) for item in given]
    (root / "train_cls.txt").write_text("\n".join(lines))
    (root / "classes.txt").write_text("\n".join(classes))
    return [str(root / "in"), "--tags", str(root / "train_cls.txt"), "--classes", str(root / "classes.txt")]


def mixed(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    """Lossless formats of every kind in any case, some turned by EXIF, some with an alpha channel."""
    folder = root / "in"
    folder.mkdir()
    for n, item in enumerate(given):
        picture = Image.fromarray(item.pixels)
        exif = Image.Exif()
        if n % 5 == 0:
            exif[0x0112] = 6
            picture.transpose(Image.Transpose.ROTATE_90).save(folder / f"{item.name}.PNG", exif=exif)
        elif n % 5 == 1:
            picture.save(folder / f"{item.name}.TIF")
        elif n % 5 == 2:
            picture.save(folder / f"{item.name}.webp", lossless=True)
        elif n % 5 == 3:
            picture.save(folder / f"{item.name}.Bmp")
        else:
            picture.convert("RGBA").save(folder / f"{item.name}.png")
    rows = [("id", "labels"), *((item.name, ", ".join(item.tags)) for item in given)]
    return [str(folder), "--tags", str(table(root / "tags.csv", rows))]


def imagefolder(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    """Each picture in the folder of its first tag; the others are lost, as this shape cannot hold them."""
    pictures(root / "in" / "train", given, lambda item: item.tags[0])
    return [str(root / "in")]


SHAPES = {
    each.__name__: each
    for each in (
        *(plain, german, utf16, tall, piped, onehot, subfolders, coco, labelme, cvat, voc_xml, voc_layout, pickled),
        *(numbered, mixed),
    )
}


def faulty(root: Path, given: Sequence[Item], classes: Sequence[str]) -> list[str]:
    """A folder with twelve faults of different kinds, and masks."""
    flags = plain(root, given, classes)
    folder, masks = root / "in", root / "true"
    masks.mkdir()
    for item in given:
        save_mask(masks / f"{item.name}.png", item.mask)
    names = [item.name for item in given]
    # 1. cut off  2. no picture  3. PostScript  4. too many pixels  5. numbers without a rule
    path = folder / f"{names[0]}.png"
    path.write_bytes(path.read_bytes()[:-200])
    (folder / f"{names[1]}.png").write_text("this was an error page")
    (folder / f"{names[2]}.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n%%EOF\n")
    Image.new("1", (12_000, 12_000)).save(folder / f"{names[3]}.png")
    (folder / f"{names[4]}.png").unlink()
    Image.fromarray(np.full((9, 9), 7e5, np.float32)).save(folder / f"{names[4]}.tif")
    # 6. a row without a picture  7. a picture without a row
    with (root / "tags.csv").open("a") as file:
        file.write(f"nowhere,{classes[0]}\r\n")
    shutil.copy(folder / f"{names[20]}.png", folder / "stranger.png")
    # 8. two pictures of one name
    shutil.copy(folder / f"{names[5]}.png", folder / f"{names[5]}.bmp")
    # 9. a mask of another size  10. a lossy mask  11. an index of no class  12. colors of no class
    save_mask(masks / f"{names[6]}.png", given[6].mask[:-3])
    Image.fromarray(given[7].mask).save(masks / f"{names[7]}.png", "JPEG")
    save_mask(masks / f"{names[8]}.png", np.where(given[8].mask == 0, 200, given[8].mask))
    Image.fromarray(np.full((*given[9].mask.shape, 3), 77, np.uint8)).save(masks / f"{names[9]}.png")
    return [*flags, "--true-masks", str(masks)]
