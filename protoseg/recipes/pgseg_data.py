"""What the recipe ``pgseg`` trains and scores on: pictures with sentences, and pictures with masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from protoseg.clip import readable
from protoseg.data import CsvPairs, Pair, ScenePairs, Scenes, ShardPairs, VOCFolder
from protoseg.recipes.engine import Batches
from protoseg.recipes.pgseg_options import PGSegOptions
from protoseg.recipes.pictures import Shuffle, resize, seeded
from protoseg.utils.colors import normalize

View = tuple[Tensor, str]


class TagPairs(Dataset[Pair]):
    """Sentences made of the tags of a VOC-layout folder: "a photo of a cat and a dog"."""

    def __init__(self, folder: VOCFolder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> Pair:
        sample = self.folder[index]
        tags = [name for name, there in zip(self.folder.classes, sample.labels.tolist(), strict=True) if there]
        return Pair(sample.id, sample.image, f"a photo of {' and '.join('a ' + readable(tag) for tag in tags)}")


def random_view(image: Tensor, side: int, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Crop a random part of a picture, mirror it half of the time and normalize it: ``[3, side, side]``.

    Args:
        image: ``[3, H, W]`` uint8.
        side: In pixels.
        share: Smallest share of the area.
        generator: Where chance comes from; the process's own where not given.
    """
    draw = torch.rand(5, generator=generator).tolist()
    height, width = image.shape[-2:]
    area, ratio = height * width * (share + (1 - share) * draw[0]), (3 / 4) ** ((1 - 2 * draw[1]) * (share < 1))
    h, w = min(height, max(1, round((area / ratio) ** 0.5))), min(width, max(1, round((area * ratio) ** 0.5)))
    top, left = int((height - h + 1) * draw[2]), int((width - w + 1) * draw[3])
    view = normalize(resize(image[:, top : top + h, left : left + w], (side, side)) / 255)
    return view.flip(-1) if draw[4] < 0.5 else view


class Views(Dataset[View]):
    """Random views that depend on seed, epoch and index only; pictures stay in memory once read, up to ``keep``."""

    def __init__(self, pairs: Any, side: int, share: float, seed: int, keep: int = 20000) -> None:
        self.pairs, self.side, self.share, self.seed, self.epoch = pairs, side, share, seed, 0
        self.held: dict[int, Pair] | None = {} if len(pairs) <= keep else None

    def __len__(self) -> int:
        return len(self.pairs)

    def pair(self, index: int) -> Pair:
        """Read a pair."""
        if self.held is None:
            return self._read(index)
        if index not in self.held:
            self.held[index] = self._read(index)
        return self.held[index]

    def _read(self, index: int) -> Pair:
        pair: Pair = self.pairs[index]
        return pair

    def __getitem__(self, index: int) -> View:
        pair = self.pair(index)
        return random_view(pair.image, self.side, self.share, seeded(self.seed, self.epoch, index)), pair.caption

    def captions(self) -> list[str]:
        """All sentences; reads every pair once."""
        return [self.pair(index).caption for index in range(len(self))]


def open_views(args: PGSegOptions, report: Path) -> Views | ShardPairs[View]:
    """Open what ``--data`` names: ``scenes``, a CSV, a VOC-layout folder, or webdataset shards."""
    data = str(args.data)
    if data == "scenes":
        pairs: Any = ScenePairs(Scenes(args.train_scenes, seed=0, size=args.size))
    elif data.endswith(".csv"):
        pairs = CsvPairs(data, report=report)
    elif Path(data).is_dir():
        pairs = TagPairs(VOCFolder(data, args.train_split, tags=args.tags, masks="none", mask_dir=args.mask_dir))
    else:
        if args.shard_pairs is None:
            raise SystemExit("--data: shards need --shard-pairs, the pairs of an epoch on each process")
        return ShardPairs(
            data, resampled=True, length=args.shard_pairs, seed=args.seed, report=report,
            transform=lambda pair: (random_view(pair.image, args.size, args.smallest_crop), pair.caption),
        )  # fmt: skip
    return Views(pairs, args.size, args.smallest_crop, args.seed)


def collate(views: Sequence[View]) -> tuple[Tensor, list[str]]:
    """Stack the pictures of a batch; the sentences stay a list."""
    return torch.stack([image for image, _ in views]), [caption for _, caption in views]


def loader_of(
    views: Views | ShardPairs[View], batch: int, workers: int, sampler: Sampler[int] | None
) -> DataLoader[Any]:
    """Make the loader of one process."""
    full = sampler is not None and len(views) >= batch
    return DataLoader(views, batch, sampler=sampler, drop_last=full, num_workers=workers, collate_fn=collate)


def view_batches(views: Views | ShardPairs[View], args: PGSegOptions) -> Batches:
    """Views in a new order each epoch; shards share themselves out over the processes."""
    if isinstance(views, ShardPairs):
        return Batches(loader_of(views, args.batch, args.workers, None), views.set_epoch, shared=True)
    shuffle = Shuffle(len(views), args.seed)

    def set_epoch(epoch: int) -> None:
        shuffle.epoch = views.epoch = epoch

    return Batches(loader_of(views, args.batch, args.workers, shuffle), set_epoch)


def nouns_of(data: str, vocabulary: Iterable[str], chosen: Sequence[str]) -> tuple[str, ...]:
    """The words that name things: those given, or for scenes the classes and sceneries, else the whole vocabulary."""
    known, wanted = tuple(vocabulary), set(chosen)
    if data == "scenes" and not wanted:
        scenes = Scenes(1)
        wanted = {*scenes.classes, *(scenes.home(label + 1) for label in range(len(scenes.classes)))}
    return tuple(word for word in known if word in wanted or not wanted)
