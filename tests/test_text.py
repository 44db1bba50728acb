from __future__ import annotations

import pytest
import torch

from protoseg.models.pgseg.text import TextTransformer, WordBag, vocabulary


def test_vocabulary_counts_and_leaves_out_what_names_nothing() -> None:
    captions = ["A photo of a Dog", "the dog and the cat", "a dog, a bird!"]
    assert vocabulary(captions) == ("dog", "bird", "cat")
    assert vocabulary(captions, least=2) == ("dog",)


def test_a_bag_is_the_mean_of_its_known_words() -> None:
    bag = WordBag(["dog", "cat"], 8)
    tokens = bag.tokenize(["the dog saw a cat and a dog", "a unicorn"])
    assert tokens.tolist() == [[1, 2, 1], [0, 0, 0]]
    out = bag(tokens)
    dog, cat = bag.embedding.weight[1:]
    torch.testing.assert_close(out.sentence[0], (2 * dog + cat) / 3)
    assert not out.sentence[1].any()
    assert out.mask.tolist() == [[True, True, True], [False, False, False]]
    assert WordBag(["dog"], 8, length=2).tokenize(["dog dog dog"]).shape == (1, 2)
    with pytest.raises(ValueError, match="the vocabulary has no word"):
        WordBag([], 8)


def test_the_transformer_reads_at_the_end_and_masks_the_padding() -> None:
    pytest.importorskip("open_clip", reason="the extra clip is not installed")
    torch.manual_seed(0)
    text = TextTransformer(64, 2).eval()
    tokens = text.tokenize(["a cat", "two dogs on the grass"])
    assert tokens.shape == (2, 77)
    out = text(tokens)
    assert out.mask.sum(1).tolist() == [2, 5]
    torch.testing.assert_close(out.sentence[0], out.words[0, 3])  # begin, a, cat, end
    changed = tokens.clone()
    changed[0, 20] = 5  # behind the end: a causal transformer cannot see it
    torch.testing.assert_close(text(changed).sentence, out.sentence)
