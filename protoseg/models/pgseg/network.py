"""The network of PGSeg (arXiv 2310.19001): pictures and texts in one space, pictures by groups."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.models.pgseg import weights
from protoseg.models.pgseg.grouping import PRESETS as IMAGE_PRESETS
from protoseg.models.pgseg.grouping import Encoded, GroupingEncoder, ImageConfig, ProjectionMLP
from protoseg.models.pgseg.text import SentenceTokens, TextTokens, TextTransformer, WordBag
from protoseg.models.pgseg.zeroshot import ZeroShot, segment
from protoseg.models.weights import read_file
from protoseg.modules.gmm import LARGEST_SCALE, GMMPrototypeRegularizer, GroupPrototypes
from protoseg.utils.distributed import all_gather, gather_with_gradient, world_size
from protoseg.utils.numeric import full_precision, no_autocast, unit

__all__ = ["PRESETS", "PGSeg", "PGSegConfig", "PGSegOutput", "image_text_contrast"]


@dataclasses.dataclass(frozen=True)
class PGSegConfig:
    """Sizes of the network.

    Attributes:
        image: Sizes of the image encoder.
        text: ``"transformer"``, CLIP's (the paper); ``"words"``, a bag of words; ``"sentences"``, MiniLM as it is.
        text_width: Channels of a word; MiniLM has its own.
        text_layers: Blocks of the transformer.
        embed_dim: Channels of the common space.
        hidden: Channels inside the projections to it; 0: they are linear.
        vocabulary: The words that ``"words"`` knows.
        npr_text: Options of the :class:`protoseg.GMMPrototypeRegularizer` on the words, which are projected to the
            channels of the last groups; None for none.
        test_side: Shorter side of test pictures, and of the windows that they are read in, in pixels.
        nouns: Words of the captions that the groups learn from one by one, too; not with ``"transformer"``. With
            ``"words"`` they are of the vocabulary. Not in the paper. Without it the groups of small pictures all carry
            the whole picture.
    """

    image: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    text: Literal["transformer", "words", "sentences"] = "transformer"
    text_width: int = 256
    text_layers: int = 12
    embed_dim: int = 256
    hidden: int = 4096
    vocabulary: tuple[str, ...] = ()
    npr_text: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)
    test_side: int = 448
    nouns: tuple[str, ...] = ()


PRESETS: dict[str, PGSegConfig] = {
    "tiny": PGSegConfig(
        image=IMAGE_PRESETS["tiny"],
        text="words",
        text_width=96,
        embed_dim=96,
        hidden=0,
        npr_text={"bandwidth": 0.3},
        test_side=128,
    ),
    "lite0": PGSegConfig(
        image=IMAGE_PRESETS["lite0"],
        text="sentences",
        embed_dim=128,
        hidden=0,
        test_side=224,
    ),
    "vit-s": PGSegConfig(image=IMAGE_PRESETS["vit-s"]),
}
"""``"vit-s"`` has the paper's sizes. ``"tiny"`` learns on thousands of pictures of 64 px, and departs from the paper in
these parts; behind each, how putting the paper's part back changes zero-shot mIoU on made scenes, without
prototypes, mean of seeds 0 to 2 (0.413 +- 0.027 as it is; see ``docs/pgseg.md``):

- convolutions of stride 2 with norms instead of one convolution for the patches: -0.188;
- group tokens that only attend, cosine assignment that is soft in training, and slots: group tokens in the sequence and
  hard Gumbel assignment: -0.121;
- no block behind the unit: -0.044;
- one unit with 8 groups: two with 16 and 8: -0.078 (+- 0.078);
- linear projections: with a hidden layer: -0.015 (+- 0.106);
- a contrast of single nouns by the groups beside that of sentences: without it: -0.070;
- a bag of words for texts, 96 channels, 64 px: not compared;
- bandwidth 0.3 for prototypes, not 0.1, with both regularizers: -0.086 (seeds 0 to 3).
"""


class PGSegOutput(NamedTuple):
    """What :class:`PGSeg` returns in training.

    Attributes:
        contrast: ``[]``, of pictures and texts.
        image_prototypes: ``[]``, the regularizers' losses on image tokens, summed over the stages; 0 without them.
        text_prototypes: ``[]``, the loss of the regularizer on words; 0 without it.
        nouns: ``[]``, the loss of single words; 0 without it.
        encoded: What the image encoder found.
        words: What the regularizer on words returned; None without it.
    """

    contrast: Tensor
    image_prototypes: Tensor
    text_prototypes: Tensor
    nouns: Tensor
    encoded: Encoded
    words: GroupPrototypes | None


class PGSeg(nn.Module):
    """Pictures and texts in one space, and the groups of a picture in it too.

    Args:
        config: Sizes.

    Attributes:
        left_out: Names of a published checkpoint's tensors that :meth:`from_published` did not need.
    """

    nouns: Tensor
    noun_pieces: Tensor

    def __init__(self, config: PGSegConfig) -> None:
        super().__init__()
        self.config, self.left_out = config, list[str]()

        self.image = GroupingEncoder(config.image)

        self.text: WordBag | SentenceTokens | TextTransformer
        if config.text == "words":
            self.text = WordBag(config.vocabulary, config.text_width)
        elif config.text == "sentences":
            self.text = SentenceTokens()
        else:
            self.text = TextTransformer(config.text_width, config.text_layers)

        self.image_projector = _projector(config.image.dim, config)
        self.text_projector = _projector(self.text.width, config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

        self.npr_text = None
        if config.npr_text is not None:
            options = {"detach_tokens": False, **config.npr_text}  # or nothing would train the projection of the words
            options = {"num_prototypes": config.image.groups[-1], **options}
            self.npr_text = GMMPrototypeRegularizer(config.image.dim, **options)
            self.word_projector = nn.Linear(self.text.width, config.image.dim)

        if config.nouns:
            if isinstance(self.text, TextTransformer):
                raise ValueError('PGSeg: nouns needs text="words" or "sentences"')
            known = config.nouns if config.text == "sentences" else config.vocabulary
            if unknown := set(config.nouns) - set(known):
                raise ValueError(f"PGSeg: nouns that are not in the vocabulary: {', '.join(sorted(unknown))}")
            self.register_buffer("nouns", self.text.tokenize(config.nouns), persistent=False)
            self.register_buffer("noun_pieces", self.text.pieces(config.nouns), persistent=False)

    def forward(self, images: Tensor, tokens: Tensor) -> PGSegOutput:
        """Compute the losses of pictures ``[B, 3, H, W]`` and the tokens ``[B, T]`` of their texts."""
        embedding, encoded = self.encode_image(images)
        sentence, words = self.encode_text(tokens)
        scale = self.log_scale.exp().clamp_max(LARGEST_SCALE)
        contrast = image_text_contrast(embedding, sentence, scale, same=_fingerprint(tokens))

        zero = contrast.new_zeros(())
        found = [stage.regularized.loss for stage in encoded.stages if stage.regularized is not None]

        by_words = None
        if self.npr_text is not None:
            queries = encoded.stages[-1].grouping.queries
            by_words = self.npr_text(self.word_projector(words.words), queries, words.mask)

        return PGSegOutput(
            contrast=contrast,
            image_prototypes=torch.stack(found).sum() if found else zero,
            text_prototypes=by_words.loss if by_words is not None else zero,
            nouns=self._noun_loss(encoded.groups, tokens, scale) if self.config.nouns else zero,
            encoded=encoded,
            words=by_words,
        )

    def _noun_loss(self, groups: Tensor, tokens: Tensor, scale: Tensor) -> Tensor:
        """Contrast each noun of a text with the nouns that are not in it, by the group that is most like it, softly."""
        nouns, _ = self.encode_text(self.nouns)
        cosines = unit(self.image_projector(groups).float()) @ unit(nouns.float()).T
        logits = (scale * cosines).logsumexp(1)
        there = contains(tokens, self.noun_pieces)
        absent = logits.masked_fill(there, -torch.inf).logsumexp(1, keepdim=True)
        terms = F.softplus(absent - logits) * there
        return (terms.sum(1) / there.sum(1).clamp_min(1)).mean()

    def segment(self, image: Tensor, class_names: Sequence[str | Sequence[str]], **options: Any) -> ZeroShot:
        """Give each pixel of a uint8 picture ``[3, H, W]`` a class: :func:`protoseg.models.pgseg.segment`."""
        return segment(self, image, class_names, **options)

    @classmethod
    def from_published(cls, path: str | os.PathLike[str]) -> PGSeg:
        """Load a checkpoint of the published PGSeg or GroupViT code, whose sizes are read off its tensors.

        Nothing in the file is executed: only tensors and plain values are read, other objects become inert. The
        prototypes of PGSeg's keep the published arithmetic, which its weights were trained with
        (:class:`protoseg.modules.PublishedPrototypeRegularizer`). What is not needed (the unused text mapping, the
        prototypes of its text path, GroupViT's multi-label temperature) is named in ``left_out``.

        Args:
            path: The ``.pth`` file.

        Returns:
            The network, in evaluation mode.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no such checkpoint, or tensors are missing.
        """
        state = {name.removeprefix("module."): value for name, value in read_file(Path(path)).items()}
        model = cls(PGSegConfig(**weights.read_config(state), npr_text=None))
        translated, model.left_out = weights.translate(state)
        missing, unexpected = model.load_state_dict(translated, strict=False)
        if missing or unexpected:
            raise ValueError(f"{path}: tensors are missing for {missing[:5]} and unknown for {unexpected[:5]}")
        return model.eval()

    def encode_image(self, images: Tensor) -> tuple[Tensor, Encoded]:
        """Embed normalized pictures ``[B, 3, H, W]``: ``[B, E]``, of any length, and what the encoder found."""
        encoded = self.image(images)
        return self.image_projector(encoded.pooled), encoded

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, TextTokens]:
        """Embed tokens ``[B, T]``: ``[B, E]``, of any length, and the words."""
        words = self.text(tokens)
        return self.text_projector(words.sentence), words


def _projector(inputs: int, config: PGSegConfig) -> nn.Module:
    if config.hidden:
        return ProjectionMLP(inputs, config.embed_dim, config.hidden)
    return nn.Linear(inputs, config.embed_dim)


def contains(tokens: Tensor, pieces: Tensor) -> Tensor:
    """Whether the pieces of a name stand in a text, one behind the other.

    Args:
        tokens: ``[B, T]``, 0 = none.
        pieces: ``[N, L]``, 0 behind the last piece of a name.

    Returns:
        ``[B, N]`` bool.

    Example:
        >>> contains(torch.tensor([[5, 7, 8, 0]]), torch.tensor([[7, 8], [8, 7], [5, 0]])).tolist()
        [[True, False, True]]
    """
    length = pieces.shape[1]
    windows = F.pad(tokens, (0, length - 1)).unfold(1, length, 1).unsqueeze(2)
    return ((windows == pieces) | (pieces == 0)).all(-1).any(1)


def _fingerprint(tokens: Tensor) -> Tensor:
    """A number for each row of tokens that equal rows share, however much padding they have."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    # Odd multipliers modulo 2^64, from the golden ratio: rows that differ practically never meet.
    return (tokens.long() * (places * -7046029254386353131 | 1)).sum(1)


def image_text_contrast(images: Tensor, texts: Tensor, scale: float | Tensor, same: Tensor | None = None) -> Tensor:
    r"""Contrast pictures and texts over all ranks, both ways.

    .. math::
        L = -\frac{1}{2B} \sum_i \Bigl( \sum_j q_{ij} \log \mathrm{softmax}_j\, t \langle z_i, u_j \rangle
        + \sum_j q_{ij} \log \mathrm{softmax}_j\, t \langle u_i, z_j \rangle \Bigr)

    with unit vectors :math:`z` of pictures and :math:`u` of texts; :math:`q_{ij}` shares 1 among the pairs whose texts
    are the same (in the paper and its code each pair has only itself, so that equal captions push each other away).

    Args:
        images: ``[B, E]``, of any length.
        texts: ``[B, E]``.
        scale: :math:`t`, the inverse temperature.
        same: ``[B]`` int64, equal where texts are the same; all are different where not given.

    Returns:
        ``[]``. Under DDP the mean over the ranks is the loss of the whole batch, and so is its gradient.

    Example:
        >>> images, texts = torch.eye(2), torch.eye(2)
        >>> image_text_contrast(images, texts, 10.0) < image_text_contrast(images, texts.flip(0), 10.0)
        tensor(True)
    """
    with no_autocast(images.device):
        images, texts = unit(full_precision(images)), unit(full_precision(texts))
        all_images, all_texts = gather_with_gradient(images), gather_with_gradient(texts)
        if same is None:
            rank = dist.get_rank() if world_size() > 1 else 0
            same = torch.arange(len(images), device=images.device) + rank * len(images)
        equal = (same.unsqueeze(1) == all_gather(same)).to(images.dtype)
        target = equal / equal.sum(1, keepdim=True)
        of_images = F.log_softmax(scale * images @ all_texts.T, 1)
        of_texts = F.log_softmax(scale * texts @ all_images.T, 1)
        return -(target * (of_images + of_texts)).sum(1).mean() / 2
