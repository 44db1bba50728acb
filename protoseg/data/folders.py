"""Folders in the layout of PASCAL VOC."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from protoseg.data import files
from protoseg.data.annotations import Shape, draw
from protoseg.data.images import ENDINGS, Header, read_pixels, turned
from protoseg.data.names import PictureIndex, list_files
from protoseg.data.sample import Sample, UnreadableFileError
from protoseg.data.tables import Tags, listed, read_tags
from protoseg.utils import checks

__all__ = ["VOC_CLASSES", "TaggedPictures", "VOCFolder", "find_masks"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *(
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
)
"""The 20 foreground classes of PASCAL VOC, in the order of its masks: 1 = aeroplane, ..., 20 = tvmonitor."""

MaskUse = Literal["optional", "required", "none"]

# What people append to a picture's name to call its mask.
_MASK_SUFFIXES = ("", "_mask", "-mask", ".mask", "_label", "_labels", "_gt", "_seg", "_segmentation")


class TaggedPictures(Dataset[Sample]):
    """Pictures with tags, and masks where there are some: what all folders have in common.

    Args:
        where: What messages call the data set.
        pictures: Folder that the paths begin at.
        ids: Names of the pictures.
        paths: Of the pictures, from that folder on; ``None`` where there is none.
        tags: Names of the classes in each picture.
        classes: Names of the foreground classes.
        mask_paths: Of the masks; ``None`` where there is none.
        shapes: Outlines to draw masks of, where there are no mask files; ``None`` where they are unknown.
        colors: Index by color of masks in color.
        upright: Turn pictures as EXIF says, and their masks alike.
        max_side: Give pictures whose longer side has more pixels smaller, and their masks alike.

    Attributes:
        ids: As given.
        paths: As given.
        classes: As given.
        labels: ``[N, C]`` float32, the tags of all pictures; no picture is opened for it.
        notes: What was understood and guessed, a sentence each.
        lost: Names that have tags and no picture.
    """

    def __init__(
        self,
        where: str,
        pictures: Path,
        ids: Sequence[str],
        paths: Sequence[str | None],
        tags: Sequence[Collection[str]],
        classes: Sequence[str],
        *,
        mask_paths: Sequence[Path | None] | None = None,
        shapes: Sequence[Sequence[Shape] | None] | None = None,
        colors: Mapping[tuple[int, int, int], int] | None = None,
        upright: bool = True,
        max_side: int | None = None,
    ) -> None:
        if max_side is not None and max_side < 16:
            raise ValueError(f"{where}: max_side must be at least 16 pixels, got {max_side}")
        self.where, self.pictures, self.upright, self.max_side = where, pictures, upright, max_side
        self.ids, self.paths = list(ids), list(paths)
        self.classes: tuple[str, ...] = tuple(classes)
        self.mask_paths: list[Path | None] = list(mask_paths or [None] * len(self.ids))
        self.shapes = list(shapes or [None] * len(self.ids))
        self.colors = colors
        self.notes: list[str] = []
        self.lost: list[str] = []
        place = {name: index for index, name in enumerate(self.classes)}
        self.labels = torch.zeros(len(self.ids), len(self.classes))
        for row, present in enumerate(tags):
            self.labels[row, sorted(place[name] for name in present)] = 1

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.where}: index must be in {-len(self)}..{len(self) - 1}, got {index}")
        pixels, header = read_pixels(self.picture_path(index), upright=self.upright, max_side=self.max_side)
        mask = self.mask(index, header)
        height, width = pixels.shape[:2]
        full = header.upright if self.upright or header.format == "TIFF" else header.size
        if mask is not None and mask.shape != (height, width):
            mask = _nearest(mask, (height, width))
        return Sample(
            self.ids[index],
            torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
            self.labels[index].clone(),
            None if mask is None else torch.from_numpy(mask),
            size=None if full == (height, width) else full,
        )

    def picture_path(self, index: int) -> Path:
        """File of a picture.

        Raises:
            UnreadableFileError: There is none.
        """
        path = self.paths[index]
        if path is None:
            raise UnreadableFileError(
                self.pictures / f"{self.ids[index]}.jpg",
                "no such file, nor with another ending of pictures; add it or take its name out of the split",
            )
        return self.pictures / path

    def picture_files(self) -> list[Path]:
        """Files of the pictures that there are."""
        return [self.pictures / path for path in self.paths if path is not None]

    def mask(self, index: int, header: Header) -> NDArray[np.uint8] | None:
        """Mask of a picture at the size of its file, turned as the picture is; ``None`` where there is none.

        Raises:
            UnreadableFileError: It cannot be read, or is of another size than the picture.
        """
        path, shapes = self.mask_paths[index], self.shapes[index]
        if path is not None:
            mask = files.read_mask(path, len(self.classes), self.colors)
        elif shapes is not None:
            mask = draw(shapes, self.classes, header.size)
        else:
            return None
        if mask.shape == header.size:
            # A mask as large as the stored pixels was drawn on them.
            upright = self.upright or header.format == "TIFF"
            return np.ascontiguousarray(turned(mask, header.orientation)) if upright else mask
        if mask.shape == header.upright and self.upright:
            return mask
        raise UnreadableFileError(
            path,
            f"the mask has (H, W) = {mask.shape}, its picture {header.size}; they must be equal",
        )


def _nearest(mask: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize a mask without making new indices."""
    rows = (np.arange(size[0]) + 0.5) * mask.shape[0] / size[0]
    columns = (np.arange(size[1]) + 0.5) * mask.shape[1] / size[1]
    resized: NDArray[np.uint8] = mask[rows.astype(int)[:, None], columns.astype(int)]
    return resized


def find_masks(
    folder: Path, ids: Sequence[str], *, pictures: Sequence[str | None] = (), beside: bool = False
) -> list[Path | None]:
    """Files of the masks of pictures, by their names and what people append to them.

    Args:
        folder: Of the masks; may not exist.
        ids: Names of the pictures.
        pictures: Paths of the pictures in the folder, which are no masks.
        beside: Masks lie between the pictures, so that a name alone makes no mask.
    """
    own = {path for path in pictures if path is not None} if beside else set()
    index = PictureIndex([path for path in list_files(folder, ENDINGS) if path not in own])
    suffixes = _MASK_SUFFIXES[1:] if beside else _MASK_SUFFIXES
    found: list[Path | None] = []
    for name in ids:
        place = next((place for suffix in suffixes if (place := index.find(f"{name}{suffix}")) is not None), None)
        found.append(None if place is None else folder / index.paths[place])
    return found


class VOCFolder(TaggedPictures):
    r"""Pictures, tags and masks from a folder in the layout of PASCAL VOC.

    Read are ``ImageSets/Segmentation/SPLIT.txt`` (one name per line), ``JPEGImages/NAME.jpg`` (or another ending of
    pictures, in any case), ``MASK_DIR/NAME.png`` (palette, gray, or colors by ``colors.txt`` with lines ``NAME R G B``;
    also ``NAME_mask.png`` and the like), ``classes.txt`` (one name per line, ``background`` first; without the file the
    classes are `VOC_CLASSES`, or those of the tags where these are others), and tags from either

    - ``labels.csv`` with the header ``id,labels``, or any table that ``protoseg.data.tables.read_tags`` understands,
    - ``Annotations/NAME.xml`` with VOC's ``object/name``; objects marked ``difficult`` count, as they can be
      seen and are in the masks (VOC's own classification score leaves them out), or
    - the masks, only with ``tags="masks"``: weak supervision does not get these for free.

    The split and all tags are read at construction, pictures and masks at access. A picture that EXIF says was taken
    with the camera turned becomes upright, and a mask that was drawn on its stored pixels is turned alike. Nothing is
    unpickled. A truncated file is an error, unless the program itself turned Pillow's
    ``ImageFile.LOAD_TRUNCATED_IMAGES`` on, which makes such files look whole.

    Args:
        root: The folder.
        split: Name of a file in ``ImageSets/Segmentation``, without its ending.
        tags: Where the tags come from; ``"auto"``: from ``labels.csv`` if it exists, else XML, never masks.
        masks: ``"optional"``: ``Sample.mask`` is ``None`` where the file is missing; ``"required"``: a
            missing mask is an error; ``"none"``: ``Sample.mask`` is always ``None``.
        mask_dir: Folder of the masks, such as ``"SegmentationClassAug"``.
        upright: Turn pictures as EXIF says; otherwise they keep the orientation of their pixels.
        max_side: Give pictures whose longer side has more pixels smaller, with ``Sample.size``.

    Shape:
        ``image`` [3, H, W] uint8 RGB, ``labels`` [C] float32, ``mask`` [H, W] uint8; 0 = background, 1..C =
        classes, 255 = void. H and W differ from picture to picture.

    Raises:
        FileNotFoundError: The folder, the split's file, or the source of the tags is missing.
        ValueError: A mode is unknown, or there is a fault in the split, classes, ``labels.csv`` or XML.
        UnreadableFileError: At access (with ``tags="masks"`` at construction for masks): a picture or mask is
            missing, truncated, of the wrong form or size, or has an index above C.
        ImportError: Pillow is not installed.

    Attributes:
        root: The folder.
        split: The split's name.
        notes: What was understood and guessed, a sentence each.
        classes: The C foreground names, in the order of labels and mask.
        ids: The N names of the split, in its order.
        labels: ``[N, C]`` float32, the tags of all pictures; no picture is opened for it.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("JPEGImages", "ImageSets/Segmentation"):
        ...     (root / name).mkdir(parents=True)
        >>> Image.new("RGB", (8, 6)).save(root / "JPEGImages" / "one.jpg")
        >>> _ = (root / "ImageSets" / "Segmentation" / "train.txt").write_text("one\n")
        >>> _ = (root / "labels.csv").write_text("id,labels\none,cat dog\n")
        >>> folder = VOCFolder(root, "train")
        >>> [name for name, tag in zip(folder.classes, folder.labels[0]) if tag]
        ['cat', 'dog']
        >>> folder[0].image.shape, folder[0].mask
        (torch.Size([3, 6, 8]), None)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        tags: str = "auto",
        masks: MaskUse = "optional",
        mask_dir: str = "SegmentationClass",
        upright: bool = True,
        max_side: int | None = None,
    ) -> None:
        checks.choice("VOCFolder", "tags", tags, ("auto", "csv", "xml", "masks"))
        checks.choice("VOCFolder", "masks", masks, ("optional", "required", "none"))
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; give the one which holds JPEGImages and ImageSets")
        self.split = split
        self._masks, self._mask_dir = masks, root / mask_dir
        notes: list[str] = []

        # 1. Names, and the files that they stand for.
        pictures = root / "JPEGImages"
        index = PictureIndex(list_files(pictures, ENDINGS))
        ids = files.read_split(root, split, index)
        places = [index.find(name) for name in ids]
        paths = [None if place is None else index.paths[place] for place in places]

        # 2. Classes by the file, else VOC's, else those of the tags.
        stated, note = _stated_classes(root)
        notes += filter(None, [note])

        # 3. Tags, and masks, which may be their source.
        mask_paths = find_masks(self._mask_dir, ids) if masks != "none" or tags == "masks" else None
        color_table = root / "colors.txt"
        colors = files.read_colors(color_table, stated or VOC_CLASSES) if color_table.is_file() else None
        rows, classes, more = self._tags(root, tags, ids, index, stated, mask_paths, colors)
        if masks == "none":
            mask_paths = None
        super().__init__(
            "VOCFolder", pictures, ids, paths, rows, classes,
            mask_paths=mask_paths, colors=colors, upright=upright, max_side=max_side,
        )  # fmt: skip
        self.root = root
        self.notes = [*notes, *more]

    def mask(self, index: int, header: Header) -> NDArray[np.uint8] | None:
        """Mask of a picture at the size of its file, turned as the picture is; ``None`` where there is none."""
        found = super().mask(index, header)
        if found is None and self._masks == "required":
            raise UnreadableFileError(
                self._mask_dir / f"{self.ids[index]}.png", "no such file; add it or take its name out of the split"
            )
        return found

    def _tags(
        self,
        root: Path,
        source: str,
        ids: Sequence[str],
        pictures: PictureIndex,
        stated: tuple[str, ...] | None,
        masks: Sequence[Path | None] | None,
        colors: Mapping[tuple[int, int, int], int] | None,
    ) -> tuple[list[tuple[str, ...]], tuple[str, ...], list[str]]:
        """Names of the classes of every picture of the split, all classes, and notes."""
        table, annotations = root / "labels.csv", root / "Annotations"
        if source == "auto":
            if not table.exists() and not annotations.is_dir():
                raise FileNotFoundError(
                    f"{root}: neither labels.csv nor Annotations/*.xml to take tags from; add one. "
                    'tags="masks" is possible too, but takes the tags from the masks'
                )
            source = "csv" if table.exists() else "xml"

        if source == "masks":
            classes = stated or VOC_CLASSES
            return [_in_mask(self._mask_dir, name, path, classes, colors)
                    for name, path in zip(ids, masks or [], strict=True)], classes, []  # fmt: skip
        if source == "xml":
            found = [files.read_annotation(annotations / f"{name}.xml") for name in ids]
            wheres = [str(annotations / f"{name}.xml") for name in ids]
            tags = Tags({})
        else:
            # A picture of another split is known too; where there are no pictures, the split's names are all that is.
            known = PictureIndex([*pictures.paths, *(f"{name}.png" for name in ids)])
            tags = read_tags(table, known.knows, classes=stated)
            found = _rows_of(table, tags, ids)
            wheres = [f"{table}, {name!r}" for name in ids]

        # Without a list of classes, all tags of the table count, so that every split has the same classes.
        every = {tag for row in (*tags.rows.values(), *found) for tag in row}
        notes = list(tags.notes)
        classes = stated or VOC_CLASSES
        if stated is None and not every <= {*VOC_CLASSES}:
            classes = tags.classes or tuple(sorted(every))
            notes.append(
                f"no classes.txt: the classes are those of the tags, {listed(classes)}; masks must count them in this "
                "order from 1"
            )
        for row, where in zip(found, wheres, strict=True):
            for tag in row:
                files.class_position(tag, classes, where)
        return found, classes, notes


def _stated_classes(root: Path) -> tuple[tuple[str, ...] | None, str]:
    path = root / "classes.txt"
    return files.read_classes(path) if path.is_file() else (None, "")


def _rows_of(table: Path, tags: Tags, ids: Sequence[str]) -> list[tuple[str, ...]]:
    """Tags of the names of a split by a table whose names may have folders and endings."""
    index = PictureIndex([f"{name}.png" for name in ids])
    rows: dict[int, tuple[str, ...]] = {}
    for name, present in tags.rows.items():
        place = index.find(name)
        if place is not None:
            rows[place] = tuple(dict.fromkeys((*rows.get(place, ()), *present)))
    if missing := [name for place, name in enumerate(ids) if place not in rows]:
        raise ValueError(f"{table}: no row for {listed(missing)} of the split; add it (labels may be empty)")
    return [rows[place] for place in range(len(ids))]


def _in_mask(
    folder: Path,
    name: str,
    path: Path | None,
    classes: Sequence[str],
    colors: Mapping[tuple[int, int, int], int] | None,
) -> tuple[str, ...]:
    """Names of the classes in a mask."""
    if path is None:
        raise UnreadableFileError(folder / f"{name}.png", "no such file; add it or take its name out of the split")
    indices = np.unique(files.read_mask(path, len(classes), colors)).tolist()
    return tuple(classes[index - 1] for index in indices if index not in (0, 255))
