"""Text encoders: a bag of words that needs nothing, MiniLM as it is, and CLIP's transformer from open_clip."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from protoseg.models.sentences import minilm
from protoseg.utils.extras import require

__all__ = ["SentenceTokens", "TextTokens", "TextTransformer", "WordBag", "vocabulary"]

# Words that name nothing that can be seen.
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the this that there it its some is are was be and or of in on at by to with near next from for "
        "photo picture image",
    )
)


class TextTokens(NamedTuple):
    """What a text encoder returns.

    Attributes:
        sentence: ``[B, W]``.
        words: ``[B, T, W]``.
        mask: ``[B, T]`` bool, the words that are there.
    """

    sentence: Tensor
    words: Tensor
    mask: Tensor


def words_of(text: str) -> list[str]:
    """Split a text into lower-case words."""
    return re.findall(r"[^\W_]+", text.lower())


def vocabulary(captions: Iterable[str], least: int = 1) -> tuple[str, ...]:
    """Collect the words of captions, the most frequent first, without those that name nothing.

    Args:
        captions: Texts.
        least: How often a word must occur.

    Returns:
        The words.

    Example:
        >>> vocabulary(["a cat on a mat", "a cat"])
        ('cat', 'mat')
    """
    counts = Counter(word for caption in captions for word in words_of(caption))
    kept = [word for word, count in counts.items() if count >= least and word not in STOP_WORDS]
    return tuple(sorted(kept, key=lambda word: (-counts[word], word)))


class WordBag(nn.Module):
    """The mean of the embeddings of a text's words; words out of the vocabulary do not count.

    Args:
        words: The vocabulary.
        width: ``W``.
        length: Most words of a text.

    Example:
        >>> bag = WordBag(["cat", "mat"], width=8)
        >>> bag(bag.tokenize(["a cat on a mat", "nothing known"])).mask.tolist()
        [[True, True], [False, False]]
    """

    def __init__(self, words: Sequence[str], width: int, length: int = 32) -> None:
        super().__init__()
        if not words:
            raise ValueError("WordBag: the vocabulary has no word; give captions that name something")
        self.vocabulary, self.width, self.length = tuple(words), width, length
        self.index = {word: place for place, word in enumerate(words, 1)}
        self.embedding = nn.Embedding(len(words) + 1, width, padding_idx=0)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the words' indices ``[B, T]``, 0 = none, cut to the longest text."""
        rows = [[self.index[word] for word in words_of(text) if word in self.index][: self.length] for text in texts]
        longest = max(1, *map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    def pieces(self, texts: Sequence[str]) -> Tensor:
        """Return what of :meth:`tokenize` a text's words become within a longer one: here the same."""
        return self.tokenize(texts)

    def unknown(self, text: str) -> list[str]:
        """The words of a text that name something and are not in the vocabulary.

        Example:
            >>> WordBag(["cat"], width=8).unknown("a cat on a mat")
            ['mat']
        """
        return [word for word in words_of(text) if word not in self.index and word not in STOP_WORDS]

    def forward(self, tokens: Tensor) -> TextTokens:
        """Encode ``[B, T]``."""
        words, mask = self.embedding(tokens), tokens > 0
        sentence = words.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return TextTokens(sentence, words, mask)


class SentenceTokens(nn.Module):
    """MiniLM as it was trained, on sentences of all kinds: it learns nothing more, and knows names that no caption has.

    Raises:
        ImportError: A package of the extra pocket is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self._pieces = minilm("SentenceTokens")
        self.encoder.requires_grad_(False)
        self.width = self.encoder.width

    def train(self, mode: bool = True) -> SentenceTokens:
        """Stay in evaluation mode: what is not trained has no dropout."""
        return super().train(False)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return MiniLM's tokens ``[B, T]``, 0 = none; of a text that is longer than it can read, the first 512."""
        return self._pieces(list(texts))[:, : self._pieces.context_length]

    def pieces(self, texts: Sequence[str]) -> Tensor:
        """Return what of :meth:`tokenize` a text's words become within a longer one: ``[B, T]``, without the marks."""
        rows = [torch.tensor(self._pieces.encode(text)) for text in texts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> TextTokens:
        """Encode ``[B, T]``."""
        states = self.encoder.states(tokens)
        # The words lie between the marks of beginning and end.
        there = tokens > 0
        place = torch.arange(tokens.shape[1], device=tokens.device)
        words = (place > 0) & (place < there.sum(1, keepdim=True) - 1)
        return TextTokens(self.encoder.mean(states, tokens), states, words)


class TextTransformer(nn.Module):
    """CLIP's causal text transformer, with open_clip's tokenizer: 77 tokens, the sentence read at its end.

    Args:
        width: ``W``, a multiple of 64.
        layers: Blocks.

    Raises:
        ImportError: open_clip is not installed.
    """

    def __init__(self, width: int = 256, layers: int = 12) -> None:
        super().__init__()
        open_clip = require("open_clip", "TextTransformer", "clip")
        layer = open_clip.transformer
        options = {"act_layer": layer.QuickGELU, "norm_layer": nn.LayerNorm, "output_tokens": True}
        self.tower = layer.TextTransformer(width=width, heads=width // 64, layers=layers, output_dim=None, **options)
        self.width = width
        self._tokenizer = open_clip.SimpleTokenizer()

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return open_clip's tokens ``[B, 77]``."""
        tokens: Tensor = self._tokenizer(list(texts))
        return tokens

    def forward(self, tokens: Tensor) -> TextTokens:
        """Encode ``[B, 77]``."""
        sentence, words = self.tower(tokens)
        # Words lie between the marks of beginning and end; the end has the highest number.
        place, end = torch.arange(tokens.shape[1], device=tokens.device), tokens.argmax(1, keepdim=True)
        return TextTokens(sentence, words, (place > 0) & (place < end))
