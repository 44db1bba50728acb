"""The trainer with the networks of AMN and MCTformer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from protoseg.data import Scenes
from protoseg.models.backbones import TimmBackbone
from protoseg.models.cam import CAMNetwork
from protoseg.recipes import cpal_options, cpal_stages
from tests.trainer import assert_equal, assert_maps, checkpoint, findings, main, masks, read, run

pytestmark = pytest.mark.slow

AMN = ["--head", "amn", "--start", "0", "--first-epochs", "2"]


@pytest.fixture(scope="module")
def amn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("amn")
    run(output, *AMN)
    return output


def test_amn_learns_from_masks_that_it_makes_itself(amn: Path) -> None:
    metrics = read(amn)
    assert metrics["head"] == "amn"
    assert_maps(metrics["maps"], ("background", *Scenes(1).classes))
    first = read(amn / "first")
    assert (first["head"], first["method"], first["pseudo_masks"]["train"]["map"]) == ("cam", "none", "cam")
    assert len(masks(amn / "first" / "pseudo_masks")) == len(masks(amn / "pseudo_masks")) == 24
    history = read(amn / "checkpoint", "progress.json")["stages"]["classify"]["history"]
    assert set(history[0]) == {"activation", "self"}
    assert history[-1]["activation"] < history[0]["activation"]
    assert checkpoint(amn)["bank"]["memory.stored"].sum() > 0


def test_amn_takes_given_masks_and_makes_the_same_of_them(amn: Path, tmp_path: Path) -> None:
    first = amn / "first"
    given = ("--masks", str(first / "pseudo_masks"), "--weights", str(first / "checkpoint" / "classify.pt"))
    metrics = run(tmp_path, *AMN, *given)
    assert not (tmp_path / "first").exists()
    assert_equal(findings(metrics), findings(read(amn)))


def test_weights_are_where_training_begins(amn: Path, tmp_path: Path) -> None:
    path = amn / "first" / "checkpoint" / "classify.pt"
    run(tmp_path, "--weights", str(path), "--lr", "0", "--epochs", "1", "--stages", "classify")
    before, after = checkpoint(amn / "first")["model"], checkpoint(tmp_path)["model"]
    learnt = [
        key for key in before if key.startswith("backbone.") and "running" not in key and "num_batches" not in key
    ]
    assert len(learnt) > 10
    for key in learnt:
        assert_equal(after[key], before[key])
    with pytest.raises(SystemExit, match=r"--weights: .* tensors of small:12 do not fit: layers.0.weight must"):
        run(tmp_path / "wide", "--backbone", "small:12", "--weights", str(path))


def test_a_map_that_needs_no_memory_is_the_same_without(amn: Path, tmp_path: Path) -> None:
    alone = read(amn / "first")
    assert set(alone["maps"]["eval"]) == {"cam"}
    full = run(tmp_path, "--method", "none", "--stages", "classify", "seeds")
    for split in ("train", "eval"):
        assert_equal(full["maps"][split]["cam"], alone["maps"][split]["cam"])


def test_a_stopped_run_of_amn_goes_on(amn: Path, tmp_path: Path) -> None:
    run(tmp_path, *AMN, "--stages", "classify")
    (tmp_path / "checkpoint" / "progress.json").write_text('{"stages": {}}')  # stopped behind the last epoch
    resumed = run(tmp_path, *AMN, "--resume")
    assert_equal(findings(resumed), findings(read(amn)))


@pytest.mark.parametrize("fusion", ["v2", "plus"])
def test_mct(tmp_path: Path, fusion: str) -> None:
    metrics = run(tmp_path, "--head", "mct", "--fusion", fusion, "--start", "0")
    assert metrics["head"] == "mct"
    assert_maps(metrics["maps"], ("background", *Scenes(1).classes))
    history = read(tmp_path / "checkpoint", "progress.json")["stages"]["classify"]["history"]
    assert set(history[0]) == {"classify", "tokens", "self"} | ({"contrast"} if fusion == "plus" else set())
    assert set(metrics["segmentation"]["eval"]) == {"miou", "per_class", "all_background"}


TIMM = ["--backbone", "mobilenetv3_small_050", "--segmentation", "deeplabv3plus:backbone", "--bank-features"]


# Networks that hardly learnt have a CAM that shows nothing, of which nothing is stored.
@pytest.mark.filterwarnings("ignore:.*the bank is empty", "ignore:.*nothing was stored")
@pytest.mark.parametrize("flags", [(), ("--head", "mct", "--start", "0"), AMN], ids=["cam", "mct", "amn"])
def test_backbones_of_timm_in_every_head(tmp_path: Path, flags: Sequence[str]) -> None:
    """With a file of weights, the map before the last, a rate of the head's own, and a segmentation network on it."""
    torch.manual_seed(0)
    weights = TimmBackbone("mobilenetv3_small_050").state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    own = ["--crop", "64", "--size", "64", "--head-lr", "10", "--weights", str(tmp_path / "weights.pt")]
    metrics = run(tmp_path / "run", *TIMM, "penultimate", *own, *flags)
    assert_maps(metrics["maps"], ("background", *Scenes(1).classes))
    assert checkpoint(tmp_path / "run")["bank"]["memory.instances"].shape[-1] == 48
    trained = checkpoint(tmp_path / "run", "segment")["model"]
    assert {key for key in trained if key.startswith("encoder.")} == {
        "encoder.model." + key.removeprefix("network.") for key in weights
    }


def test_pictures_are_given_as_the_backbone_wants_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also to the segmentation network on it; a gray of one half becomes 0 by Lite0's mean."""
    gray = torch.full((3, 40, 60), 128, dtype=torch.uint8)
    backbone = TimmBackbone("tf_efficientnet_lite0")
    network = CAMNetwork(backbone, 8).eval()
    seen: list[Tensor] = []
    backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    real = backbone.last_two
    monkeypatch.setattr(backbone, "last_two", lambda images: (seen.append(images), real(images))[1])
    args = cpal_options.parse(["--size", "50", "--scales", "1", "1.5"])
    sample = Scenes(1)[0]._replace(image=gray)
    cpal_stages.infer(network, sample, args, SimpleNamespace(device=torch.device("cpu")))  # type: ignore[arg-type]
    assert {tuple(each.shape[-2:]) for each in seen} == {(48, 64), (64, 96)}
    assert max(float(each.abs().max()) for each in seen) < 0.01


def test_what_does_not_fit_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--masks: only --head amn learns from masks"):
        main(["--output", str(tmp_path), "--masks", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"--masks: no such folder: .*nothing"):
        main(["--output", str(tmp_path), "--head", "amn", "--masks", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="--first-epochs: expected at least 1, got 0"):
        main(["--output", str(tmp_path), "--head", "amn", "--first-epochs", "0"])
    with pytest.raises(SystemExit, match=r"--weights: no such file: .*nothing"):
        main(["--output", str(tmp_path), "--weights", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="--seed-map: pacam is not among --maps cam"):
        main(["--output", str(tmp_path), "--maps", "cam"])
    with pytest.raises(SystemExit, match="--backbone: "):
        main(["--output", str(tmp_path), "--head", "mct", "--backbone", "small:wide"])
    flags = ["--output", str(tmp_path), "--head", "mct", "--segmentation", "unet:resnet18"]
    with pytest.raises(SystemExit, match="--backbone: MCTNetwork: bank_features must be 'last' for the transformer"):
        main([*flags, "--backbone", "vit_tiny_patch16_224", "--bank-features", "penultimate"])
    with pytest.raises(
        SystemExit, match="--weights: package:efficientnet-lite0 holds the weights of tf_efficientnet_l"
    ):
        main([*flags, "--backbone", "resnet10t", "--weights", "package:efficientnet-lite0"])
    with pytest.raises(
        SystemExit, match=r"--segmentation: .*'unet:backbone' needs a backbone of timm, .* got NoneType"
    ):
        main([*flags[:4], "--backbone", "vit_tiny_patch16_224", "--segmentation", "unet:backbone"])
    assert not list(tmp_path.iterdir())
