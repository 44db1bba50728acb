"""The segmentation networks, and the pyramid that the small one decodes."""

from __future__ import annotations

import pytest
import torch

from protoseg.models.backbones import SmallResNet, TimmBackbone
from protoseg.models.segmentation import SmallUnet, build_segmentation_network


def test_pyramid_ends_in_the_features_of_the_last_stage() -> None:
    torch.manual_seed(0)
    network = SmallResNet(8).eval()
    images = torch.rand(2, 3, 40, 48)
    maps = network.pyramid(images)
    assert [tuple(each.shape[1:]) for each in maps] == [(3, 40, 48), (8, 20, 24), (16, 10, 12), (32, 5, 6)]
    assert torch.equal(maps[-1], network(images))


def test_unet_trains_a_copy_of_the_backbone() -> None:
    torch.manual_seed(0)
    backbone = SmallResNet(8)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    network = build_segmentation_network("unet:backbone", 3, backbone=backbone)
    assert isinstance(network, SmallUnet)
    logits = network(torch.rand(2, 3, 32, 64))
    assert logits.shape == (2, 3, 32, 64)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["unet:backbone", "fpn:backbone"])
def test_backbone_needs_a_small_one_and_a_unet(name: str) -> None:
    backbone = None if name.startswith("unet") else SmallResNet(8)
    with pytest.raises(
        ValueError, match="needs a backbone of timm, or must be 'unet:backbone' with the small one, got"
    ):
        build_segmentation_network(name, 3, backbone=backbone)


@pytest.mark.parametrize("name", ["deeplabv3plus:backbone", "unet:backbone"])
def test_any_architecture_begins_with_a_timm_backbone_s_weights(name: str) -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone("mobilenetv3_small_050").eval()
    network = build_segmentation_network(name, 3, backbone=backbone).eval()
    encoder = network.get_submodule("encoder.model")
    own = backbone.network.state_dict()
    assert own.keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, own[key]) for key, value in encoder.state_dict().items())
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        assert network(images).shape == (2, 3, 64, 96)
        if name.startswith("deeplab"):  # the same stride
            torch.testing.assert_close(encoder(images)[-1], backbone(images), rtol=1e-4, atol=1e-5)
        next(iter(network.parameters())).zero_()
    assert all(torch.equal(value, own[key]) for key, value in backbone.network.state_dict().items())
    assert own["conv_stem.weight"].abs().sum() > 0


def test_an_architecture_of_half_the_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="the encoder of 'pspnet' does not take the weights of resnet10t"):
        build_segmentation_network("pspnet:backbone", 3, backbone=TimmBackbone("resnet10t"))


def test_weights_are_timms_or_a_backbone_s() -> None:
    with pytest.raises(
        ValueError, match="weights must be 'timm' or None, got 'package:a'; load others into a backbone"
    ):
        build_segmentation_network("unet:resnet18", 3, weights="package:a")  # type: ignore[arg-type]


def test_an_unknown_encoder_is_named() -> None:
    with pytest.raises(ValueError, match="expected ARCHITECTURE:ENCODER, got 'unet:no_such'"):
        build_segmentation_network("unet:no_such", 3)
