"""The pictures of a run: opened, held in memory, cropped for training, scaled for inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from protoseg.data import PictureFolder, Sample, Scenes, TaggedPictures, VOCFolder, survey
from protoseg.recipes.options import RunOptions
from protoseg.utils.colors import IMAGENET_MEAN, IMAGENET_STD, Color, normalize

TAG_SOURCES = ("auto", "csv", "xml", "masks")  # of a VOC-layout folder
KEEP = 2**30  # bytes of pictures that a process holds in memory


class Pictures(Dataset[Sample]):
    """A data set held in memory once read, as far as there is room, less the pictures that are left out.

    Args:
        source: ``Scenes`` or pictures with tags.
        keep: Most bytes of pictures and masks to hold; what comes later is read again each time.

    Attributes:
        classes: Names of the foreground classes.
        broken: What was left out: id and reason.
        told: What was found when they were looked at, sentences: what was read, and what is wrong.
        channels: Order in which color channels are given out, to make another domain of the pictures.
    """

    def __init__(self, source: Scenes | TaggedPictures, *, keep: int = KEEP) -> None:
        self.source, self.classes = source, source.classes
        self.held: dict[int, Sample] = {}
        self.room = keep
        self.broken: dict[str, str] = {}
        self.told: dict[str, list[str]] = {"facts": [], "faults": []}
        self.channels = [0, 1, 2]
        self.indices = list(range(len(source)))

    def leave_out(self, broken: Mapping[str, str]) -> None:
        """Go on without some pictures.

        Args:
            broken: Names, and what is wrong with them.

        Raises:
            SystemExit: None would be left.
        """
        self.broken |= broken
        self.indices = [index for index in self.indices if self.source.ids[index] not in self.broken]
        if not self.indices:
            first = next(iter(self.broken.values()))
            raise SystemExit(f"--skip-broken: all {len(self.source)} pictures are broken, the first: {first}")

    def _read(self, index: int) -> Sample:
        if index in self.held:
            return self.held[index]
        sample = self.source[index]
        size = sample.image.nbytes + (0 if sample.mask is None else sample.mask.nbytes)
        if size <= self.room:
            self.held[index] = sample
            self.room -= size
        return sample

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        sample = self._read(self.indices[index])
        return sample if self.channels == [0, 1, 2] else sample._replace(image=sample.image[self.channels])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    @property
    def ids(self) -> list[str]:
        """The pictures' names, in order; nothing is read for them."""
        return [self.source.ids[index] for index in self.indices]


def is_voc(data: str) -> bool:
    """Whether a folder has VOC's layout."""
    return (Path(data) / "ImageSets" / "Segmentation").is_dir()


def has_split(data: str, split: str) -> bool:
    """Whether there are pictures of a split: made scenes have all, VOC-layout folders lists, other folders one only."""
    if data == "scenes":
        return True
    return (Path(data) / "ImageSets" / "Segmentation" / f"{split}.txt").is_file() or not is_voc(data)


def open_splits(args: RunOptions, say: Callable[[str], object]) -> dict[str, Pictures]:
    """Open the pictures to train on and, where there are some, those to evaluate on; all are looked at first.

    Args:
        args: The flags.
        say: Is told what was found.

    Raises:
        SystemExit: Something cannot be read or is wrong with the pictures, or the splits have different classes.
    """
    sources = {"train": open_source(args.data, args.train_split, args)}
    other = args.eval_data not in (None, args.data)
    if other or (has_split(args.data, args.eval_split) and (args.data == "scenes" or is_voc(args.data))):
        # Their tags lie beside them, and are not those that a flag names for --data.
        own = args if not other or args.tags in TAG_SOURCES else dataclasses.replace(args, tags="auto")
        sources["eval"] = open_source(args.eval_data or args.data, args.eval_split, own)
        if sources["eval"].classes != sources["train"].classes:
            raise SystemExit(
                f"--eval-data: its classes {sources['eval'].classes} are not the training data's "
                f"{sources['train'].classes}"
            )
    elif args.eval_split != "none":
        say(f"no pictures to evaluate on: {args.data} has no split {args.eval_split!r}")
    return checked(sources, args, say)


def open_source(data: str, split: str, args: RunOptions) -> Scenes | TaggedPictures:
    """Open made scenes, a VOC-layout folder, or any folder of pictures.

    Args:
        data: ``"scenes"`` or the path of a folder.
        split: Name of the folder's split; made scenes have ``train``, ``tune`` and ``val``, with no picture in common.
            Other folders have none.
        args: The flags ``train_scenes``, ``eval_scenes`` and ``size`` of scenes, and those of folders.

    Raises:
        SystemExit: The folder, its tags or its classes cannot be read.
    """
    if data == "scenes":
        count = args.train_scenes if split == "train" else args.eval_scenes
        return Scenes(count, seed={"train": 0, "tune": 2}.get(split, 1), size=args.size)
    upright = args.exif == "upright"
    try:
        if is_voc(data):
            if args.tags not in TAG_SOURCES:
                raise SystemExit(f"--tags: {data} has VOC's layout, whose tags are auto, csv, xml or masks")
            return VOCFolder(
                data, split, tags=args.tags, mask_dir=args.mask_dir, upright=upright, max_side=args.max_side
            )
        masks = Path(data) / args.mask_dir
        return PictureFolder(
            data,
            None if args.tags == "auto" else args.tags,
            classes=args.classes,
            masks=masks if masks.is_dir() else None,
            id_column=args.id_column,
            tags_column=args.tags_column,
            separator=args.separator,
            upright=upright,
            max_side=args.max_side,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"--data: {error}") from error


def open_pictures(data: str, split: str, args: RunOptions) -> Pictures:
    """Open pictures as `open_source` does, and stop where something is wrong with them, or leave that out.

    Returns:
        The pictures.
    """
    return checked({split: open_source(data, split, args)}, args)[split]


def checked(
    sources: Mapping[str, Scenes | TaggedPictures], args: RunOptions, say: Callable[[str], object] = lambda text: None
) -> dict[str, Pictures]:
    """Look at everything before the first step.

    Args:
        sources: Data sets by name.
        args: With ``--skip-broken`` what cannot be used is left out.
        say: Is told what was found.

    Returns:
        The pictures by name.

    Raises:
        SystemExit: Something is wrong, and shall not be left out. All of it is said.
    """
    opened = {name: Pictures(source, keep=KEEP // max(1, args.workers)) for name, source in sources.items()}
    folders = {name: source for name, source in sources.items() if isinstance(source, TaggedPictures)}
    if not folders:
        return opened
    found = survey(folders)
    if found.faults and not args.skip_broken:
        raise SystemExit(f"{found}\n\nmend these, or leave out what cannot be used by --skip-broken")
    say(str(found))
    for each in opened.values():
        each.told = {"facts": list(found.facts), "faults": [str(fault) for fault in found.faults]}
    for name, broken in found.broken.items():
        if broken:
            opened[name].leave_out(broken)
    return opened


def told_of(splits: Mapping[str, Pictures]) -> dict[str, list[str]]:
    """What was found when the pictures of a run were looked at, each sentence once."""
    parts = ("facts", "faults")
    return {part: list(dict.fromkeys(line for each in splits.values() for line in each.told[part])) for part in parts}


class Crops(Dataset[dict[str, Tensor]]):
    """Random crops for training that depend on seed, epoch and picture only: a resumed run sees the same ones.

    A crop covers a random share of the picture's area at a random aspect ratio, is resized to a square, mirrored half
    of the time, and its brightness, contrast and saturation are changed by up to ``color``.

    Args:
        pictures: What to crop.
        size: Side of the square in pixels.
        seed: Seed of the run.
        share: Smallest and largest share of the area.
        color: Largest change, 0..1.
        masks: Gives a sample's mask ``[H, W]`` to crop along, for a segmentation network.
        mean: What is subtracted from the colors in 0..1.
        std: What they are divided by then.
    """

    def __init__(
        self,
        pictures: Pictures,
        size: int,
        *,
        seed: int,
        share: tuple[float, float] = (0.3, 1.0),
        color: float = 0.3,
        masks: Callable[[Sample], Tensor] | None = None,
        mean: Color = IMAGENET_MEAN,
        std: Color = IMAGENET_STD,
    ) -> None:
        self.pictures, self.size, self.seed, self.share, self.color = pictures, size, seed, share, color
        self.masks, self.mean, self.std = masks, mean, std
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.pictures[index]
        draw = torch.rand(8, generator=seeded(self.seed, self.epoch, index)).tolist()
        height, width = sample.image.shape[-2:]
        area = height * width * (self.share[0] + (self.share[1] - self.share[0]) * draw[0])
        ratio = (3 / 4) ** (1 - 2 * draw[1])
        h, w = (min(height, max(1, round((area / ratio) ** 0.5))), min(width, max(1, round((area * ratio) ** 0.5))))
        top, left = int((height - h + 1) * draw[2]), int((width - w + 1) * draw[3])
        window = (slice(top, top + h), slice(left, left + w))
        image = resize(sample.image[:, window[0], window[1]], (self.size, self.size))
        image = normalize(self._recolor(image / 255, draw[5:]), self.mean, self.std)
        mirrored = draw[4] < 0.5
        item = {"images": image.flip(-1) if mirrored else image, "labels": sample.labels}
        if self.masks is not None:
            mask = self.masks(sample)[window].float()[None, None]
            mask = F.interpolate(mask, (self.size, self.size), mode="nearest-exact")[0, 0].long()
            item["masks"] = mask.flip(-1) if mirrored else mask
        return item

    def _recolor(self, image: Tensor, draw: Sequence[float]) -> Tensor:
        bright, contrast, saturation = (1 + self.color * (2 * each - 1) for each in draw)
        image = image * bright
        image = image.mean() + contrast * (image - image.mean())
        gray = image.mean(0, keepdim=True)
        return (gray + saturation * (image - gray)).clamp(0, 1)


class Shuffle(Sampler[int]):
    """A new order each epoch that depends on the seed and the epoch only."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.length, generator=seeded(self.seed, self.epoch)).tolist())


def seeded(*numbers: int) -> torch.Generator:
    """Make a generator that depends on whole numbers only; Python does not salt the hash of those."""
    return torch.Generator().manual_seed(hash(numbers) % 2**63)


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize ``[3, H, W]`` uint8 to float32 in 0..255, smoothed where it shrinks."""
    image = image.float()[None]
    if tuple(image.shape[-2:]) == tuple(size):
        return image[0]
    return F.interpolate(image, tuple(size), mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 255)


def scaled_image(
    image: Tensor, side: int, multiple: int = 8, mean: Color = IMAGENET_MEAN, std: Color = IMAGENET_STD
) -> Tensor:
    """Resize a picture to the area of a square, keeping its shape, and normalize it: ``[1, 3, H, W]``."""
    scale = side / (image.shape[-1] * image.shape[-2]) ** 0.5
    size = [max(1, round(edge * scale / multiple)) * multiple for edge in image.shape[-2:]]
    return normalize(resize(image, size) / 255, mean, std)[None]
