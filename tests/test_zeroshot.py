"""Zero-shot masks against loops, with networks that are small or made up."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("timm", reason="the extra timm is not installed")

from protoseg.models.pgseg.grouping import ImageConfig
from protoseg.models.pgseg.network import PGSeg, PGSegConfig
from protoseg.models.pgseg.zeroshot import _windows, class_embeddings, group_maps, segment

IMAGE = ImageConfig(image_size=32, patch_size=8, dim=32, heads=2, depths=(1, 1, 0), groups=(6, 3), drop_path=0.0)
CONFIG = PGSegConfig(
    image=IMAGE, text="words", text_width=16, embed_dim=16, hidden=0, vocabulary=("cat", "dog", "tree"), test_side=32
)


@pytest.fixture
def model() -> PGSeg:
    torch.manual_seed(0)
    return PGSeg(CONFIG).eval()


def picture(height: int = 32, width: int = 32) -> Tensor:
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@torch.no_grad()
def test_group_maps_follow_every_patch(model: PGSeg) -> None:
    _, encoded = model.encode_image(torch.randn(2, 3, 32, 40))
    first, second = (stage.grouping.soft for stage in encoded.stages)
    maps = group_maps(encoded)
    assert maps.shape == (2, 3, 4, 5)
    for image in range(2):
        for group in range(3):
            for patch in range(20):
                want = sum(float(second[image, group, k] * first[image, k, patch]) for k in range(6))
                assert float(maps[image, group, patch // 5, patch % 5]) == pytest.approx(want, abs=1e-6)
    torch.testing.assert_close(group_maps(encoded, (9, 7)).sum(1), torch.ones(2, 9, 7))


def test_embeddings_are_means_over_names_and_templates(model: PGSeg) -> None:
    found = class_embeddings(model, ["cat", ["dog", "tree"]], ["a {}", "one {} and a cat"])

    def embed(text: str) -> Tensor:
        vector = model.encode_text(model.text.tokenize([text]))[0][0]
        return vector / vector.norm()

    want = sum(embed(text) for text in ("a dog", "one dog and a cat", "a tree", "one tree and a cat"))
    assert isinstance(want, Tensor)
    torch.testing.assert_close(found[1], want / want.norm())
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    with pytest.raises(ValueError, match="needs a class and a template, got 0 and 1"):
        class_embeddings(model, [], ["a {}"])


def expected(model: PGSeg, image: Tensor, names: list[str], top: int, threshold: float, score: str) -> Tensor:
    """The published arithmetic, one pixel at a time, for a picture of one window of its own size."""
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pooled, encoded = model.encode_image(((image / 255 - mean) / std)[None])
    texts = class_embeddings(model, names)
    scale = float(model.log_scale.exp())
    whole = torch.nn.functional.cosine_similarity(pooled, texts)
    kept = whole.argsort(descending=True)[:top].tolist()
    values = []
    for group in model.image_projector(encoded.groups)[0]:
        cosine = torch.nn.functional.cosine_similarity(group[None], texts)
        raised = (scale * cosine).exp()
        some = torch.stack([raised[c] if c in kept else torch.zeros(()) for c in range(len(names))])
        values.append((1 + cosine) / 2 if score == "cosine" else raised / raised.sum() * some / some.sum())
    owner = group_maps(encoded, image.shape[-2:])[0].argmax(0)
    best = max(float(values[int(group)].max()) for group in owner.unique())
    mask = torch.zeros(image.shape[-2:], dtype=torch.uint8)
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            value = values[int(owner[y, x])]
            if float(value.max()) >= min(threshold, best) - 1e-6:
                mask[y, x] = int(value.argmax()) + 1
    return mask


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("score", ["softmax", "cosine"])
def test_equals_a_loop(model: PGSeg, score: Any, threshold: float) -> None:
    names = ["cat", "dog", "tree"]
    with torch.no_grad():
        want = expected(model, picture(), names, 2, threshold, score)
    found = model.segment(picture(), names, score=score, background_threshold=threshold, top_classes=2)
    assert torch.equal(found.mask, want)
    assert found.scores.shape == (3, 32, 32)
    assert found.mask.any(), "never background alone: the best of the picture always stays"


def test_names_of_background_win_pixels_for_it(model: PGSeg) -> None:
    names = ["cat", "dog", "tree"]
    everything = model.segment(picture(), names, background_threshold=0.0)
    split = model.segment(picture(), names[:2], background_names=names[2:], background_threshold=0.0)
    assert torch.equal(split.mask, torch.where(everything.mask == 3, 0, everything.mask))
    assert split.scores.shape[0] == 2


@pytest.mark.parametrize("size", [(32, 32), (32, 75), (50, 20), (400, 33)])
def test_windows_cover_the_picture_and_stay_in_it(size: tuple[int, int]) -> None:
    seen = torch.zeros(size)
    for rows, columns in _windows(size, 32, 16):
        assert seen[rows, columns].shape == (min(32, size[0]), min(32, size[1]))
        seen[rows, columns] += 1
    assert seen.min() >= 1


def test_wide_pictures_keep_their_size(model: PGSeg) -> None:
    found = model.segment(picture(50, 111), ["cat", "dog"])
    assert found.mask.shape == (50, 111)
    assert found.scores.shape == (2, 50, 111)
    assert 0 <= found.scores.min() <= found.scores.max() <= 1
    assert dataclasses.asdict(model.config)["test_side"] == 32
    assert model.segment(picture(50, 111), ["cat"], short_side=48, stride=8).mask.shape == (50, 111)


def test_bad_input(model: PGSeg) -> None:
    with pytest.raises(ValueError, match=r"segment: image must have shape \(3, H, W\)"):
        segment(model, picture()[None], ["cat"])
    with pytest.raises(TypeError, match=r"segment: image must be uint8 in 0..255, got torch\.float32"):
        segment(model, picture().float(), ["cat"])
    with pytest.raises(ValueError, match="background_threshold must lie between 0 and 1"):
        segment(model, picture(), ["cat"], background_threshold=95)
    with pytest.raises(ValueError, match="score must be one of 'softmax', 'cosine'"):
        segment(model, picture(), ["cat"], score="dot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a class and a template, got 0"):
        segment(model, picture(), [])
