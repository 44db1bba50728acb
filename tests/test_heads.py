"""The CAM network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from protoseg import ContextPrototypeBank
from protoseg.models.backbones import SmallResNet, TimmBackbone
from protoseg.models.cam import CAMNetwork, build_cam_network

pytest.importorskip("timm", reason="the extra timm is not installed")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_the_cam_is_the_classifier_on_every_pixel_and_its_mean_the_logit() -> None:
    network = CAMNetwork(SmallResNet(4), 3).eval().requires_grad_(False)
    logits, features, cam = network(torch.rand(2, 3, 24, 32))
    weight = network.classifier.weight[:, :, 0, 0]
    assert logits.shape == (2, 3)
    assert features.shape == (2, network.channels, 3, 4)
    assert cam.shape == (2, 3, 3, 4)
    for b in range(2):
        for c in range(3):
            scores = [[float(weight[c] @ features[b, :, y, x]) for x in range(4)] for y in range(3)]
            torch.testing.assert_close(cam[b, c], torch.tensor(scores), rtol=1e-4, atol=1e-6)
            assert float(logits[b, c]) == pytest.approx(sum(map(sum, scores)) / 12, abs=1e-5)
    # The head of Zhou et al., which pools first, gives the same logits.
    torch.testing.assert_close(logits, features.mean((-2, -1)) @ weight.T, rtol=1e-4, atol=1e-6)


def test_a_prior_is_what_the_logits_say_of_nothing() -> None:
    network = CAMNetwork(SmallResNet(4), 3, prior=0.1).eval()
    images = torch.rand(2, 3, 24, 32)
    logits, _, cam = network(images)
    torch.testing.assert_close((logits - cam.mean((-2, -1))).sigmoid(), torch.full((2, 3), 0.1))
    for prior in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"CAMNetwork: prior must lie between 0 and 1, got {prior}"):
            CAMNetwork(SmallResNet(4), 3, prior=prior)


@pytest.mark.parametrize("output", ["logits", "features", "cam"])
def test_gradients_reach_the_first_layer_from_every_output(output: str) -> None:
    network = CAMNetwork(SmallResNet(4), 3)
    out = network(torch.rand(2, 3, 16, 16))
    getattr(out, output).square().sum().backward()
    first = next(network.backbone.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert (network.classifier.weight.grad is None) == (output == "features")


def test_it_learns_and_its_cam_is_trained_with_it() -> None:
    network = CAMNetwork(SmallResNet(4), 2)
    images = torch.rand(8, 3, 16, 16)
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 4)
    images[::2, 0] += 1
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    losses = []
    for _ in range(20):
        loss = nn.functional.multilabel_soft_margin_loss(network(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_state_dict_goes_into_another_network() -> None:
    networks = [CAMNetwork(SmallResNet(4), 3).eval() for _ in range(2)]
    images = torch.rand(1, 3, 16, 16)
    assert not torch.equal(networks[0](images).cam, networks[1](images).cam)
    networks[1].load_state_dict(networks[0].state_dict())
    assert torch.equal(networks[0](images).cam, networks[1](images).cam)


def test_classes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="CAMNetwork: num_classes must be above 0, got 0"):
        CAMNetwork(SmallResNet(4), 0)


def test_timm_network_in_a_cam_network() -> None:
    network = CAMNetwork(TimmBackbone("resnet10t").eval(), 5)
    out = network(torch.rand(1, 3, 32, 32))
    assert out.cam.shape == (1, 5, 2, 2)
    torch.testing.assert_close(out.cam.mean((-2, -1)), out.logits)
    out.cam.sum().backward()
    assert all(each.grad is not None for each in network.parameters())


@pytest.mark.parametrize(("name", "channels"), [("small", 128), ("small:", 128), ("small:6", 24), ("resnet10t", 512)])
def test_networks_by_name(name: str, channels: int) -> None:
    network = build_cam_network(name, 4)
    assert network.channels == channels
    assert network.classifier.weight.shape == (4, channels, 1, 1)


def test_stride_by_name() -> None:
    network = build_cam_network("resnet10t", 2, stride=8).eval()
    with torch.no_grad():
        cam: Tensor = network(torch.rand(1, 3, 32, 32)).cam
    assert cam.shape == (1, 2, 4, 4)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("small", "timm", "small:32 has no pre-trained weights, got 'timm'; take a timm model or a file"),
        ("small:8", "package:efficientnet-lite0", "small:8 has no pre-trained weights"),
        ("small:wide", None, "backbone must look like 'small:32', got 'small:wide'"),
        ("small:-8", None, "backbone must look like 'small:32', got 'small:-8'"),
        ("small:0", None, "width must be above 0, got 0"),
        ("smal", None, "must be a timm model, got 'smal'"),
    ],
)
def test_names_that_cannot_be(name: str, weights: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_cam_network(name, 3, weights=weights)


@pytest.mark.parametrize("name", ["small:4", "mobilenetv3_small_050"])
def test_weights_by_name(name: str, tmp_path: Path) -> None:
    first = build_cam_network(name, 3)
    torch.save(first.state_dict(), tmp_path / "first.pt")
    second = build_cam_network(name, 5, weights=tmp_path / "first.pt")
    for key, value in first.backbone.state_dict().items():
        assert torch.equal(second.backbone.state_dict()[key], value)


@pytest.mark.parametrize("name", ["small:4", "mobilenetv3_small_050"])
def test_a_bank_can_be_given_the_map_before_the_last(name: str) -> None:
    last = build_cam_network(name, 3).eval()
    network = build_cam_network(name, 3, bank_features="penultimate").eval()
    network.load_state_dict(last.state_dict())
    images = torch.rand(2, 3, 64, 64)
    out, usual = network(images), last(images)
    penultimate, features = network.backbone.last_two(images)
    assert torch.equal(out.cam, usual.cam)
    assert torch.equal(out.logits, usual.logits)
    assert torch.equal(out.features, penultimate)
    assert torch.equal(usual.features, features)
    assert network.channels == network.backbone.penultimate_channels == penultimate.shape[1]
    bank = ContextPrototypeBank(3, network.channels)
    bank(out.features, out.cam, torch.eye(3)[:2]).loss.backward()


def test_bank_features_there_are() -> None:
    with pytest.raises(ValueError, match="bank_features must be one of 'penultimate', 'last', got 'first'"):
        CAMNetwork(SmallResNet(4), 3, bank_features="first")  # type: ignore[arg-type]
