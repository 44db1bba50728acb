"""A frozen CLIP: against open_clip's own forward and the grad-cam package, at any size; what is refused."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("open_clip", reason="the extra clip is not installed")

import open_clip

from protoseg.clip import BACKGROUND, FrozenCLIP
from protoseg.clip.towers import TransformerTower, position
from protoseg.functional import attention_affinity, refine_by_affinity

SIZES: dict[str, Any] = {"width": 64, "layers": 3}
VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8, "head_width": 32, **SIZES}
TEXT: dict[str, Any] = {"context_length": 20, "heads": 2, **SIZES}


def make(seed: int = 0, **vision: Any) -> FrozenCLIP:
    torch.manual_seed(seed)
    model = open_clip.CLIP(32, {**VISION, **vision}, TEXT)
    for block in model.visual.transformer.resblocks:  # attention that attends
        nn.init.normal_(block.attn.in_proj_weight, std=0.2)
    return FrozenCLIP(model, open_clip.SimpleTokenizer(context_length=20))


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    return make()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("vision", [{}, {"pool_type": "avg"}, {"final_ln_after_pool": True}], ids=str)
def test_at_the_training_size_it_is_open_clips_own_forward(vision: dict[str, Any]) -> None:
    clip, images = make(**vision), torch.randn(2, 3, 32, 32)
    found = clip.encode(images)
    with torch.no_grad():
        torch.testing.assert_close(found.pooled, clip.model.encode_image(images, normalize=True))
        clip.visual.output_tokens = True
        _, tokens = clip.visual(images)
    if vision.get("final_ln_after_pool"):
        tokens = clip.visual.ln_post(tokens)
    torch.testing.assert_close(found.features.flatten(2).transpose(1, 2), tokens @ clip.visual.proj)


def test_another_size_interpolates_the_position(clip: FrozenCLIP) -> None:
    features = clip.encode(torch.randn(1, 3, 48, 24)).features
    assert features.shape == (1, 32, 6, 3)
    known = clip.visual.positional_embedding
    assert torch.equal(position(known, (4, 4), (4, 4)), known)
    wide = position(known, (4, 4), (8, 8))
    assert torch.equal(wide[0], known[0])
    torch.testing.assert_close(wide[1:].mean(0), known[1:].mean(0), rtol=0, atol=0.02)
    # Of a position that rises along x, the interpolation rises along x.
    slope = torch.cat([torch.zeros(1), torch.arange(4.0).repeat(4)])
    rising = position(slope[:, None], (4, 4), (4, 8))[1:, 0].reshape(4, 8)
    assert (rising.diff(dim=1) > 0).all()
    assert torch.allclose(rising, rising[:1].expand(4, -1))


def test_attention_is_that_of_the_blocks(clip: FrozenCLIP) -> None:
    images = torch.randn(2, 3, 32, 32)
    seen: list[Tensor] = []

    def record(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        query = args[0] if args else kwargs["query"]
        with torch.no_grad():
            seen.append(type(module).forward(module, query, query, query, need_weights=True)[1])

    handles = [
        block.attn.register_forward_hook(record, with_kwargs=True) for block in clip.visual.transformer.resblocks
    ]
    found = clip.encode(images, attentions=2)
    for handle in handles:
        handle.remove()
    assert found.attention is not None
    torch.testing.assert_close(found.attention, (seen[1] + seen[2])[:, 1:, 1:] / 2)
    assert clip.encode(images).attention is None


def test_layers_are_what_the_blocks_put_out(clip: FrozenCLIP) -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = clip.visual.forward_intermediates(images)["image_intermediates"]
    found = clip.encode(images, layers=[-1, 0, 2])
    for each, number in zip(found.layers, (2, 0, 2), strict=True):
        torch.testing.assert_close(each, wanted[number])
    torch.testing.assert_close(found.features, clip.encode(images).features)
    assert clip.encode(torch.randn(1, 3, 48, 24), layers=[1]).layers[0].shape == (1, 64, 6, 3)
    assert clip.encode(images).layers == ()
    assert hooks(clip.model) == 0
    for wrong in (3, -4):
        with pytest.raises(ValueError, match=f"layers must lie between -3 and 2, as the model has 3, got {wrong}"):
            clip.encode(images, layers=[0, wrong])


class Scores(nn.Module):
    """Probabilities of the classes by open_clip's own modules, for the grad-cam package."""

    def __init__(self, clip: FrozenCLIP, prototypes: Tensor, pooling: str) -> None:
        super().__init__()
        self.visual, self.prototypes, self.pooling, self.scale = clip.visual, prototypes, pooling, 1 / clip.temperature

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.visual.ln_post(TransformerTower(self.visual).run(images)) @ self.visual.proj
        whole = tokens[:, 1:].mean(1) if self.pooling == "patches" else tokens[:, 0]
        return (self.scale * nn.functional.normalize(whole, dim=-1) @ self.prototypes.T).softmax(-1)


@pytest.mark.parametrize("pooling", ["patches", "token"])
def test_grad_cam_is_the_packages(clip: FrozenCLIP, pooling: Any) -> None:
    package = pytest.importorskip("pytorch_grad_cam", reason="grad-cam is not installed")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    images = torch.randn(2, 3, 48, 32)
    classes, background = clip.text_prototypes(["cat", "dog", "sofa"]), clip.text_prototypes(BACKGROUND[:4])
    found = clip.grad_cam(images, classes, background, pooling=pooling)
    found = found / found.amax((-2, -1), keepdim=True).clamp_min(1e-30)
    scores = Scores(clip, torch.cat([classes, background]), pooling)
    options: dict[str, Any] = {"target_layers": [clip.visual.transformer.resblocks[-1].ln_1]}

    options["reshape_transform"] = lambda tokens: tokens[:, 1:].transpose(1, 2).reshape(2, 64, 6, 4)
    clip.visual.requires_grad_(True)
    try:
        for c in range(3):
            chosen = [targets.ClassifierOutputTarget(c)] * 2
            with package.GradCAM(model=scores, **options) as cam:
                cam(input_tensor=images.clone(), targets=chosen)
                caught = cam.activations_and_grads
                layer = [np.asarray(each[0].detach()) for each in (caught.activations, caught.gradients)]
                # Before the package scales and enlarges its maps.
                raw = cam.get_cam_image(images, options["target_layers"][0], chosen, *layer)
            wanted = torch.as_tensor(np.asarray(raw)).relu().float()
            wanted = wanted / wanted.amax((-2, -1), keepdim=True).clamp_min(1e-30)
            torch.testing.assert_close(found[:, c], wanted, rtol=0, atol=1e-5)
    finally:
        clip.visual.requires_grad_(False)
        clip.zero_grad(set_to_none=True)


def test_classes_and_pictures_together_are_each_by_itself(clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    images, classes = torch.randn(3, 3, 32, 48), nn.functional.normalize(torch.randn(6, 32), dim=-1)
    tags = torch.tensor([[0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1]])
    wanted = torch.zeros(3, 6, 4, 6)
    for row, c in tags.nonzero().tolist():
        others = torch.cat([classes[:c], classes[c + 1 :]])
        wanted[row, c] = clip.grad_cam(images[row : row + 1], classes[c : c + 1], others)[0, 0]
    passes: list[Any] = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: (passes.append(1), real(*args, **kwargs))[1])
    found = clip.grad_cam(images.requires_grad_(), classes, labels=tags)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.max()))
    assert len(passes) == 2, "as many as the picture with the most labels has"
    assert images.grad is None


def test_grad_cam_by_hand_is_finite_where_the_probability_is_one(clip: FrozenCLIP) -> None:
    images = torch.randn(1, 3, 32, 32)
    whole = clip.encode(images, pooling="patches").pooled
    others = torch.randn(3, 32)
    others = nn.functional.normalize(others - (others @ whole.T) * whole, dim=-1)
    prototypes = torch.cat([whole, others])
    scores = Scores(clip, prototypes, "patches")
    scores.scale = 1000.0
    assert float(scores(images)[0, 0]) == 1.0  # whose gradient is 0
    sharp = make()
    with torch.no_grad():
        sharp.model.logit_scale.fill_(float(np.log(1000.0)))
    maps = sharp.grad_cam(images, prototypes)
    assert maps.isfinite().all()
    assert maps[:, 0].max() > 0


def test_absent_classes_have_no_map_and_one_class_alone_has_one(clip: FrozenCLIP) -> None:
    images, classes = torch.randn(2, 3, 32, 32), clip.text_prototypes(["cat", "dog", "sofa"])
    every = clip.grad_cam(images, classes)
    tags = torch.tensor([[1, 0, 0], [0, 1, 1]])
    some = clip.grad_cam(images, classes, labels=tags)
    torch.testing.assert_close(some, every * tags[:, :, None, None])
    assert (clip.grad_cam(images, classes, labels=torch.zeros(2, 3)) == 0).all()
    assert clip.grad_cam(images, classes[:1]).max() > 0
    assert not some.requires_grad


def test_nothing_is_left_on_the_model(clip: FrozenCLIP) -> None:
    images, classes = torch.randn(1, 3, 32, 32), clip.text_prototypes(["cat"])
    clip.encode(images, attentions=3)
    clip.grad_cam(images, classes)
    assert hooks(clip.model) == 0
    block = clip.visual.transformer.resblocks[-1]
    real, block.mlp.forward = block.mlp.forward, None
    with contextlib.suppress(TypeError):
        clip.grad_cam(images, classes)
    block.mlp.forward = real
    assert hooks(clip.model) == 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in clip.parameters())
    assert not clip.train().training
    tower = TransformerTower(clip.visual)
    with tower.watch(leaf=True) as watched:
        tower.run(images)
    gone = weakref.ref(watched)
    del watched
    gc.collect()
    assert gone() is None


def test_text_prototypes_are_means_of_unit_length_and_cached(clip: FrozenCLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    templates = ("a {}", "the {} here")
    found = clip.text_prototypes(["cat", ["dog", "puppy"]], templates)
    with torch.no_grad():
        texts = clip.tokenizer(["a dog", "the dog here", "a puppy", "the puppy here"])
        wanted = clip.model.encode_text(texts, normalize=True).mean(0)
    torch.testing.assert_close(found[1], wanted / wanted.norm())
    calls: list[int] = []
    real = clip.model.encode_text
    monkeypatch.setattr(clip.model, "encode_text", lambda tokens: (calls.append(len(tokens)), real(tokens))[1])
    torch.testing.assert_close(clip.text_prototypes(["puppy", "cat"], templates)[1], found[0])
    assert calls == []
    clip.text_prototypes(["puppy", "sofa"], templates)
    assert calls == [2]


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ("a {}",), "needs a name for every class and a template"),
        (["cat", []], ("a {}",), "needs a name for every class"),
        (["cat"], (), "and a template"),
        (["cat", "dog", "cat"], ("a {}",), "every name may occur once, and 'cat' occurs more often"),
        (["cat", ["dog", "cat"]], ("a {}",), "'cat' occurs more often"),
        (["cat"], ("a photo",), r"expected \{\} for the name in every template, got 'a photo'"),
        (["cat " * 30], ("a {}",), r"the model reads 20 tokens, and 'a cat .*' has 33; shorten it"),
    ],
)
def test_bad_names(clip: FrozenCLIP, names: Any, templates: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip.text_prototypes(names, templates)


def test_bad_pictures_and_options(clip: FrozenCLIP) -> None:
    classes = clip.text_prototypes(["cat", "dog"])
    good = torch.zeros(1, 3, 32, 32)
    for call in (clip.encode, lambda images: clip.grad_cam(images, classes)):
        with pytest.raises(ValueError, match=r"multiples of the patch's 8 pixels, got \(32, 20\); prepare"):
            call(torch.zeros(1, 3, 32, 20))
        with pytest.raises(ValueError, match=r"images must have shape \(B, 3, H, W\)"):
            call(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="attentions must lie between 0 and the model's 3 blocks, got 4"):
        clip.encode(good, attentions=4)
    with pytest.raises(ValueError, match="pooling must be one of 'patches', 'token', got 'mean'"):
        clip.encode(good, pooling="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prototypes must have shape \(C, 32\), got \(2, 31\)"):
        clip.grad_cam(good, classes[:, 1:])
    with pytest.raises(ValueError, match=r"labels must have shape \(1, 2\), got \(2, 2\); one row per picture"):
        clip.grad_cam(good, classes, labels=torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"image must be uint8"):
        clip.prepare(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match=r"a picture of \(2, 40\) pixels is smaller than a patch of 8"):
        clip.prepare(torch.zeros(3, 2, 40, dtype=torch.uint8))
    assert clip.prepare(torch.zeros(3, 2, 40, dtype=torch.uint8), 8).shape == (1, 3, 8, 160)


def test_unknown_models_and_tags_list_near_ones() -> None:
    with pytest.raises(ValueError, match=r"no model 'ViT-B16' in open_clip; near ones: .*ViT-B-16"):
        FrozenCLIP.load("ViT-B16")
    with pytest.raises(ValueError, match=r"'opneai' is neither a file nor a tag of ViT-B-16; near tags: .*openai"):
        FrozenCLIP.load("ViT-B-16", "opneai")
    tower = {"timm_model_name": "resnet18", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    other = open_clip.CLIP(32, {"timm_model_pretrained": False, **tower}, TEXT)
    with pytest.raises(ValueError, match=r"ResNets and ConvNeXts are known, .*; this network is a TimmModel"):
        FrozenCLIP(other, open_clip.SimpleTokenizer(context_length=20))
    pooling = open_clip.CLIP(32, {**VISION, "attentional_pool": True, "attn_pooler_heads": 2}, TEXT)
    with pytest.raises(ValueError, match=r"a network with attentional pooling has no patch features"):
        FrozenCLIP(pooling, open_clip.SimpleTokenizer(context_length=20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    whole, half = make(), make()
    half.model.to(dtype)
    images = torch.randn(1, 3, 32, 32)
    classes = whole.text_prototypes(["cat", "dog"])
    wanted, found = whole.encode(images, attentions=1), half.encode(images.to(dtype), attentions=1)
    torch.testing.assert_close(found.pooled, wanted.pooled, rtol=0, atol=0.05)
    maps = half.grad_cam(images.to(dtype), classes)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()


def test_affinity_by_hand() -> None:
    attention = torch.rand(2, 6, 6, dtype=torch.float64) + 0.1
    wanted = []
    for matrix in attention.numpy():
        for _ in range(3):
            matrix = matrix / matrix.sum(0, keepdims=True)
            matrix = matrix / matrix.sum(1, keepdims=True)
        matrix = (matrix + matrix.T) / 2
        wanted.append(matrix @ matrix)
    found = attention_affinity(attention)
    torch.testing.assert_close(found, torch.from_numpy(np.stack(wanted)))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 6, dtype=torch.float64), rtol=0, atol=0.05)
    maps = torch.zeros(2, 1, 2, 3, dtype=torch.float64)
    maps[:, 0, 0, 0], maps[:, 0, 1, 1], maps[:, 0, 0, 2] = 1.0, 0.8, 0.1
    refined = refine_by_affinity(maps, found)
    box = maps.clone()
    box[:, 0, :, 2] = 0  # the box around the two strong pixels, which touch by their corners
    torch.testing.assert_close(refined.flatten(1), torch.einsum("bij,bj->bi", found, box.flatten(1)))
    assert (refine_by_affinity(torch.zeros_like(maps), found) == 0).all()
    with pytest.raises(ValueError, match=r"affinity must have shape \(2, 6, 6\), got \(2, 5, 5\); one row per pixel"):
        refine_by_affinity(maps, found[:, 1:, 1:])
