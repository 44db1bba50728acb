"""What runs of one process need not do twice: draw a scene, and ask a frozen network for the same view or text.

Views are random. So that they come again, each picture has four of them, the same for every seed.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from protoseg.clip import Dense, FrozenCLIP
from protoseg.data import ScenePairs
from protoseg.models.pgseg.grouping import BackboneStem
from protoseg.models.pgseg.text import SentenceTokens, TextTokens
from protoseg.recipes import pgseg_data
from protoseg.recipes.pictures import Crops

VIEWS = 4  # of a picture
SCENES: dict[str, Any] = {}  # by name, as all runs of a process have pictures of the same size
MAPS: dict[bytes, Tensor] = {}
LAYERS: dict[bytes, list[Tensor]] = {}
TEXTS: dict[tuple[int, ...], TextTokens] = {}


class HeldScenes(ScenePairs):
    """Scenes that are drawn once."""

    def __getitem__(self, index: int) -> Any:
        """Draw a scene, or give what was drawn."""
        key = self.scenes.ids[index]
        if key not in SCENES:
            SCENES[key] = super().__getitem__(index)
        return SCENES[key]


class FewViews(pgseg_data.Views):
    """Few views of pictures with sentences."""

    def __getitem__(self, index: int) -> pgseg_data.View:
        """Give the view of this epoch."""
        with few(self):
            return super().__getitem__(index)


class FewCrops(Crops):
    """Few crops of pictures with masks."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Give the crop of this epoch."""
        with few(self):
            return super().__getitem__(index)


@contextlib.contextmanager
def few(views: pgseg_data.Views | Crops) -> Iterator[None]:
    """Have views be those of the first seed and one of the first epochs."""
    seed, epoch = views.seed, views.epoch
    views.seed, views.epoch = 0, epoch % VIEWS
    try:
        yield
    finally:
        views.seed, views.epoch = seed, epoch


def name_of(picture: Tensor) -> bytes:
    """A name that equal pictures share."""
    return hashlib.sha256(str(picture.shape).encode() + picture.numpy().tobytes()).digest()


class HeldCLIP(FrozenCLIP):
    """A model that is asked once for the layers of each view, which are kept in half precision."""

    def encode(self, images: Tensor, **options: Any) -> Dense:
        """Encode pictures, new ones and known ones; of these the layers alone."""
        if not options.get("layers"):
            return super().encode(images, **options)
        names = [name_of(each) for each in images]
        new = [place for place, name in enumerate(names) if name not in LAYERS]
        if new:
            found = super().encode(images[new], **options)
            for row, place in enumerate(new):
                LAYERS[names[place]] = [each[row].half() for each in (found.pooled, *found.layers)]
        pooled, *layers = (torch.stack(each).float() for each in zip(*(LAYERS[name] for name in names), strict=True))
        return Dense(images.new_zeros(0), pooled, None, tuple(layers))


class HeldStem(BackboneStem):
    """A frozen backbone that is asked once for each view; the networks are told apart by their name."""

    def see(self, images: Tensor) -> Tensor:
        """Give the maps of pictures, new ones and known ones."""
        if not self.frozen:
            return super().see(images)
        keys = [self.backbone.name.encode() + name_of(each) for each in images]
        new = [place for place, key in enumerate(keys) if key not in MAPS]
        if new:
            for place, found in zip(new, super().see(images[new]), strict=True):
                MAPS[keys[place]] = found.contiguous()
        return torch.stack([MAPS[key] for key in keys])


class HeldTexts(SentenceTokens):
    """A sentence encoder that is asked once for each text."""

    def forward(self, tokens: Tensor) -> TextTokens:
        """Encode texts, new ones and known ones."""
        rows = []
        for row in tokens:
            there = row[row > 0]
            key = tuple(there.tolist())
            if key not in TEXTS:
                TEXTS[key] = super().forward(there[None])
            rows.append(TEXTS[key])
        pad = torch.nn.utils.rnn.pad_sequence
        return TextTokens(
            sentence=torch.cat([row.sentence for row in rows]),
            words=pad([row.words[0] for row in rows], batch_first=True),
            mask=pad([row.mask[0] for row in rows], batch_first=True),
        )


def hold(frozen: bool) -> None:
    """Have the trainer use these in this process; views and networks only where it asks a frozen one."""
    from protoseg.models.pgseg import grouping, network

    replaced: list[tuple[Any, str, type]] = [(pgseg_data, "ScenePairs", HeldScenes)]
    if frozen:
        replaced += [(pgseg_data, "Views", FewViews), (network, "SentenceTokens", HeldTexts)]
        grouping.STEMS["backbone"] = HeldStem
    for place, name, held in replaced:
        setattr(place, name, held)
