"""Folders in the layout of PASCAL VOC."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from protoseg.data import files
from protoseg.data.sample import Sample, UnreadableFileError
from protoseg.utils import checks

__all__ = ["VOC_CLASSES", "VOCFolder"]

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

TagSource = Literal["auto", "csv", "xml", "masks"]
MaskUse = Literal["optional", "required", "none"]


class VOCFolder(Dataset[Sample]):
    r"""Pictures, tags and masks from a folder in the layout of PASCAL VOC.

    Read are ``ImageSets/Segmentation/SPLIT.txt`` (one name per line), ``JPEGImages/NAME.jpg`` (or ``.jpeg``,
    ``.png``), ``MASK_DIR/NAME.png`` (palette or 8-bit gray), ``classes.txt`` (one name per line, the first is
    the background; without the file the classes are `VOC_CLASSES`), and tags from either

    - ``labels.csv`` with the header ``id,labels`` and class names separated by spaces,
    - ``Annotations/NAME.xml`` with VOC's ``object/name``; objects marked ``difficult`` count, as they can be
      seen and are in the masks (VOC's own classification score leaves them out), or
    - the masks, only with ``tags="masks"``: weak supervision does not get these for free.

    The split and all tags are read at construction, pictures and masks at access. A picture keeps the
    orientation of its pixels, whatever its EXIF says, since masks are drawn on the pixels. Nothing is
    unpickled. A truncated file is an error, unless the program itself turned Pillow's
    ``ImageFile.LOAD_TRUNCATED_IMAGES`` on, which makes such files look whole.

    Args:
        root: The folder.
        split: Name of a file in ``ImageSets/Segmentation``, without its ending.
        tags: Where the tags come from; ``"auto"``: from ``labels.csv`` if it exists, else XML, never masks.
        masks: ``"optional"``: ``Sample.mask`` is ``None`` where the file is missing; ``"required"``: a
            missing mask is an error; ``"none"``: ``Sample.mask`` is always ``None``.
        mask_dir: Folder of the masks, such as ``"SegmentationClassAug"``.

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
        tags: TagSource = "auto",
        masks: MaskUse = "optional",
        mask_dir: str = "SegmentationClass",
    ) -> None:
        checks.choice("VOCFolder", "tags", tags, ("auto", "csv", "xml", "masks"))
        checks.choice("VOCFolder", "masks", masks, ("optional", "required", "none"))
        self.root = Path(root)
        self.split = split
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder; give the one which holds JPEGImages and ImageSets")
        self.ids = files.read_split(self.root, split)
        self.classes: tuple[str, ...] = files.read_classes(self.root / "classes.txt", VOC_CLASSES)
        self._masks = masks
        self._mask_dir = self.root / mask_dir
        rows = self._tags(tags)
        self.labels = torch.zeros(len(self.ids), len(self.classes))
        for row, present in enumerate(rows):
            self.labels[row, sorted(present)] = 1

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"VOCFolder: index must be in {-len(self)}..{len(self) - 1}, got {index}")
        name = self.ids[index]
        pixels = files.read_picture(self.root / "JPEGImages", name)
        mask = None if self._masks == "none" else self._mask(name, missing_ok=self._masks == "optional")
        if mask is not None and mask.shape != pixels.shape[:2]:
            raise UnreadableFileError(
                self._mask_dir / f"{name}.png",
                f"the mask has (H, W) = {mask.shape}, its picture {pixels.shape[:2]}; they must be equal "
                "(a picture turned by its EXIF orientation has to be turned back)",
            )
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return Sample(name, image, self.labels[index].clone(), None if mask is None else torch.from_numpy(mask))

    def _mask(self, name: str, *, missing_ok: bool = False) -> NDArray[np.uint8] | None:
        path = self._mask_dir / f"{name}.png"
        if missing_ok and not path.exists():
            return None
        return files.read_mask(path, len(self.classes))

    def _tags(self, source: TagSource) -> list[set[int]]:
        """Return the positions of the classes of every picture of the split."""
        table, annotations = self.root / "labels.csv", self.root / "Annotations"
        if source == "auto":
            if not table.exists() and not annotations.is_dir():
                raise FileNotFoundError(
                    f"{self.root}: neither labels.csv nor Annotations/*.xml to take tags from; add one. "
                    'tags="masks" is possible too, but takes the tags from the masks'
                )
            source = "csv" if table.exists() else "xml"
        if source == "csv":
            return files.read_table(table, self.ids, self.classes)
        if source == "xml":
            return [files.read_annotation(annotations / f"{name}.xml", self.classes) for name in self.ids]
        present = []
        for name in self.ids:
            mask = files.read_mask(self._mask_dir / f"{name}.png", len(self.classes))
            present.append({int(value) - 1 for value in np.unique(mask)} - {-1, 254})
        return present
