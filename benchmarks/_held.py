"""What runs of one process need not do twice: draw a scene, and ask a frozen network for the same view or text."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from protoseg.data import ScenePairs
from protoseg.models.pgseg.grouping import BackboneStem
from protoseg.models.pgseg.text import SentenceTokens, TextTokens
from protoseg.recipes import pgseg_data

VIEWS = 4  # of a picture
SCENES: dict[str, Any] = {}  # by name, as all runs of a process have pictures of the same size
MAPS: dict[bytes, Tensor] = {}
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
    """Views of which each picture has four, the same for every seed, so that they come again."""

    def __getitem__(self, index: int) -> pgseg_data.View:
        """Give the view of this epoch."""
        seed, epoch = self.seed, self.epoch
        self.seed, self.epoch = 0, epoch % VIEWS
        try:
            return super().__getitem__(index)
        finally:
            self.seed, self.epoch = seed, epoch


class HeldStem(BackboneStem):
    """A frozen backbone that is asked once for each view; the networks are told apart by their name."""

    def see(self, images: Tensor) -> Tensor:
        """Give the maps of pictures, new ones and known ones."""
        if not self.frozen:
            return super().see(images)
        name = self.backbone.name.encode()
        keys = [hashlib.sha256(name + str(each.shape).encode() + each.numpy().tobytes()).digest() for each in images]
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
