"""``model/`` of a run: saved, pushed and loaded as others do it, without a network connection."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from protoseg.data import Scenes

pytest.importorskip("huggingface_hub", reason="the extra recipes is not installed")

from huggingface_hub import hub_mixin

from protoseg.models.hub import PrototypeModel
from protoseg.recipes import cpal_options, pseudo_masks
from protoseg.recipes.pictures import scaled_image
from tests.trainer import assert_equal, checkpoint, read, run


def trained() -> PrototypeModel:
    """Of random weights, with a bank that holds something."""
    torch.manual_seed(0)
    model = PrototypeModel(["cat", "traffic light"], "small:4", size=64, threshold=0.37, prior=0.1)
    model.bank.train()
    for _ in range(3):
        out = model.network(torch.rand(4, 3, 64, 64))
        model.bank(out.features, out.cam, torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]]))
    return model.eval()


def test_saved_and_loaded_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    again = PrototypeModel.from_pretrained(tmp_path)
    assert_equal(dict(again.state_dict()), dict(model.state_dict()))
    images, labels = torch.rand(2, 3, 64, 48), torch.tensor([[1, 0], [1, 1]])
    assert_equal(tuple(again(images, labels)), tuple(model(images, labels)))
    assert_equal(tuple(again(images)), tuple(model(images)))
    assert again.classes == ("cat", "traffic light")
    assert (again.threshold, again.size, again.mean, again.std) == (0.37, 64, model.mean, model.std)


def test_pushed_and_loaded_it_is_the_same_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for the service."""

    class Api:
        def __init__(self, token: str | None = None) -> None:
            pass

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Address", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
            shutil.copytree(folder_path, tmp_path / repo_id)
            return repo_id

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    model = trained()
    model.push_to_hub("me/masks")
    again = PrototypeModel.from_pretrained(tmp_path / "me" / "masks")
    assert_equal(dict(again.state_dict()), dict(model.state_dict()))
    assert_equal(again.classes, model.classes)
    card = (tmp_path / "me" / "masks" / "README.md").read_text(encoding="utf-8")
    assert "library_name: protoseg" in card
    assert "PrototypeModel.from_pretrained" in card


@pytest.mark.parametrize("backbone", ["resnet18", "tf_efficientnet_lite0"])
def test_networks_of_timm(backbone: str, tmp_path: Path) -> None:
    """Also those whose maps lie with channels last."""
    pytest.importorskip("timm", reason="the extra timm is not installed")
    model = PrototypeModel(["cat"], backbone, size=64, bank_features="penultimate").eval()
    model.save_pretrained(tmp_path)
    again = PrototypeModel.from_pretrained(tmp_path)
    assert_equal(dict(again.state_dict()), dict(model.state_dict()))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trained().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    removed = state.pop("network.classifier.weight")
    save_file(state, path)
    with pytest.raises(RuntimeError, match=r"network\.classifier\.weight"):
        PrototypeModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="files of pickles are not read"):
        PrototypeModel._load_as_pickle(removed)


def test_a_run_leaves_a_model_that_makes_its_maps(finished: Path) -> None:
    model = PrototypeModel.from_pretrained(finished / "model")
    config = json.loads((finished / "model" / "config.json").read_text())
    scenes = Scenes(24, seed=0, size=48)
    assert tuple(config["classes"]) == scenes.classes
    assert model.threshold == read(finished)["pseudo_masks"]["train"]["threshold"]
    assert_equal(dict(model.network.state_dict()), dict(checkpoint(finished)["model"]))

    args = cpal_options.parse(["--output", str(finished)])
    nothing, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for sample in map(scenes.__getitem__, range(4)):
        colors = scaled_image(sample.image, model.size, model.multiple, nothing, one)
        maps = model(colors, sample.labels[None]).maps[0][sample.labels.bool()]
        assert torch.equal(maps.half(), pseudo_masks.read_seeds(args, sample.id)["pacam"])
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_run_with_another_map_keeps_that(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    sample = Scenes(24, seed=0, size=48)[3]
    nothing, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    for name in ("cam", "instance"):
        run(tmp_path, "--stages", "refine", "--seed-map", name, "--refine", "none", "--overwrite")
        model = PrototypeModel.from_pretrained(tmp_path / "model")
        assert model.map == name
        args = cpal_options.parse(["--output", str(tmp_path)])
        colors = scaled_image(sample.image, model.size, model.multiple, nothing, one)
        maps = model(colors, sample.labels[None]).maps[0][sample.labels.bool()]
        torch.testing.assert_close(maps, pseudo_masks.read_seeds(args, sample.id)[name].float(), atol=1e-3, rtol=0)


def test_protoseg_itself_does_not_need_it() -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import protoseg; protoseg.ContextPrototypeBank; protoseg.attach\n"
        "import protoseg.models.cam\n"
        "try:\n    import protoseg.models.hub\n"
        "except ImportError as error:\n    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told == 'protoseg.models.hub needs huggingface_hub; run pip install "protoseg[recipes]"\n'
