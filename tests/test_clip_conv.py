"""A frozen CLIP with a ConvNeXt, and masks of a picture: against open_clip's own forward and the grad-cam package."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("open_clip", reason="the extra clip is not installed")
pytest.importorskip("timm", reason="the extra timm is not installed")

import open_clip

from protoseg.clip import FrozenCLIP, segment
from protoseg.functional import feature_attention

VISION: dict[str, Any] = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
TEXT: dict[str, Any] = {"context_length": 20, "width": 64, "heads": 2, "layers": 1}


def make() -> FrozenCLIP:
    torch.manual_seed(0)
    model = open_clip.CLIP(32, VISION, TEXT)
    for name, parameter in model.visual.named_parameters():
        if name.endswith(".gamma"):  # next to 0 at the start, where a block hands on its shortcut alone
            nn.init.uniform_(parameter, 0.5, 1.5)
    return FrozenCLIP(model, open_clip.SimpleTokenizer(context_length=20))


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    return make()


def test_at_any_size_it_is_open_clips_own_forward(clip: FrozenCLIP) -> None:
    for size in ((64, 64), (96, 32)):
        images = torch.randn(2, 3, *size)
        found = clip.encode(images, layers=[0, -1])
        with torch.no_grad():
            torch.testing.assert_close(found.pooled, clip.model.encode_image(images, normalize=True))
        assert found.features.shape == (2, 32, size[0] // 32, size[1] // 32)
        assert [each.shape[-1] for each in found.layers] == [size[1] // 4, size[1] // 32]
    assert clip.blocks == 4
    assert not clip.attends


def test_a_feature_is_the_embedding_of_a_picture_that_is_everywhere_the_same(clip: FrozenCLIP) -> None:
    found = clip.encode(torch.randn(1, 3, 64, 64), layers=[-1])
    visual = clip.visual
    with torch.no_grad():
        for y, x in ((0, 0), (1, 0)):
            same = found.layers[0][..., y : y + 1, x : x + 1].expand(-1, -1, 3, 3)
            torch.testing.assert_close(found.features[..., y, x], visual.head(visual.trunk.forward_head(same)))


class Probabilities(nn.Module):
    """A classifier as the package wants one."""

    def __init__(self, clip: FrozenCLIP, prototypes: Tensor) -> None:
        super().__init__()
        self.visual, self.prototypes, self.scale = clip.visual, prototypes, 1 / clip.temperature

    def forward(self, images: Tensor) -> Tensor:
        return (self.scale * nn.functional.normalize(self.visual(images), dim=-1) @ self.prototypes.T).softmax(-1)


def test_grad_cam_is_the_packages_also_where_gradients_are_off(clip: FrozenCLIP) -> None:
    package = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    images = torch.randn(2, 3, 96, 64)
    classes, background = clip.text_prototypes(["cat", "dog"]), clip.text_prototypes(["sky", "wall"])
    with torch.no_grad():
        found = clip.grad_cam(images, classes, background, pooling="token")
    assert (found.amax((-2, -1)) > 0).sum() >= 2, "maps that are 0 compare nothing"
    found = found / found.amax((-2, -1), keepdim=True).clamp_min(1e-30)
    layer, scores = clip.visual.trunk.stages[-1], Probabilities(clip, torch.cat([classes, background]))
    clip.visual.requires_grad_(True)
    try:
        for c in range(2):
            chosen = [targets.ClassifierOutputTarget(c)] * 2
            with package.GradCAM(model=scores, target_layers=[layer]) as cam:
                cam(input_tensor=images.clone(), targets=chosen)
                caught = cam.activations_and_grads
                both = [np.asarray(each[0].detach()) for each in (caught.activations, caught.gradients)]
                raw = cam.get_cam_image(images, layer, chosen, *both)  # before the package scales and enlarges it
            wanted = torch.as_tensor(np.asarray(raw)).relu().float()
            wanted = wanted / wanted.amax((-2, -1), keepdim=True).clamp_min(1e-30)
            torch.testing.assert_close(found[:, c], wanted, rtol=0, atol=1e-5)
    finally:
        clip.visual.requires_grad_(False)
        clip.zero_grad(set_to_none=True)


def test_feature_attention_is_a_softmax_of_cosines() -> None:
    features = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    found = feature_attention(features, temperature=0.5)
    places = features.flatten(2)
    for b in range(2):
        for row in range(6):
            cosines = [torch.cosine_similarity(places[b, :, row], places[b, :, m], dim=0) for m in range(6)]
            torch.testing.assert_close(found[b, row], (torch.stack(cosines) / 0.5).softmax(0))


@pytest.fixture(params=["convolutional", "transformer"])
def either(request: pytest.FixtureRequest, clip: FrozenCLIP) -> FrozenCLIP:
    if request.param == "convolutional":
        return clip
    torch.manual_seed(1)
    model = open_clip.CLIP(32, {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}, TEXT)
    return FrozenCLIP(model, open_clip.SimpleTokenizer(context_length=20))


def picture(height: int = 70, width: int = 130) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_masks_have_only_the_tags_classes(either: FrozenCLIP) -> None:
    vectors, background = either.text_prototypes(["cat", "dog", "cow"]), either.text_prototypes(["sky"])
    found = segment(either, picture(), vectors, background, torch.tensor([0, 1, 0]), short_side=64)
    assert found.mask.shape == (70, 130)
    assert found.mask.dtype == torch.uint8
    assert set(found.mask.unique().tolist()) <= {0, 2}
    assert found.maps.shape == (3, 70, 130)
    assert 0 <= found.maps.min() <= found.maps.max() <= 1
    assert found.maps[0].max() == found.maps[2].max() == 0
    # The mask is the map's threshold.
    assert torch.equal(found.mask == 2, found.maps[1] >= 0.4)
    none = segment(either, picture(), vectors, background, torch.zeros(3), short_side=64)
    assert none.mask.max() == 0


def test_without_tags_the_probable_classes_are_there(either: FrozenCLIP) -> None:
    vectors, background = either.text_prototypes(["cat", "dog", "cow"]), either.text_prototypes(["sky"])
    pixels = either.prepare(picture(), 64)
    every = torch.cat([vectors, background])
    share = (either.encode(pixels, pooling="patches").pooled @ every.T / either.temperature).softmax(-1)[0, :3]
    middle = float(share.median())
    found = segment(either, picture(), vectors, background, presence=middle, short_side=64)
    assert torch.equal(found.labels != 0, share >= middle)
    assert segment(either, picture(), vectors, background, presence=1.0, short_side=64).mask.max() == 0


def test_segment_refuses_what_does_not_belong_together(either: FrozenCLIP) -> None:
    vectors = either.text_prototypes(["cat", "dog"])
    with pytest.raises(ValueError, match="labels"):
        segment(either, picture(), vectors, labels=torch.ones(3), short_side=64)
    with pytest.raises(ValueError, match="threshold"):
        segment(either, picture(), vectors, threshold=2.0)
    with pytest.raises(ValueError, match="presence"):
        segment(either, picture(), vectors, presence=-1.0)
    with pytest.raises(ValueError, match="smaller than a patch"):
        segment(either, picture(3, 3), vectors)
    with pytest.raises(TypeError, match="uint8"):
        segment(either, picture().float(), vectors)
