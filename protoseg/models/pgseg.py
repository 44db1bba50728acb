"""The network of PGSeg (arXiv 2310.19001): pictures and texts in one space, pictures by groups."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from protoseg.models import _published
from protoseg.models._pickles import read_checkpoint
from protoseg.models.grouping import Encoded, GroupingEncoder, ImageConfig, ProjectionMLP
from protoseg.models.text import TextTokens, TextTransformer, WordBag

__all__ = ["PGSeg", "PGSegConfig"]


@dataclasses.dataclass(frozen=True)
class PGSegConfig:
    """Sizes of the network.

    Attributes:
        image: Sizes of the image encoder.
        text: ``"transformer"``, CLIP's (the paper); ``"words"``, a bag of words.
        text_width: Channels of a word.
        text_layers: Blocks of the transformer.
        embed_dim: Channels of the common space.
        hidden: Channels inside the projections to it.
        vocabulary: The words that ``"words"`` knows.
    """

    image: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    text: Literal["transformer", "words"] = "transformer"
    text_width: int = 256
    text_layers: int = 12
    embed_dim: int = 256
    hidden: int = 4096
    vocabulary: tuple[str, ...] = ()


class PGSeg(nn.Module):
    """Pictures and texts in one space, and the groups of a picture in it too.

    Args:
        config: Sizes.

    Attributes:
        left_out: Names of a published checkpoint's tensors that :meth:`from_published` did not need.
    """

    def __init__(self, config: PGSegConfig) -> None:
        super().__init__()
        self.config, self.left_out = config, list[str]()
        self.image = GroupingEncoder(config.image)
        self.text: WordBag | TextTransformer
        if config.text == "words":
            self.text = WordBag(config.vocabulary, config.text_width)
        else:
            self.text = TextTransformer(config.text_width, config.text_layers)
        self.image_projector = ProjectionMLP(config.image.dim, config.embed_dim, config.hidden)
        self.text_projector = ProjectionMLP(config.text_width, config.embed_dim, config.hidden)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def from_published(cls, path: str | os.PathLike[str]) -> PGSeg:
        """Load a checkpoint of the published PGSeg or GroupViT code, whose sizes are read off its tensors.

        Nothing in the file is executed: only tensors and plain values are read, other objects become inert. The
        prototypes of PGSeg's keep the published arithmetic (``compat="pgseg-repo"``), which its weights were trained
        with. What is not needed (the unused text mapping, the prototypes of its text path, GroupViT's multi-label
        temperature) is named in ``left_out``.

        Args:
            path: The ``.pth`` file.

        Returns:
            The network, in evaluation mode.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no such checkpoint, or tensors are missing.
        """
        stored = read_checkpoint(path)
        state = stored.get("model", stored) if isinstance(stored, dict) else None
        if not isinstance(state, Mapping):
            raise ValueError(f"{path}: expected a dict of tensors, or one with the key 'model'")
        model = cls(PGSegConfig(**_published.read_config(state)))
        translated, model.left_out = _published.translate(state)
        missing, unexpected = model.load_state_dict(translated, strict=False)
        if missing or unexpected:
            raise ValueError(f"{path}: tensors are missing for {missing[:5]} and unknown for {unexpected[:5]}")
        return model.eval()

    def encode_image(self, images: Tensor) -> tuple[Tensor, Encoded]:
        """Embed normalised pictures ``[B, 3, H, W]``: ``[B, E]``, of any length, and what the encoder found."""
        encoded = self.image(images)
        return self.image_projector(encoded.pooled), encoded

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, TextTokens]:
        """Embed tokens ``[B, T]``: ``[B, E]``, of any length, and the words."""
        words = self.text(tokens)
        return self.text_projector(words.sentence), words
