"""The segmentation networks, and the pyramid that the small one decodes."""

from __future__ import annotations

import pytest
import torch

from protoseg.models.heads import SmallResNet
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
    with pytest.raises(ValueError, match="must be 'unet:backbone' and needs the small backbone"):
        build_segmentation_network(name, 3, backbone=backbone)


def test_an_unknown_encoder_is_named() -> None:
    with pytest.raises(ValueError, match="expected ARCHITECTURE:ENCODER, got 'unet:no_such'"):
        build_segmentation_network("unet:no_such", 3)
