"""Masks in the forms that other programs read.

    protoseg convert RUN --to coco       RUN/coco.json: runs of each class in each picture, as pycocotools reads them
    protoseg convert RUN --to labelme    RUN/labelme/NAME.json: polygons
    protoseg convert RUN --to color      RUN/color/NAME.png: RGB in VOC's colors, and colors.txt
    protoseg convert RUN --to irn        RUN/irn/NAME.npy: the maps, {"keys", "cam", "high_res"}, as IRN reads them

RUN is the folder of a run, or any folder of index masks with a classes.txt in it or beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from protoseg.data import load_mask, voc_palette
from protoseg.data.annotations import encode_rle
from protoseg.data.files import read_classes
from protoseg.data.images import ENDINGS
from protoseg.data.names import PictureIndex, list_files
from protoseg.tap import save_maps
from protoseg.utils.extras import require
from protoseg.utils.files import replacing

__all__ = ["main", "to_coco", "to_color", "to_irn", "to_labelme"]

SMALLEST = 3  # corners of a polygon


def main(argv: Sequence[str] | None = None) -> None:
    """Read the flags, convert and say where it is."""
    parser = argparse.ArgumentParser(
        prog="protoseg convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of a run, or of masks")
    parser.add_argument("--to", choices=("coco", "labelme", "color", "irn"), required=True)
    parser.add_argument("--output", type=Path, help="file (coco) or folder to write; by default in RUN")
    parser.add_argument("--pictures", help="folder of the pictures, for their names; by default that of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")
    args = parser.parse_args(argv)

    folder, classes = _masks(args.source)
    output = args.output or args.source / ("coco.json" if args.to == "coco" else args.to)
    if output.exists() and not args.overwrite:
        raise SystemExit(f"--output: {output} exists; take another, or say --overwrite")
    names = [path.removesuffix(".png") for path in list_files(folder, (".png",))]
    if not names:
        raise SystemExit(f"protoseg convert: {folder} holds no masks")

    if args.to == "irn":
        count = to_irn(args.source, folder, names, output)
        print(f"{count} files of maps in {output}")
        return
    files = _picture_names(args, names)
    if args.to == "coco":
        count = to_coco(folder, names, files, classes, output)
        print(f"{count} outlines of {len(names)} pictures in {output}")
    elif args.to == "labelme":
        count, holes = to_labelme(folder, names, files, classes, output)
        print(f"{count} polygons of {len(names)} pictures in {output}" + f"; {holes} holes are filled" * (holes > 0))
    else:
        to_color(folder, names, classes, output)
        print(f"{len(names)} masks in {output}, their colors in {output / 'colors.txt'}")


def _masks(source: Path) -> tuple[Path, tuple[str, ...]]:
    """Folder of the masks, and the names of the classes."""
    folder = next((source / name for name in ("pseudo_masks", "masks") if (source / name).is_dir()), source)
    lists = [place / "classes.txt" for place in (source, source.parent)]
    path = next((path for path in lists if path.is_file()), None)
    if not folder.is_dir() or path is None:
        raise SystemExit(f"protoseg convert: {source} must be the folder of a run, or of masks with a classes.txt")
    return folder, read_classes(path)[0]


def _picture_names(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Files of the pictures, with their endings where these are known."""
    pictures = args.pictures
    config = args.source / "config.json"
    if pictures is None and config.is_file():
        data = Path(str(json.loads(config.read_text(encoding="utf-8")).get("data")))
        inner = data / "JPEGImages"
        pictures = inner if inner.is_dir() else data
    if pictures is None or not Path(pictures).is_dir():
        return [f"{name}.jpg" for name in names]
    index = PictureIndex(list_files(Path(pictures), ENDINGS))
    places = [index.find(name) for name in names]
    return [f"{name}.jpg" if place is None else index.paths[place] for name, place in zip(names, places, strict=True)]


def _each(folder: Path, names: Sequence[str], classes: int) -> Iterator[NDArray[np.uint8]]:
    for name in names:
        yield load_mask(folder / f"{name}.png", classes).numpy()


def to_coco(folder: Path, names: Sequence[str], files: Sequence[str], classes: Sequence[str], output: Path) -> int:
    """Write COCO's JSON, a run-length mask for each class of a picture; gives their number."""
    images: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, (mask, file) in enumerate(zip(_each(folder, names, len(classes)), files, strict=True), 1):
        height, width = mask.shape
        images.append({"id": number, "file_name": file, "height": height, "width": width})

        for index in np.unique(mask).tolist():
            if index in (0, 255):
                continue
            inside = mask == index
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": number,
                    "category_id": index,
                    "iscrowd": 0,
                    "area": int(inside.sum()),
                    "bbox": [int(each) for each in box],
                    "segmentation": {"size": [height, width], "counts": encode_rle(inside)},
                }
            )

    categories = [{"id": place, "name": name} for place, name in enumerate(classes, 1)]
    content = {"images": images, "annotations": found, "categories": categories}
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as whole:
        whole.write_text(json.dumps(content), encoding="utf-8")
    return len(found)


def to_labelme(
    folder: Path, names: Sequence[str], files: Sequence[str], classes: Sequence[str], output: Path
) -> tuple[int, int]:
    """Write LabelMe's JSON, whose polygons have no holes; gives the number of polygons, and of holes that were lost."""
    contourpy = require("contourpy", "polygons", "recipes")
    count = holes = 0
    for mask, name, file in zip(_each(folder, names, len(classes)), names, files, strict=True):
        shapes = []
        for index in np.unique(mask).tolist():
            if index in (0, 255):
                continue
            # Half a pixel outside, so that what touches the border is closed; the middle of pixel 0 lies at 0.5.
            inside = np.pad(mask == index, 1).astype(np.float64)
            tracer = contourpy.contour_generator(z=inside, fill_type=contourpy.FillType.OuterOffset)
            for points, offsets in zip(*tracer.filled(0.5, 2.0), strict=True):
                ring = points[: offsets[1]] - 0.5
                holes += len(offsets) - 2
                if len(ring) <= SMALLEST:
                    continue
                shapes.append(
                    {
                        "label": classes[index - 1],
                        "points": ring[:-1].round(2).tolist(),
                        "group_id": None,
                        "shape_type": "polygon",
                        "flags": {},
                    }
                )

        content = {
            "version": "5.0.1",
            "flags": {},
            "shapes": shapes,
            "imagePath": Path(file).name,
            "imageData": None,
            "imageHeight": mask.shape[0],
            "imageWidth": mask.shape[1],
        }
        count += len(shapes)
        path = output / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as whole:
            whole.write_text(json.dumps(content), encoding="utf-8")
    return count, holes


def to_color(folder: Path, names: Sequence[str], classes: Sequence[str], output: Path) -> None:
    """Write RGB masks in VOC's colors."""
    colors = np.array(voc_palette(), np.uint8).reshape(-1, 3)
    for mask, name in zip(_each(folder, names, len(classes)), names, strict=True):
        path = output / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as whole:
            Image.fromarray(colors[mask]).save(whole, format="PNG")
    known = [(0, "background"), *enumerate(classes, 1), (255, "void")]
    with replacing(output / "colors.txt") as whole:
        lines = (f"{name} {' '.join(map(str, colors[index].tolist()))}\n" for index, name in known)
        whole.write_text("".join(lines), encoding="utf-8")


def to_irn(run: Path, folder: Path, names: Sequence[str], output: Path) -> int:
    """Write the maps of a run as IRN and its relatives load them; gives their number.

    ``keys`` are the places of the classes from 0, ``cam`` the maps at a quarter of the picture's size and ``high_res``
    at its size, float32.
    """
    config = run / "config.json"
    if not config.is_file() or not (run / "seeds").is_dir():
        raise SystemExit(f"--to irn: {run} must be the folder of a run, with config.json and seeds")
    seed_map = json.loads(config.read_text(encoding="utf-8"))["seed_map"]
    for name in names:
        with np.load(run / "seeds" / f"{name}.npz", allow_pickle=False) as stored:
            keys, maps = stored["classes"], torch.from_numpy(stored[seed_map]).float()
        with Image.open(folder / f"{name}.png") as mask:
            width, height = mask.size

        labels = torch.zeros(int(keys.max(initial=0)) + 1)
        labels[keys] = 1
        whole = torch.zeros(len(labels), height, width)
        if len(keys):
            large = F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)
            whole[keys] = large[0].clamp(0, 1)

        path = output / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_maps(path, whole, labels)
    return len(names)


if __name__ == "__main__":
    main(sys.argv[1:])
