"""Inputs of CLIP, PGSeg and transformers that were once taken silently, or refused in riddles."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("open_clip", reason="the extra clip is not installed")

import open_clip

from protoseg.clip import BACKGROUND, FrozenCLIP, background_names, readable
from protoseg.models.checkpoints import read_checkpoint, read_torchscript
from protoseg.models.mct import TimmTransformer
from protoseg.models.pgseg import PGSeg, PGSegConfig, segment
from protoseg.models.pgseg.grouping import ImageConfig
from protoseg.models.weights import read_file

CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A small model that open_clip knows by name."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny-cases.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)
    yield "tiny-cases"
    (folder / "tiny-cases.json").unlink()


@pytest.fixture(scope="module")
def model(tiny: str) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = open_clip.create_model(tiny)
    return made


def activations(clip: FrozenCLIP) -> set[str]:
    """The kinds of activation in the towers."""
    names = {type(module).__name__ for module in clip.model.modules()}
    return names & {"GELU", "QuickGELU"}


# Row 60: the activation that the weights were trained with.


class Holder(nn.Module):
    """As OpenAI's archives: tensors by name, numbers beside them, and code."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, child in model.named_children():
            setattr(self, name, Part(child))
        for name, value in model.named_parameters(recurse=False):
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Part(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, Part(child))
        for name, value in module.named_parameters(recurse=False):
            self.register_parameter(name, value)
        for name, buffer in module.named_buffers(recurse=False):
            if name in module.state_dict():
                self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture
def archive(model: nn.Module, tmp_path: Path) -> Path:
    """Weights in a TorchScript archive."""
    torch.jit.script(Holder(copy.deepcopy(model)).half()).save(tmp_path / "ViT.pt")
    return tmp_path / "ViT.pt"


@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated")
def test_openais_archives_are_read_with_their_activation_and_without_their_code(
    tiny: str, model: nn.Module, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(torch.jit, "load", lambda *args, **options: ran.append("loaded"))
    monkeypatch.setattr(torch._C, "import_ir_module", lambda *args, **options: ran.append("imported"))
    state = read_torchscript(archive)
    wanted = model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], value.half()) for name, value in wanted.items())

    clip = FrozenCLIP.load(tiny, str(archive))
    assert activations(clip) == {"QuickGELU"}
    assert torch.equal(clip.visual.conv1.weight, wanted["visual.conv1.weight"].half().float())
    assert not ran


def test_a_file_does_not_say_its_activation_and_that_is_said(tiny: str, model: nn.Module, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=r"w\.pt does not say whether .* QuickGELU.*say quick_gelu=True or False"):
        assert activations(FrozenCLIP.load(tiny, tmp_path / "w.pt")) == {"GELU"}
    assert activations(FrozenCLIP.load(tiny, tmp_path / "w.pt", quick_gelu=True)) == {"QuickGELU"}
    assert activations(FrozenCLIP.load(tiny, tmp_path / "w.pt", quick_gelu=False)) == {"GELU"}

    # OpenAI's state dict carries three numbers that no other has.
    theirs = {
        **model.state_dict(),
        **{key: torch.tensor(1) for key in ("input_resolution", "context_length", "vocab_size")},
    }
    torch.save(theirs, tmp_path / "o.pt")
    assert activations(FrozenCLIP.load(tiny, tmp_path / "o.pt")) == {"QuickGELU"}


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion2b_s34b_b88k", False)])
def test_a_tag_says_its_activation(tag: str, quick: bool, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def create(name: str, pretrained: str, **options: Any) -> nn.Module:
        asked.update(options, name=name, pretrained=pretrained)
        return model

    monkeypatch.setattr(open_clip, "create_model", create)
    FrozenCLIP.load("ViT-B-16", tag)
    assert asked["pretrained"] == tag
    assert asked["force_quick_gelu"] is quick


# Row 61: names with a scheme.


def test_a_folder_with_its_own_configuration(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    clip = FrozenCLIP.load(f"local-dir:{tmp_path}")
    assert torch.equal(clip.visual.conv1.weight, model.state_dict()["visual.conv1.weight"])
    assert clip.text_prototypes(["cat"]).shape == (1, 32)
    with pytest.raises(ValueError, match="brings its own weights; leave out pretrained, got 'openai'"):
        FrozenCLIP.load(f"local-dir:{tmp_path}", "openai")


def test_hub_names_are_passed_on(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def create(name: str, **options: Any) -> nn.Module:
        asked.append(name)
        return model

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr(open_clip, "get_tokenizer", asked.append)
    FrozenCLIP.load("hf-hub:somebody/something")
    assert asked == ["hf-hub:somebody/something"] * 2


# Rows 62 and 63: names.


@pytest.mark.parametrize(("names", "templates"), [("dog", ["a {}"]), (["dog"], "a {}")])
def test_one_text_is_no_list_of_texts(names: Any, templates: Any, model: nn.Module) -> None:
    clip = FrozenCLIP(model, open_clip.SimpleTokenizer(context_length=20))
    with pytest.raises(TypeError, match=r"must be a sequence of texts, got '(dog|a \{\})'; write \["):
        clip.text_prototypes(names, templates)


def test_a_class_is_no_background_prompt() -> None:
    kept, left_out = background_names(["Grass", ["car", "water"], "traffic_light"], [*BACKGROUND, "traffic light"])
    assert left_out == ["grass", "water", "traffic light"]
    assert [*sorted(kept), *left_out] == [*sorted({*BACKGROUND} - {*left_out}), *left_out]
    assert readable("tvmonitor") == "tv monitor"


# Row 64: texts that were encoded once.


def test_texts_are_never_those_of_other_weights(model: nn.Module) -> None:
    clip = FrozenCLIP(copy.deepcopy(model), open_clip.SimpleTokenizer(context_length=20))
    fresh = FrozenCLIP(copy.deepcopy(model), clip.tokenizer)

    def right() -> Tensor:
        fresh._texts.clear()
        fresh.model.load_state_dict(clip.model.state_dict())
        found = clip.text_prototypes(["cat", "dog"])
        fresh.to(found.dtype).to(next(clip.model.parameters()).dtype)
        torch.testing.assert_close(found, fresh.text_prototypes(["cat", "dog"]), rtol=0, atol=0)
        return found

    first = right()
    other = {name: value + 0.1 * torch.randn_like(value) for name, value in clip.model.state_dict().items()}
    clip.model.load_state_dict(other)
    second = right()
    assert not torch.equal(first, second)

    clip.model.load_state_dict(dict(model.state_dict()), assign=True)
    assert torch.equal(right(), first)
    with torch.no_grad():
        clip.model.text_projection.add_(0.1)
    assert not torch.equal(right(), first)
    before = right()
    clip.to(torch.bfloat16)
    assert not torch.equal(clip.text_prototypes(["cat", "dog"]), before)


def test_texts_are_kept_while_nothing_changes_and_never_copied(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = FrozenCLIP(copy.deepcopy(model), open_clip.SimpleTokenizer(context_length=20))
    calls: list[int] = []
    encode = clip.model.encode_text
    monkeypatch.setattr(clip.model, "encode_text", lambda tokens: calls.append(len(tokens)) or encode(tokens))
    clip.text_prototypes(["cat", "dog"])
    clip.encode(torch.zeros(1, 3, 32, 32))
    clip.text_prototypes(["dog", "cow"])
    assert calls == [2, 1]
    assert not copy.copy(clip).__getstate__()["_texts"]


# Rows 65 and 66: files of others; nothing in them is run.


class Evil:
    """Makes a folder when it is unpickled, and when its state is set."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Setter:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __setstate__(self, state: Any) -> None:
        Path(state["path"]).mkdir()


def readers() -> dict[str, Any]:
    return {
        "read_checkpoint": read_checkpoint,
        "read_file": read_file,
        "PGSeg": PGSeg.from_published,
        "FrozenCLIP": lambda path: FrozenCLIP.load("tiny-cases", path, quick_gelu=False),
        "TimmTransformer": lambda path: TimmTransformer("test_vit", weights=path),
    }


@pytest.mark.parametrize("reader", sorted(readers()))
def test_foreign_classes_and_states_are_not_run(reader: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    content = {"args": Setter(trap), "evil": Evil(trap), "options": types.SimpleNamespace(a=1), "w": torch.ones(2)}
    torch.save(content, tmp_path / "evil.pt")
    with contextlib.suppress(ValueError):  # most miss their tensors; what counts is what does not happen
        readers()[reader](tmp_path / "evil.pt")
    assert not trap.exists()
    # The trap does work.
    with pytest.raises(FileExistsError):
        pickle.loads(pickle.dumps([Evil(trap), Setter(trap)]))


@pytest.mark.filterwarnings("ignore:`torch.jit.*deprecated")
@pytest.mark.parametrize("reader", ["read_checkpoint", "read_file", "PGSeg", "TimmTransformer"])
def test_scripts_are_refused_where_only_weights_are_read(reader: str, archive: Path) -> None:
    with pytest.raises(ValueError, match=r"ViT\.pt: a TorchScript archive, which holds code; expected the weights"):
        readers()[reader](archive)


@pytest.mark.parametrize("form", ["module", "state_dict", "model", "namespace"])
def test_wrapped_weights_are_read(form: str, tiny: str, model: nn.Module, tmp_path: Path) -> None:
    state = model.state_dict()
    content = {
        "module": {f"module.{name}": value for name, value in state.items()},
        "state_dict": {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}},
        "model": {"model": state, "optimizer": {}},
        "namespace": {"state_dict": state, "args": types.SimpleNamespace(lr=1)},
    }[form]
    torch.save(content, tmp_path / "w.pt")
    clip = FrozenCLIP.load(tiny, tmp_path / "w.pt", quick_gelu=False)
    assert all(torch.equal(value, state[name]) for name, value in clip.model.state_dict().items())


def test_weights_of_another_model_are_listed(tiny: str, tmp_path: Path) -> None:
    torch.save({"layer1.weight": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt are not those of tiny-cases; found are layer1\.weight"):
        FrozenCLIP.load(tiny, tmp_path / "w.pt", quick_gelu=False)
    with pytest.raises(ValueError, match=r"no tensor 'img_encoder\.pos_embed' .* It holds layer1\.weight"):
        PGSeg.from_published(tmp_path / "w.pt")


# Rows 67, 68 and 70: PGSeg.


@pytest.fixture
def pgseg() -> PGSeg:
    torch.manual_seed(0)
    image = ImageConfig(image_size=32, patch_size=8, dim=16, heads=2, depths=(1, 1, 0), groups=(4, 2))
    return PGSeg(PGSegConfig(image=image, text="words", vocabulary=("cat", "dog"), text_width=16, embed_dim=8))


def test_words_that_were_never_read_are_named(pgseg: PGSeg) -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="'zebra', 'cat car': the network has never read 'zebra', 'car'"):
        segment(pgseg.eval(), image, ["cat", "zebra", ["dog", "cat car"]])
    with pytest.raises(TypeError, match="names must be sequences of texts, got 'dog'"):
        segment(pgseg, image, "dog")


@pytest.mark.parametrize("mode", [True, False])
def test_masks_leave_the_network_as_it_was(mode: bool, pgseg: PGSeg) -> None:
    pgseg.train(mode)
    pgseg.text.train(not mode)
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    before = copy.deepcopy(pgseg.state_dict())
    modes = [part.training for part in pgseg.modules()]
    first, second = segment(pgseg, image, ["cat", "dog"]), segment(pgseg, image, ["cat", "dog"])
    assert torch.equal(first.scores, second.scores)
    assert all(torch.equal(value, before[name]) for name, value in pgseg.state_dict().items())
    assert [part.training for part in pgseg.modules()] == modes


def test_windows_are_of_whole_patches(pgseg: PGSeg) -> None:
    image = torch.randint(0, 256, (3, 40, 90), dtype=torch.uint8)
    found = segment(pgseg.eval(), image, ["cat", "dog"], short_side=30)
    assert torch.equal(found.scores, segment(pgseg, image, ["cat", "dog"], short_side=32).scores)


# Rows 69 and 70: timm's transformers.


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("vit_base_patch16_clip_224", "it has a norm in front of its blocks"),
        ("eva02_tiny_patch14_224", "it is a Eva"),
        ("beit_base_patch16_224", "it is a Beit"),
        ("vit_small_patch14_reg4_dinov2", "its patches rely on registers"),
        ("vit_relpos_small_patch16_224", "it is a VisionTransformerRelPos"),
    ],
)
def test_transformers_that_would_be_wrong_are_refused(name: str, problem: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=f"{name} is no plain vision transformer: {problem}"):
        TimmTransformer(name)


@pytest.mark.parametrize("name", ["test_vit", "deit3_small_patch16_224", "vit_small_patch14_dinov2"])
def test_patches_are_those_that_timm_gives_its_blocks(name: str) -> None:
    import timm

    side = 42 if "patch14" in name else 48
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=0, img_size=side)
    torch.manual_seed(0)
    ours = TimmTransformer(name)
    ours.project.load_state_dict(theirs.patch_embed.proj.state_dict())
    images = torch.randn(1, 3, side, side)
    count = theirs.patch_embed.num_patches
    with torch.no_grad():
        theirs.pos_embed.normal_()
        ours.position = nn.Parameter(theirs.pos_embed[:, -count:].clone())
        ours.grid = theirs.patch_embed.grid_size
        wanted = theirs._pos_embed(theirs.patch_embed(images))[:, -count:]
        torch.testing.assert_close(ours(images).flatten(2).transpose(1, 2), wanted)


def test_a_strip_that_fills_no_patch_is_refused() -> None:
    network = TimmTransformer("test_vit")
    side = network.multiple * 3
    assert network(torch.zeros(1, 3, side, side)).shape[-2:] == (3, 3)
    with pytest.raises(
        ValueError, match=rf"multiples of {network.multiple}, got \({side}, {side + 5}\); resize or pad"
    ):
        network(torch.zeros(1, 3, side, side + 5))


def test_clip_sees_whole_patches_and_refuses_others(model: nn.Module) -> None:
    clip = FrozenCLIP(model, open_clip.SimpleTokenizer(context_length=20))
    image = torch.randint(0, 256, (3, 45, 67), dtype=torch.uint8)
    assert clip.prepare(image).shape == (1, 3, 48, 64)
    with pytest.raises(ValueError, match=r"multiples of the patch's 8 pixels, got \(45, 67\)"):
        clip.encode(image[None].float())
