"""A frozen CLIP with a ResNet: against open_clip's own forward and the grad-cam package, at any size."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("open_clip", reason="the extra clip is not installed")

import open_clip
from open_clip.model import convert_weights_to_lp

from protoseg.clip import BACKGROUND, FrozenCLIP
from protoseg.clip.towers import ResNetTower

VISION: dict[str, Any] = {"layers": (1, 1, 1, 1), "width": 8, "head_width": 32, "image_size": 64}
TEXT: dict[str, Any] = {"context_length": 20, "width": 64, "heads": 2, "layers": 1}


def make() -> FrozenCLIP:
    torch.manual_seed(0)
    model = open_clip.CLIP(32, VISION, TEXT)
    for name, parameter in model.visual.named_parameters():
        if name.endswith("bn3.weight"):  # 0 at the start, where a stage would hand on its shortcut alone
            nn.init.uniform_(parameter, 0.5, 1.5)
    return FrozenCLIP(model, open_clip.SimpleTokenizer(context_length=20))


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    return make()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_at_the_training_size_it_is_open_clips_own_forward(clip: FrozenCLIP) -> None:
    images = torch.randn(2, 3, 64, 64)
    found = clip.encode(images, layers=[-1, 0, 1])
    with torch.no_grad():
        torch.testing.assert_close(found.pooled, clip.model.encode_image(images, normalize=True))
        stages = clip.visual.forward_intermediates(images)["image_intermediates"][1:]
    for each, number in zip(found.layers, (3, 0, 1), strict=True):
        torch.testing.assert_close(each, stages[number])
    assert [each.shape[1:] for each in found.layers] == [(256, 2, 2), (32, 16, 16), (64, 8, 8)]
    assert found.attention is None
    assert hooks(clip.model) == 0


def test_features_are_the_pools_of_each_place_alone(clip: FrozenCLIP) -> None:
    images = torch.randn(2, 3, 64, 96)
    found = clip.encode(images)
    pool = copy.deepcopy(clip.visual.attnpool)
    with torch.no_grad():
        pool.positional_embedding = nn.Parameter(torch.zeros(2, 256))
        last = clip.visual.forward_intermediates(images, intermediates_only=True)["image_intermediates"][-1]
        # The mean of one place is that place, so the pool attends to nothing else.
        alone = [pool(last[:, :, y : y + 1, x : x + 1]) for y in range(2) for x in range(3)]
    torch.testing.assert_close(found.features, torch.stack(alone, -1).reshape(2, 32, 2, 3))
    mean = nn.functional.normalize(found.features.mean((2, 3)), dim=-1)
    torch.testing.assert_close(clip.encode(images, pooling="patches").pooled, mean)


def test_another_size_is_open_clips_own_with_its_position_interpolated(clip: FrozenCLIP) -> None:
    images = torch.randn(1, 3, 96, 160)
    found = clip.encode(images)
    assert found.features.shape == (1, 32, 3, 5)
    other = copy.deepcopy(clip.visual)
    known = other.attnpool.positional_embedding
    map_ = known[1:].T.reshape(1, 256, 2, 2)
    scaled = nn.functional.interpolate(map_, (3, 5), mode="bicubic")[0].flatten(1).T
    other.attnpool.positional_embedding = nn.Parameter(torch.cat([known[:1], scaled]))
    with torch.no_grad():
        torch.testing.assert_close(found.pooled, nn.functional.normalize(other(images), dim=-1))
    picture = torch.randint(0, 256, (3, 70, 100), dtype=torch.uint8)
    assert clip.prepare(picture).shape == (1, 3, 64, 96)
    assert clip.prepare(picture, 32).shape == (1, 3, 32, 32)
    assert clip.encode(clip.prepare(picture, 32)).features.shape == (1, 32, 1, 1)


class Scores(nn.Module):
    """Probabilities of the classes by open_clip's own forward, for the grad-cam package."""

    def __init__(self, clip: FrozenCLIP, prototypes: Tensor, pooling: str) -> None:
        super().__init__()
        self.visual, self.prototypes, self.pooling, self.scale = clip.visual, prototypes, pooling, 1 / clip.temperature

    def forward(self, images: Tensor) -> Tensor:
        if self.pooling == "token":
            whole = self.visual(images)
        else:
            pool = self.visual.attnpool
            last = ResNetTower(self.visual).run(images).flatten(2).transpose(1, 2)
            whole = pool.c_proj(pool.v_proj(last)).mean(1)
        return (self.scale * nn.functional.normalize(whole, dim=-1) @ self.prototypes.T).softmax(-1)


@pytest.mark.parametrize("pooling", ["patches", "token"])
def test_grad_cam_is_the_packages(clip: FrozenCLIP, pooling: Any) -> None:
    package = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    images = torch.randn(2, 3, 64, 64)
    classes, background = clip.text_prototypes(["cat", "dog", "sofa"]), clip.text_prototypes(BACKGROUND[:4])
    found = clip.grad_cam(images, classes, background, pooling=pooling)
    assert (found.amax((0, -2, -1)) > 0).sum() >= 2, "maps that are 0 compare nothing"
    found = found / found.amax((-2, -1), keepdim=True).clamp_min(1e-30)
    scores, layer = Scores(clip, torch.cat([classes, background]), pooling), clip.visual.layer4
    clip.visual.requires_grad_(True)
    try:
        for c in range(3):
            chosen = [targets.ClassifierOutputTarget(c)] * 2
            with package.GradCAM(model=scores, target_layers=[layer]) as cam:
                cam(input_tensor=images.clone(), targets=chosen)
                caught = cam.activations_and_grads
                both = [np.asarray(each[0].detach()) for each in (caught.activations, caught.gradients)]
                # Before the package scales and enlarges its maps.
                raw = cam.get_cam_image(images, layer, chosen, *both)
            wanted = torch.as_tensor(np.asarray(raw)).relu().float()
            wanted = wanted / wanted.amax((-2, -1), keepdim=True).clamp_min(1e-30)
            torch.testing.assert_close(found[:, c], wanted, rtol=0, atol=1e-5)
    finally:
        clip.visual.requires_grad_(False)
        clip.zero_grad(set_to_none=True)


def test_absent_classes_have_no_map_and_nothing_is_left(clip: FrozenCLIP) -> None:
    images, classes = torch.randn(2, 3, 64, 96), nn.functional.normalize(torch.randn(3, 32), dim=-1)
    every = clip.grad_cam(images, classes)
    assert every.shape == (2, 3, 2, 3)
    assert every.max() > 0
    tags = torch.tensor([[1, 0, 0], [0, 1, 1]])
    torch.testing.assert_close(clip.grad_cam(images, classes, labels=tags), every * tags[:, :, None, None])
    pool = clip.visual.attnpool
    real, pool.v_proj.forward = pool.v_proj.forward, None
    with contextlib.suppress(TypeError):
        clip.grad_cam(images, classes)
    pool.v_proj.forward = real
    assert hooks(clip.model) == 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in clip.parameters())


def test_what_a_resnet_has_not_is_refused(clip: FrozenCLIP) -> None:
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"attentions must be 0, got 8: .* ModifiedResNet .* leave the affinity out"):
        clip.encode(images, attentions=8)
    for wrong in (4, -5):
        with pytest.raises(ValueError, match=f"layers must lie between -4 and 3, as the model has 4, got {wrong}"):
            clip.encode(images, layers=[wrong])
    with pytest.raises(ValueError, match=r"multiples of the patch's 32 pixels, got \(64, 80\)"):
        clip.encode(torch.zeros(1, 3, 64, 80))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole_model", [True, False], ids=["pure", "open_clip's"])
def test_half_precision(dtype: torch.dtype, whole_model: bool) -> None:
    whole, half = make(), make()
    if whole_model:
        half.model.to(dtype)
    else:
        convert_weights_to_lp(half.model, dtype)  # which leaves the norms and the position embedding as they are
    images, classes = torch.randn(1, 3, 64, 96), nn.functional.normalize(torch.randn(2, 32), dim=-1)
    found = half.encode(images.to(dtype), layers=[0])
    torch.testing.assert_close(found.pooled, whole.encode(images).pooled, rtol=0, atol=0.05)
    assert {each.dtype for each in (found.features, found.pooled, *found.layers)} == {torch.float32}
    maps = half.grad_cam(images.to(dtype), classes)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
