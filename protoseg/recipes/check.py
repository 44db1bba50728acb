"""Everything that is wrong with pictures, masks and tags, in one list; nothing is trained.

protoseg check PICTURES --tags TABLE
protoseg check VOC2012
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from protoseg.data import PictureFolder, TaggedPictures, VOCFolder, survey

__all__ = ["add_sources", "main", "open_folder"]


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where pictures, tags and masks are."""
    parser.add_argument("pictures", help="a folder of pictures, sub-folders included, or one in VOC's layout")
    parser.add_argument(
        "--tags",
        help="a table (CSV, TSV), COCO, LabelMe, CVAT or VOC files, cls_labels.npy; by default what lies in PICTURES, "
        "else the names of its folders",
    )
    parser.add_argument(
        "--classes", help="a file with one class a line, in the order of the masks; by default the tags'"
    )
    parser.add_argument("--id-column", help="the table's column of pictures; guessed where not given")
    parser.add_argument("--tags-column", help="the table's column of tags; guessed where not given")
    parser.add_argument("--separator", help="what stands between the tags of a cell; guessed where not given")
    parser.add_argument("--true-masks", help="a folder of masks to score against, named as the pictures")
    parser.add_argument("--exif", choices=("upright", "leave"), default="upright", help="turn pictures as EXIF says")


def open_folder(args: argparse.Namespace) -> dict[str, TaggedPictures]:
    """Open the folder that the flags name: a VOC-layout folder gives its splits.

    Raises:
        SystemExit: Folder, tags or classes cannot be read.
    """
    upright = args.exif == "upright"
    lists = Path(args.pictures) / "ImageSets" / "Segmentation"
    try:
        if lists.is_dir():
            if args.tags not in (None, "csv", "xml", "masks"):
                raise SystemExit(f"--tags: {args.pictures} has VOC's layout, whose tags are csv, xml or masks")
            masks = args.true_masks or "SegmentationClass"
            # A list of two others together, such as trainval, is no split.
            names = sorted(path.stem for path in lists.glob("*.txt") if path.stem != "trainval")
            tags = args.tags or "auto"
            return {name: VOCFolder(args.pictures, name, tags=tags, mask_dir=masks, upright=upright) for name in names}
        folder = PictureFolder(
            args.pictures,
            args.tags,
            classes=args.classes,
            masks=args.true_masks,
            id_column=args.id_column,
            tags_column=args.tags_column,
            separator=args.separator,
            upright=upright,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"protoseg check: {error}") from error
    return {"pictures": folder}


def main(argv: Sequence[str] | None = None) -> None:
    """Look, say what was found, and end with 1 where there are faults."""
    parser = argparse.ArgumentParser(
        prog="protoseg check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sources(parser)
    args = parser.parse_args(argv)
    found = survey(open_folder(args))
    print(found)
    if found.faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
