"""The trainer end to end: what it finds, writes and refuses."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from protoseg.data import Scenes, voc_palette
from protoseg.models.backbones import SmallResNet
from protoseg.models.cam import CAMNetwork
from protoseg.recipes import cpal_options
from protoseg.recipes.engine import learning_rate, parameter_groups
from protoseg.recipes.files import keywords, write_json
from protoseg.recipes.pictures import Crops, Pictures, Shuffle
from protoseg.utils.files import replacing
from tests.trainer import (
    SCENES,
    assert_equal,
    assert_maps,
    checkpoint,
    findings,
    main,
    masks,
    miou,
    pseudo_masks,
    read,
    run,
)


def test_metrics_have_the_documented_form(finished: Path) -> None:
    metrics = read(finished)
    assert set(metrics) == {
        *("method", "seed", "seconds", "peak_memory_mb", "versions"),
        *("head", "counted", "maps", "trivial", "pseudo_masks", "segmentation", "broken", "survey"),
    }
    assert (metrics["method"], metrics["seed"]) == ("cpal", 0)
    assert 0 < metrics["seconds"] < 600
    assert metrics["peak_memory_mb"] > 50
    assert {"python", "protoseg", "torch"} <= set(metrics["versions"])
    names = ("background", *Scenes(1).classes)
    assert_maps(metrics["maps"], names)
    assert set(metrics["pseudo_masks"]) == {"train"}
    pseudo = metrics["pseudo_masks"]["train"]
    assert set(pseudo) == {
        *("miou", "per_class", "threshold", "map", "pictures", "shown"),
        *("count", "empty", "untagged", "empties", "foreground", "classes"),
    }
    assert metrics["counted"] == {"train": {"pictures": 24, "scored": 24}, "eval": {"pictures": 6, "scored": 6}}
    for split in ("train", "eval"):
        assert set(metrics["trivial"][split]) == {"background", "regions", "tag", "disc", "disc radius"}
    assert pseudo["map"] == "pacam"
    assert pseudo["threshold"] == metrics["maps"]["train"]["pacam"]["threshold_mask_free"]
    assert set(metrics["segmentation"]) == {"eval"}
    assert set(metrics["segmentation"]["eval"]) == {"miou", "per_class", "all_background"}
    assert tuple(metrics["segmentation"]["eval"]["per_class"]) == names
    assert metrics["broken"] == {"train": {}, "eval": {}}


def test_main_returns_what_it_writes(tmp_path: Path) -> None:
    returned = main([*SCENES, "--output", str(tmp_path), "--stages", "classify"])
    assert returned == read(tmp_path)


def test_pseudo_masks_are_there_and_score_what_the_metrics_say(finished: Path) -> None:
    scenes = Scenes(24, seed=0, size=48)
    found = masks(finished / "pseudo_masks")
    assert list(found) == scenes.ids
    for name in found:
        with Image.open(finished / "pseudo_masks" / f"{name}.png") as picture:
            assert picture.mode == "P"
            assert picture.getpalette() == voc_palette()
    truth = {sample.id: sample.mask.numpy() for sample in map(scenes.__getitem__, range(24)) if sample.mask is not None}
    assert set(truth) == set(found)
    pseudo = read(finished)["pseudo_masks"]["train"]
    assert pseudo["miou"] == pytest.approx(miou(list(found.values()), [truth[name] for name in found], 8))
    assert list(pseudo["pictures"]) == scenes.ids
    assert pseudo["empty"] == sum(not mask.any() for mask in found.values())
    for name, score in pseudo["pictures"].items():
        assert score == pytest.approx(miou([found[name]], [truth[name]], 8))
    for sample in map(scenes.__getitem__, range(24)):  # only classes of the tags
        allowed = {0, *(sample.labels.nonzero().flatten() + 1).tolist()}
        assert set(np.unique(found[sample.id]).tolist()) <= allowed


def test_the_floor_is_background_everywhere(finished: Path) -> None:
    scenes = Scenes(6, seed=1, size=48)
    truth = [sample.mask.numpy() for sample in map(scenes.__getitem__, range(6)) if sample.mask is not None]
    floor = miou([np.zeros_like(each) for each in truth], truth, 8)
    assert read(finished)["segmentation"]["eval"]["all_background"] == pytest.approx(floor)


def test_the_report_and_the_settings_are_there(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.count('<figure class="large') >= 12
    assert page.count("<img") >= 12 * 6
    assert "protoseg train cpal --device cpu" in page
    assert all(f"{name} loss" in page for name in ("classify", "self", "segment"))
    config = read(finished, "config.json")
    assert config["backbone"] == "small:8"
    assert config["lr"] == cpal_options.PRESETS["scenes"]["lr"]
    assert not [path for path in finished.rglob(".*") if path.is_file()]  # no half-written file is left


def test_equal_runs_find_the_same(finished: Path, tmp_path: Path) -> None:
    assert findings(run(tmp_path)) == findings(read(finished))
    for name in ("classify", "segment"):
        assert_equal(checkpoint(tmp_path, name), checkpoint(finished, name))


def test_another_seed_finds_something_else(finished: Path, tmp_path: Path) -> None:
    metrics = run(tmp_path, "--seed", "1", "--stages", "classify", "seeds")
    assert metrics["seed"] == 1
    assert metrics["maps"] != read(finished)["maps"]


@pytest.mark.slow
def test_one_stage_after_another_is_as_all_in_one_go(finished: Path, tmp_path: Path) -> None:
    seconds = [0.0]
    for stage in cpal_options.STAGES:
        metrics = run(tmp_path, "--stages", stage)
        seconds.append(metrics["seconds"])
    assert findings(metrics) == findings(read(finished))
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 5


def test_the_loss_falls(tmp_path: Path) -> None:
    flags = ("--stages", "classify", "--epochs", "8", "--train-scenes", "64", "--start", "0.5")
    run(tmp_path, *flags)
    history = checkpoint(tmp_path)["history"]
    assert len(history) == 8
    losses = [epoch["classify"] for epoch in history]
    assert losses[-1] < 0.8 * losses[0]
    # The bank fills in half of the epochs before its loss counts, as 64 scenes are few.
    assert [epoch.get("self") for epoch in history[:4]] == [None, None, 0, 0]
    assert min(epoch["self"] for epoch in history[4:]) > 0


def test_before_start_the_bank_changes_nothing(tmp_path: Path) -> None:
    flags = ("--stages", "classify", "--epochs", "4", "--start", "0.5")
    none, cpal = tmp_path / "none", tmp_path / "cpal"
    run(none, *flags, "--method", "none")
    run(cpal, *flags, "--method", "cpal")
    losses = [[epoch["classify"] for epoch in checkpoint(each)["history"]] for each in (none, cpal)]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] != losses[1][2]
    assert "self" not in checkpoint(none)["history"][0]


def test_the_learning_rate_rises_and_falls_to_0() -> None:
    factors = [learning_rate(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert max(factors) == 1
    assert 0 <= factors[-1] < 1e-3
    assert learning_rate(0, 1) == 1


def test_order_and_crops_depend_on_seed_epoch_and_picture_only() -> None:
    """Not on the salt of Python's hashes, the order of access, or what was drawn before."""
    code = (
        "from protoseg.data import Scenes; from protoseg.recipes.pictures import Crops, Pictures, Shuffle\n"
        "order = Shuffle(9, 3); order.epoch = 2\n"
        "crops = Crops(Pictures(Scenes(4, size=32)), 16, seed=3); crops.epoch = 2\n"
        "print(list(order), [round(crops[i]['images'].mean().item(), 6) for i in (2, 0)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("0", "5")
    }
    order = Shuffle(9, 3)
    order.epoch = 2
    crops = Crops(Pictures(Scenes(4, size=32)), 16, seed=3)
    crops.epoch = 2
    here = [crops[index]["images"] for index in (0, 1, 2)]
    values = [round(here[index].mean().item(), 6) for index in (2, 0)]
    assert outputs == {f"{list(order)} {values}\n"}
    assert sorted(order) == list(range(9))
    crops.epoch = 3
    assert not torch.equal(crops[0]["images"], here[0])


def test_crops_can_go_to_a_process_that_reads() -> None:
    """Also one that is not a fork, to which the data set is pickled."""
    args = cpal_options.parse([])
    masks_of = (partial(pseudo_masks.pseudo_mask, args=args), pseudo_masks.true_mask)
    for crops in (Crops(Pictures(Scenes(2, size=32)), 32, seed=0, masks=each) for each in masks_of):
        again = pickle.loads(pickle.dumps(crops))
        assert len(again) == 2
    assert_equal(again[1], crops[1])


def test_a_crop_s_mask_goes_with_its_picture() -> None:
    """A mask that is a function of the picture stays one under cropping, resizing and mirroring."""
    pictures = Pictures(Scenes(3, size=64))
    crops = Crops(
        pictures,
        64,
        seed=0,
        color=0.0,
        share=(0.3, 0.6),
        masks=lambda sample: (sample.image[0] > 127).byte(),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    agreed = []
    for index in range(3):
        for crops.epoch in range(4):
            item = crops[index]
            agreed.append(float(((item["images"][0] > 0.5) == (item["masks"] > 0)).float().mean()))
    assert min(agreed) > 0.85  # but for edges, where a smooth picture and a nearest mask differ
    whole = Crops(pictures, 64, seed=0, color=0.0, share=(1.0, 1.0))
    assert whole[0]["images"].shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "otso"], "--threshold: expected otsu, sweep or a number in 0..1, got 'otso'"),
        (["--scales", "1", "0"], r"--scales: expected one or more numbers above 0, got \[1.0, 0.0\]"),
        (["--threshold", "1.5"], "--threshold: expected otsu, sweep or a number in 0..1, got '1.5'"),
        (["--segmentation", "unot:resnet18"], "--segmentation: .*expected ARCHITECTURE:ENCODER, got 'unot:resnet18'"),
        (["--segmentation", "unet"], "--segmentation: .*expected ARCHITECTURE:ENCODER, got 'unet'; .*encoder name"),
        (["--crop", "31"], "--crop: the segmentation network needs at least 32 pixels, got 31"),
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--train-scenes", "0"], "--train-scenes: expected at least 1, got 0"),
        (["--head-lr", "0"], "--head-lr: expected a factor above 0, got 0"),
        (["--crop", "7"], "--crop: small:8 needs at least 8 pixels, got 7"),
        (["--weights", "timm", "--stages", "classify"], "--weights: .*small:8 has no pre-trained weights, got 'timm'"),
        (["--weights", "package:lite"], "--weights: load_weights: small:8 has no pre-trained weights"),
        (["--bank", "top_k"], "--bank: expected NAME=VALUE, got 'top_k'"),
    ],
)
def test_flags_that_cannot_work_stop_at_once(flags: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(SystemExit, match=message):
        run(output, *flags)
    assert not output.exists()


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the device of the runs before
    try:
        with pytest.raises(SystemExit, match=r"--device: accelerate found \w+.*, not abacus; say 'auto' or 'cpu'"):
            run(tmp_path, "--device", "abacus")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_an_unknown_refiner_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="load_refiner: 'no_such_crf:refine' cannot be imported"):
        run(tmp_path / "out", "--refine", "no_such_crf:refine")
    assert not (tmp_path / "out").exists()


def test_bank_arguments_are_read_by_their_form() -> None:
    found = keywords("--bank", ["top_k=2", "sharpness=0.5", "shift=false", "metric=cosine", "center=True"])
    assert found == {"top_k": 2, "sharpness": 0.5, "shift": False, "metric": "cosine", "center": True}
    assert [type(value) for value in found.values()] == [int, float, bool, str, bool]


@pytest.mark.parametrize("preset", list(cpal_options.PRESETS))
def test_presets_fill_what_is_not_given(preset: str) -> None:
    args = cpal_options.parse(["--preset", preset, "--lr", "0.5"])
    assert args.lr == 0.5
    for name, value in cpal_options.PRESETS[preset].items():
        assert getattr(args, name) == (0.5 if name == "lr" else value)
    assert args.scales[0] == 1  # the grid of the maps
    assert None not in (args.stride, args.bank_features, args.head_lr, args.crop, args.segmentation_epochs)


def test_the_preset_fits_the_data_and_the_weights_the_preset() -> None:
    assert cpal_options.parse([]).preset == "scenes"
    folder = ["--data", "folder"]
    args = cpal_options.parse(folder)
    assert (args.preset, args.backbone, args.weights) == (
        *("pretrained", "tf_efficientnet_lite0", "package:efficientnet-lite0"),
    )
    assert cpal_options.parse([*folder, "--weights", "none"]).weights is None
    assert cpal_options.parse([*folder, "--preset", "scratch"]).weights is None
    assert cpal_options.parse([*folder, "--preset", "paper-voc"]).weights == "timm"
    # AMN's are those of its first run, unless it is given masks and so has none.
    assert cpal_options.parse([*folder, "--head", "amn"]).weights is None
    assert cpal_options.parse([*folder, "--head", "amn", "--masks", "x"]).weights == "package:efficientnet-lite0"


def test_the_head_can_learn_faster_than_the_backbone() -> None:
    network = CAMNetwork(SmallResNet(2), 3)
    groups = parameter_groups(network, 10.0)
    assert {group["factor"]: len(group["params"]) for group in groups} == {
        1.0: len(list(network.backbone.parameters())),
        10.0: 1,
    }
    (alone,) = parameter_groups(network, 1.0)
    assert [id(each) for each in alone["params"]] == [id(each) for each in network.parameters()]


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [math.nan, math.inf, 1.5], "b": (Path("x"), None, True)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, None, 1.5], "b": ["x", None, True]}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})

    def write() -> None:
        with replacing(path) as file:
            file.write_text("half")
            assert path.read_text() == "1\n"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "1\n"
    assert [each.name for each in path.parent.iterdir()] == ["a.json"]
