"""PGSeg's losses against loops, and over two processes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("timm", reason="the extra timm is not installed")

from protoseg.models.pgseg.grouping import ImageConfig
from protoseg.models.pgseg.network import PGSeg, PGSegConfig, image_text_contrast

IMAGE = ImageConfig(image_size=16, patch_size=4, stem="conv", dim=16, heads=2, depths=(1, 0), groups=(3,), unit="slots")
CONFIG = PGSegConfig(
    image=IMAGE,
    text="words",
    text_width=8,
    embed_dim=8,
    hidden=0,
    vocabulary=("cat", "dog", "sea"),
    nouns=("cat", "sea"),
)
TEXTS = ["a cat", "a dog", "a cat", "a dog at sea", "the sea", "a cat and a dog"]


def contrast_loop(images: Tensor, texts: Tensor, scale: float, same: list[int]) -> float:
    count, total = len(images), 0.0
    for a, b in ((images, texts), (texts, images)):
        for i in range(count):
            scores = [
                math.exp(scale * float(torch.nn.functional.cosine_similarity(a[i], b[j], dim=0))) for j in range(count)
            ]
            positives = [j for j in range(count) if same[j] == same[i]]
            total -= sum(math.log(scores[j] / sum(scores)) for j in positives) / len(positives)
    return total / (2 * count)


def test_contrast_equals_a_loop() -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    plain = image_text_contrast(images, texts, 3.0)
    assert plain.item() == pytest.approx(contrast_loop(images, texts, 3.0, [0, 1, 2, 3, 4]))
    merged = image_text_contrast(images, texts, 3.0, torch.tensor([7, 1, 7, 3, 7]))
    assert merged.item() == pytest.approx(contrast_loop(images, texts, 3.0, [7, 1, 7, 3, 7]))


def model(**changes: Any) -> PGSeg:
    torch.manual_seed(0)
    return PGSeg(dataclasses.replace(CONFIG, **changes))


def pictures() -> Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_equal_captions_are_merged_whatever_their_padding() -> None:
    net = model()
    tokens = net.text.tokenize(TEXTS)
    out = net(pictures(), tokens)
    embedding, _ = net.encode_image(pictures())
    sentence, _ = net.encode_text(tokens)
    scale = net.log_scale.exp()
    want = image_text_contrast(embedding, sentence, scale, torch.tensor([0, 1, 0, 2, 3, 4]))
    torch.testing.assert_close(out.contrast, want)
    torch.testing.assert_close(net(pictures(), torch.nn.functional.pad(tokens, (0, 4))).contrast, want)


@torch.no_grad()
def test_the_loss_of_nouns_equals_a_loop() -> None:
    net = model()
    out = net(pictures(), net.text.tokenize(TEXTS))
    embed = {noun: net.encode_text(net.text.tokenize([noun]))[0][0] for noun in ("cat", "sea")}
    groups, scale = net.image_projector(out.encoded.groups), float(net.log_scale.exp())
    total = 0.0
    for picture, text in zip(groups, TEXTS, strict=True):
        logit = {
            noun: math.log(
                sum(math.exp(scale * float(torch.nn.functional.cosine_similarity(g, e, dim=0))) for g in picture)
            )
            for noun, e in embed.items()
        }
        there, absent = ([noun for noun in embed if (noun in text) == wanted] for wanted in (True, False))
        terms = [
            -math.log(math.exp(logit[n]) / (math.exp(logit[n]) + sum(math.exp(logit[m]) for m in absent)))
            for n in there
        ]
        total += sum(terms) / len(terms) if terms else 0.0
    assert out.nouns.item() == pytest.approx(total / len(TEXTS), rel=1e-4)


def test_each_loss_can_be_left_out() -> None:
    tokens = model().text.tokenize(TEXTS)
    plain = model(image=dataclasses.replace(IMAGE, npr=None), npr_text=None, nouns=())(pictures(), tokens)
    assert (plain.image_prototypes, plain.text_prototypes, plain.nouns) == (0, 0, 0)
    assert plain.words is None
    accept = {"reject_threshold": -1.0}
    both = model(image=dataclasses.replace(IMAGE, npr=accept), npr_text=accept)(pictures(), tokens)
    assert both.image_prototypes > 0
    assert both.text_prototypes > 0
    assert both.words is not None
    assert both.words.responsibilities.shape == (6, tokens.shape[1], 3)
    torch.testing.assert_close(both.words.responsibilities.sum(-1), (tokens > 0).float())
    with pytest.raises(ValueError, match="nouns that are not in the vocabulary: unicorn"):
        model(nouns=("cat", "unicorn"))


def test_every_parameter_has_a_gradient() -> None:
    accept = {"reject_threshold": -1.0}
    net = model(image=dataclasses.replace(IMAGE, npr=accept), npr_text=accept)
    out = net(pictures(), net.text.tokenize(TEXTS))
    torch.autograd.backward(out.contrast + out.image_prototypes + out.text_prototypes + out.nouns)
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


class Trained(nn.Module):
    """The whole loss, for DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model(npr_text=None, image=dataclasses.replace(IMAGE, npr=None))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        out = self.net(images, tokens)
        loss: Tensor = out.contrast + out.nouns
        return loss


def gradients(network: nn.Module, half: slice) -> list[Tensor]:
    tokens = model().text.tokenize(TEXTS)
    loss = network(pictures()[half], tokens[half])
    torch.autograd.backward(loss)
    return [loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]


def rank_main(rank: int) -> Any:
    return gradients(DistributedDataParallel(Trained()), slice(3 * rank, 3 * rank + 3))


@pytest.mark.slow
def test_two_processes_equal_one(two_processes: Any) -> None:
    first, second = two_processes(rank_main)
    alone = gradients(Trained(), slice(None))
    torch.testing.assert_close((first[0] + second[0]) / 2, alone[0])
    torch.testing.assert_close(first[1:], alone[1:], rtol=1e-4, atol=1e-6)
