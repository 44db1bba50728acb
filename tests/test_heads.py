"""The CAM network and its backbones."""

from __future__ import annotations

import builtins
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from protoseg.models.heads import CAMNetwork, SmallResNet, TimmBackbone, build_cam_network

pytest.importorskip("timm", reason="the extra timm is not installed")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def resnet() -> TimmBackbone:
    return TimmBackbone("resnet10t").eval()


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (8, 8), (1, 9)])
@pytest.mark.parametrize("width", [1, 8])
def test_small_network_has_stride_8(size: tuple[int, int], width: int) -> None:
    network = SmallResNet(width).eval()
    out = network(torch.rand(2, 3, *size))
    assert out.shape == (2, 4 * width, math.ceil(size[0] / network.stride), math.ceil(size[1] / network.stride))
    assert network.channels == 4 * width
    assert out.min() >= 0


def test_small_network_s_size_is_the_documented_one() -> None:
    found = re.search(r"it has ([\d.]+) million parameters", SmallResNet.__doc__ or "")
    assert found is not None
    assert sum(each.numel() for each in SmallResNet().parameters()) == pytest.approx(1e6 * float(found[1]), rel=0.06)


@pytest.mark.parametrize("depths", [(1, 1, 1, 1), (2, 1, 3, 1)])
def test_depths_are_blocks(depths: Sequence[int]) -> None:
    network = SmallResNet(4, depths=depths)
    assert len(network.layers) == 3 + sum(depths)
    assert network(torch.rand(2, 3, 16, 16)).shape == (2, 16, 2, 2)


@pytest.mark.parametrize("width", [0, -3])
def test_width_must_be_positive(width: int) -> None:
    with pytest.raises(ValueError, match=f"SmallResNet: width must be above 0, got {width}"):
        SmallResNet(width)


@pytest.mark.parametrize("depths", [(1, 1, 1), (1, 0, 1, 1), ()])
def test_depths_must_be_four(depths: Sequence[int]) -> None:
    with pytest.raises(ValueError, match=r"SmallResNet: depths must be four numbers of at least 1, got \("):
        SmallResNet(4, depths=depths)


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


def test_timm_network_s_last_stage(resnet: TimmBackbone) -> None:
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        features = resnet(images)
    assert features.shape == (1, resnet.channels, 4, 6)
    assert resnet.stride == 16


@pytest.mark.parametrize(("name", "stride"), [("resnet10t", 8), ("resnet10t", 32), ("mobilenetv3_small_050", 8)])
def test_timm_network_s_stride(name: str, stride: int) -> None:
    backbone = TimmBackbone(name, stride=stride).eval()
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, 64, 64))
    assert features.shape == (1, backbone.channels, 64 // stride, 64 // stride)
    assert backbone.stride == stride


def test_timm_network_in_a_cam_network(resnet: TimmBackbone) -> None:
    network = CAMNetwork(resnet, 5)
    out = network(torch.rand(1, 3, 32, 32))
    assert out.cam.shape == (1, 5, 2, 2)
    torch.testing.assert_close(out.cam.mean((-2, -1)), out.logits)
    out.cam.sum().backward()
    assert all(each.grad is not None for each in network.parameters())


def test_an_unknown_timm_name_lists_near_ones() -> None:
    with pytest.raises(ValueError, match=r"must be a timm model, got 'resnt50'; near names: .*\bresnet50\b"):
        TimmBackbone("resnt50")
    with pytest.raises(ValueError, match=r"got '7#7#7'; near names: see timm.list_models\(\)"):
        TimmBackbone("7#7#7")


def test_a_timm_name_may_name_its_weights() -> None:
    assert TimmBackbone("resnet10t.c3_in1k").channels == 512


def test_a_timm_network_that_cannot_be_dilated() -> None:
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 cannot have stride 16 .*take a convolutional network"):
        TimmBackbone("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"vgg11 cannot have stride 16 or features_only \(AssertionError\)"):
        TimmBackbone("vgg11")


@pytest.mark.parametrize("stride", [0, 7, 64])
def test_strides_there_are(stride: int) -> None:
    with pytest.raises(ValueError, match=f"TimmBackbone: stride must be 8, 16 or 32, got {stride}"):
        TimmBackbone("mobilenetv3_small_050", stride=stride)


def test_without_timm_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "timm":
            raise ImportError("No module named 'timm'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'TimmBackbone needs timm; run pip install "protoseg\[timm\]"'):
        TimmBackbone("resnet10t")
    assert build_cam_network("small:2", 3).channels == 8  # needs none


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
    ("name", "pretrained", "message"),
    [
        ("small", True, "'small' has no pre-trained weights; name a timm model"),
        ("small:8", True, "'small:8' has no pre-trained weights"),
        ("small:wide", False, "backbone must look like 'small:32', got 'small:wide'"),
        ("small:-8", False, "backbone must look like 'small:32', got 'small:-8'"),
        ("small:0", False, "width must be above 0, got 0"),
        ("smal", False, "must be a timm model, got 'smal'"),
    ],
)
def test_names_that_cannot_be(name: str, pretrained: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_cam_network(name, 3, pretrained=pretrained)
