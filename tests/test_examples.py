"""The trainer, end to end on tiny pictures: results, resumption, folders, faults, two processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

pytest.importorskip("accelerate", reason="the extra examples is not installed")
pytest.importorskip("segmentation_models_pytorch", reason="the extra examples is not installed")

import common
import cpal_stages
import train_cpal

from protoseg.data import UnreadableFileError
from protoseg.data.scenes import Scenes
from protoseg.data.voc import VOCFolder, save_mask, voc_palette

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_cpal.py"
MSRC15 = Path(__file__).parents[2] / "shared" / "data" / "msrc15"
MAPS = {"cam", "instance", "pacam"}
TINY = ["--device", "cpu", "--size", "48", "--crop", "48", "--backbone", "small:8", "--segmentation-epochs", "1"]
SCENES = [*TINY, "--train-scenes", "24", "--eval-scenes", "6", "--epochs", "2", "--batch", "8"]
SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "PYTHONHASHSEED": "7", "TQDM_DISABLE": "1"}


def run(output: Path, *flags: str) -> dict[str, Any]:
    """Run the trainer in this process and return what it wrote to ``metrics.json``."""
    train_cpal.main([*SCENES, "--output", str(output), *flags])
    return read(output)


def read(output: Path, name: str = "metrics.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / name).read_text(encoding="utf-8"))
    return found


def findings(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What equal runs have in common."""
    return {key: value for key, value in metrics.items() if key not in ("seconds", "peak_memory_mb")}


def checkpoint(output: Path, name: str = "classify") -> dict[str, Any]:
    return common.load_checkpoint(output / "checkpoint" / f"{name}.pt")


def assert_equal(a: Any, b: Any) -> None:
    """The same structure and bitwise the same tensors and numbers."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b or (a != a and b != b)  # NaN is NaN


def masks(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {path.stem: np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def miou(predicted: list[np.ndarray[Any, Any]], truth: list[np.ndarray[Any, Any]], classes: int) -> float:
    """VOC's mean IoU by scikit-learn's confusion matrix."""
    flat, true = np.concatenate([m.ravel() for m in predicted]), np.concatenate([m.ravel() for m in truth])
    matrix = confusion_matrix(true[true != 255], flat[true != 255], labels=range(classes + 1))
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    return float(np.mean(matrix.diagonal()[union > 0] / union[union > 0]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run; not to be changed."""
    output = tmp_path_factory.mktemp("finished")
    run(output)
    return output


# results


def assert_maps(maps: Any, names: tuple[str, ...]) -> None:
    assert set(maps) == {"train", "eval"}
    for split in maps.values():
        assert set(split) == MAPS
        for entry in split.values():
            assert set(entry) == {"miou", "threshold", "per_class", "miou_mask_free", "threshold_mask_free"}
            assert 0 <= entry["miou_mask_free"] <= entry["miou"] <= 1
            assert 0 <= entry["threshold"] <= 1
            assert 0 <= entry["threshold_mask_free"] <= 1
            assert tuple(entry["per_class"]) == names
            known = [value for value in entry["per_class"].values() if value is not None]
            assert entry["miou"] == pytest.approx(sum(known) / len(known))


def test_metrics_have_the_documented_form(finished: Path) -> None:
    metrics = read(finished)
    assert set(metrics) == {
        *("method", "seed", "seconds", "peak_memory_mb", "versions"),
        *("maps", "pseudo_masks", "segmentation", "broken"),
    }
    assert (metrics["method"], metrics["seed"]) == ("cpal", 0)
    assert 0 < metrics["seconds"] < 600
    assert metrics["peak_memory_mb"] > 50
    assert {"python", "protoseg", "torch"} <= set(metrics["versions"])
    names = ("background", *Scenes(1).classes)
    assert_maps(metrics["maps"], names)
    assert set(metrics["pseudo_masks"]) == {"train"}
    pseudo = metrics["pseudo_masks"]["train"]
    assert set(pseudo) == {"miou", "per_class", "threshold", "map", "pictures"}
    assert pseudo["map"] == "pacam"
    assert pseudo["threshold"] == metrics["maps"]["train"]["pacam"]["threshold_mask_free"]
    assert set(metrics["segmentation"]) == {"eval"}
    assert set(metrics["segmentation"]["eval"]) == {"miou", "per_class", "all_background"}
    assert tuple(metrics["segmentation"]["eval"]["per_class"]) == names
    assert metrics["broken"] == {"train": {}, "eval": {}}


def test_main_returns_what_it_writes(tmp_path: Path) -> None:
    returned = train_cpal.main([*SCENES, "--output", str(tmp_path), "--stages", "classify"])
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
    assert "pseudo mask" in page
    assert page.count("<img") >= 12 * 4
    assert all(f"{name} loss" in page for name in ("classify", "self", "segment"))
    config = read(finished, "config.json")
    assert config["backbone"] == "small:8"
    assert config["lr"] == train_cpal.PRESETS["scenes"]["lr"]
    assert not [path for path in finished.rglob(".*") if path.is_file()]  # no half-written file is left


def test_equal_runs_find_the_same(finished: Path, tmp_path: Path) -> None:
    assert findings(run(tmp_path)) == findings(read(finished))
    for name in ("classify", "segment"):
        assert_equal(checkpoint(tmp_path, name), checkpoint(finished, name))


def test_another_seed_finds_something_else(finished: Path, tmp_path: Path) -> None:
    metrics = run(tmp_path, "--seed", "1", "--stages", "classify", "seeds")
    assert metrics["seed"] == 1
    assert metrics["maps"] != read(finished)["maps"]


def test_one_stage_after_another_is_as_all_in_one_go(finished: Path, tmp_path: Path) -> None:
    seconds = [0.0]
    for stage in train_cpal.STAGES:
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
    own = [epoch["self"] for epoch in history]
    assert own[:4] == [0] * 4
    assert min(own[4:]) > 0


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
    factors = [common.learning_rate(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert max(factors) == 1
    assert 0 <= factors[-1] < 1e-3
    assert common.learning_rate(0, 1) == 1


def test_order_and_crops_depend_on_seed_epoch_and_picture_only() -> None:
    """Not on the salt of Python's hashes, the order of access, or what was drawn before."""
    code = (
        "import common; from protoseg.data.scenes import Scenes\n"
        "order = common.Shuffle(9, 3); order.epoch = 2\n"
        "crops = common.Crops(common.Pictures(Scenes(4, size=32)), 16, seed=3); crops.epoch = 2\n"
        "print(list(order), [round(crops[i]['images'].mean().item(), 6) for i in (2, 0)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(SCRIPT.parent), "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("0", "5")
    }
    order = common.Shuffle(9, 3)
    order.epoch = 2
    crops = common.Crops(common.Pictures(Scenes(4, size=32)), 16, seed=3)
    crops.epoch = 2
    here = [crops[index]["images"] for index in (0, 1, 2)]
    values = [round(here[index].mean().item(), 6) for index in (2, 0)]
    assert outputs == {f"{list(order)} {values}\n"}
    assert sorted(order) == list(range(9))
    crops.epoch = 3
    assert not torch.equal(crops[0]["images"], here[0])


def test_a_crop_s_mask_goes_with_its_picture() -> None:
    """A mask that is a function of the picture stays one under cropping, resizing and mirroring."""
    pictures = common.Pictures(Scenes(3, size=64))
    crops = common.Crops(
        pictures, 64, seed=0, colour=0.0, share=(0.3, 0.6), masks=lambda sample: (sample.image[0] > 127).byte()
    )
    agreed = []
    for index in range(3):
        for crops.epoch in range(4):
            item = crops[index]
            red = item["images"] * common.STD + common.MEAN
            agreed.append(float(((red[0] > 0.5) == (item["masks"] > 0)).float().mean()))
    assert min(agreed) > 0.85  # but for edges, where a smooth picture and a nearest mask differ
    whole = common.Crops(pictures, 64, seed=0, colour=0.0, share=(1.0, 1.0))
    assert whole[0]["images"].shape == (3, 64, 64)


# resumption


def start(output: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), *SCENES, "--output", str(output), *flags]
    return subprocess.Popen(command, env={**os.environ, **SETTINGS}, stderr=subprocess.PIPE)


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, f"ended before it could be killed: {process.communicate()[1]!r}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


LONG = ("--epochs", "12", "--segmentation-epochs", "12")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken")
    run(output, *LONG)
    return output


@pytest.mark.parametrize("stage", ["classify", "segment"])
def test_a_killed_run_resumes_bit_for_bit(stage: str, unbroken: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint" / f"{stage}.pt"
    process = start(tmp_path, *LONG)
    kill_when(process, path.exists)
    epoch = checkpoint(tmp_path, stage)["epoch"]
    assert 1 <= epoch < 12
    assert not (tmp_path / "metrics.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        forward: list[str] = []
        real = train_cpal.train
        patch.setattr(train_cpal, "train", lambda name, *rest: forward.append(name) or real(name, *rest))
        metrics = run(tmp_path, *LONG, "--resume")
    assert forward == (["classify", "segment"] if stage == "classify" else ["segment"])
    assert findings(metrics) == findings(read(unbroken))
    for name in ("classify", "segment"):
        assert_equal(checkpoint(tmp_path, name), checkpoint(unbroken, name))
    assert not list((tmp_path / "checkpoint").glob(".*"))  # what a killed process was writing


def test_a_finished_run_resumes_at_once_and_keeps_its_findings(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = checkpoint(tmp_path)
    metrics = run(tmp_path, "--resume")
    assert findings(metrics) == findings(read(finished))
    assert_equal(checkpoint(tmp_path), before)


def test_resume_without_a_run_begins_one(finished: Path, tmp_path: Path) -> None:
    run(tmp_path, "--resume", "--stages", "classify")
    assert_equal(checkpoint(tmp_path), checkpoint(finished))


def test_a_run_of_other_flags_is_not_resumed(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(SystemExit, match=r"holds a run with other flags: epochs was 2 and is 3; give the same flags"):
        run(finished, "--resume", "--epochs", "3")
    with pytest.raises(SystemExit, match=r"seed was 0 and is 1, bank was \[\] and is \['top_k=1'\]"):
        run(finished, "--stages", "seeds", "--seed", "1", "--bank", "top_k=1")
    with pytest.raises(SystemExit, match=r"threshold was 'otsu' and is '0.3'"):
        run(finished, "--stages", "segment", "--threshold", "0.3")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_later_stages_can_be_run_again_with_flags_of_their_own(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    metrics = run(tmp_path, "--stages", "refine", "--threshold", "0.9", "--refine", "none", "--seed-map", "cam")
    assert metrics["pseudo_masks"]["train"]["threshold"] == 0.9
    assert metrics["pseudo_masks"]["train"]["map"] == "cam"
    assert metrics["maps"] == read(finished)["maps"]
    assert metrics["segmentation"] == {}  # that of other masks
    assert read(tmp_path, "config.json")["threshold"] == "0.9"
    assert not (tmp_path / "checkpoint" / "segment.pt").exists()
    expected = {}
    for name in Scenes(24, seed=0, size=48).ids:
        maps = cpal_stages.read_seeds(train_cpal.parse(["--output", str(tmp_path)]), name)["cam"]
        scores = torch.nn.functional.interpolate(maps[None].float(), (48, 48), mode="bilinear")[0]
        expected[name] = int((scores.amax(0) >= 0.9).sum())
    found = {name: int((mask > 0).sum()) for name, mask in masks(tmp_path / "pseudo_masks").items()}
    assert sum(abs(found[name] - expected[name]) for name in expected) <= 0.002 * 48 * 48 * 24


def test_a_run_anew_leaves_nothing_of_the_old_one(finished: Path, tmp_path: Path) -> None:
    """Not even a finished segmentation network that a later --resume would take for its own."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run(tmp_path, "--stages", "classify", "--train-scenes", "16")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        *("classify.pt", "config.json", "metrics.json", "progress.json", "report.html"),
    ]
    assert read(tmp_path)["maps"] == {}


def test_a_folder_of_someone_else_s_files_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "pseudo_masks").mkdir()
    (tmp_path / "pseudo_masks" / "mine.png").write_bytes(b"mine")
    run(tmp_path, "--stages", "classify")
    assert (tmp_path / "pseudo_masks" / "mine.png").read_bytes() == b"mine"


def test_a_stage_needs_the_ones_before_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--stages: \['refine'\] need what 'classify' leaves in .*; run it first"):
        run(tmp_path, "--stages", "refine")
    run(tmp_path, "--stages", "classify")
    with pytest.raises(SystemExit, match="need what 'seeds' leaves"):
        run(tmp_path, "--stages", "refine")


def test_a_ceiling_can_be_asked_for_later(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    metrics = run(tmp_path, "--resume", "--ceiling")
    before = read(finished)
    ceiling = metrics["segmentation"]["eval"].pop("ceiling")
    assert 0 <= ceiling <= 1
    assert findings(metrics) == findings(before)


def test_a_picture_without_a_mask_does_not_stop_the_ceiling() -> None:
    sample = Scenes(1, size=32)[0]
    assert sample.mask is not None
    assert cpal_stages.true_mask(sample) is sample.mask
    assert cpal_stages.true_mask(sample._replace(mask=None)).unique().tolist() == [255]


# flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threshold", "otso"], "--threshold: expected otsu, sweep or a number in 0..1, got 'otso'"),
        (["--threshold", "1.5"], "--threshold: expected otsu, sweep or a number in 0..1, got '1.5'"),
        (["--segmentation", "unot:resnet18"], "--segmentation: expected ARCHITECTURE:ENCODER, got 'unot:resnet18'"),
        (["--segmentation", "unet"], "--segmentation: expected ARCHITECTURE:ENCODER, got 'unet'; .*encoder name"),
        (["--crop", "31"], "--crop: the segmentation network needs at least 32 pixels, got 31"),
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--train-scenes", "0"], "--train-scenes: expected at least 1, got 0"),
        (["--device", "abacus"], "--device: accelerate found cpu, not abacus"),
        (["--bank", "top_k"], "--bank: expected NAME=VALUE, got 'top_k'"),
    ],
)
def test_flags_that_cannot_work_stop_at_once(flags: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(SystemExit, match=message):
        run(output, *flags)
    assert not output.exists()


def test_an_unknown_refiner_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="load_refiner: 'no_such_crf:refine' cannot be imported"):
        run(tmp_path / "out", "--refine", "no_such_crf:refine")
    assert not (tmp_path / "out").exists()


def test_bank_arguments_are_read_by_their_form() -> None:
    found = train_cpal.bank_options(["top_k=2", "sharpness=0.5", "shift=false", "metric=cosine", "centre=True"])
    assert found == {"top_k": 2, "sharpness": 0.5, "shift": False, "metric": "cosine", "centre": True}
    assert [type(value) for value in found.values()] == [int, float, bool, str, bool]


@pytest.mark.parametrize("preset", list(train_cpal.PRESETS))
def test_presets_fill_what_is_not_given(preset: str) -> None:
    args = train_cpal.parse(["--preset", preset, "--lr", "0.5"])
    assert args.lr == 0.5
    for name, value in train_cpal.PRESETS[preset].items():
        assert getattr(args, name) == (0.5 if name == "lr" else value)
    assert args.scales[0] == 1  # the grid of the maps
    assert None not in (args.pretrained, args.crop, args.segmentation_epochs)


def test_json_has_no_nan(tmp_path: Path) -> None:
    common.write_json(tmp_path / "a.json", {"a": [math.nan, math.inf, 1.5], "b": (Path("x"), None, True)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, None, 1.5], "b": ["x", None, True]}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    common.write_json(path, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        common.write_json(path, {"a": object()})
    assert path.read_text() == "1\n"
    assert [each.name for each in path.parent.iterdir()] == ["a.json"]


# folders


CLASSES = ("disc", "bar")


def draw(root: Path, name: str, tag: int, generator: np.random.Generator, *, mask: bool = True) -> None:
    """Write a picture of 40 x 56 with one object on it."""
    pixels = generator.integers(0, 90, (40, 56, 3), dtype=np.uint8)
    truth = np.zeros((40, 56), np.uint8)
    y, x = generator.integers(4, 16), generator.integers(4, 28)
    truth[y : y + (20 if tag == 1 else 8), x : x + 20] = tag
    pixels[truth == tag, tag] = 230
    Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
    if mask:
        truth[0] = 255
        save_mask(root / "SegmentationClass" / f"{name}.png", truth)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "data", *, classes: tuple[str, ...] = CLASSES, masks: bool = True) -> Path:
        root, generator = tmp_path / name, np.random.default_rng(0)
        for each in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (root / each).mkdir(parents=True)
        ids = [f"p{index}" for index in range(14)]
        for index, each in enumerate(ids):
            draw(root, each, 1 + index % 2, generator, mask=masks)
        (root / "classes.txt").write_text("\n".join(("background", *classes)) + "\n")
        rows = [f"{each},{classes[index % 2]}" for index, each in enumerate(ids)]
        (root / "labels.csv").write_text("\n".join(("id,labels", *rows)) + "\n")
        (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(ids[:10]) + "\n")
        (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(ids[10:]) + "\n")
        return root

    return make


def on(root: Path, *flags: str) -> list[str]:
    settings = [*TINY, "--preset", "scenes", "--epochs", "2", "--batch", "5", "--data", str(root)]
    return [*settings, "--output", str(root.parent / "out"), *flags]


def test_a_folder_runs_through(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    train_cpal.main(on(root, "--method", "none", "--threshold", "sweep", "--workers", "1"))
    metrics = read(tmp_path / "out")
    assert_maps(metrics["maps"], ("background", *CLASSES))
    found = masks(tmp_path / "out" / "pseudo_masks")
    ids = VOCFolder(root, "train").ids
    assert set(found) == set(ids)
    assert {mask.shape for mask in found.values()} == {(40, 56)}
    truth = masks(root / "SegmentationClass")
    pseudo = metrics["pseudo_masks"]["train"]
    assert pseudo["miou"] == pytest.approx(miou([found[name] for name in ids], [truth[name] for name in ids], 2))
    assert pseudo["map"] == "cam"
    assert pseudo["threshold"] == metrics["maps"]["train"]["cam"]["threshold"]


def test_evaluation_pictures_of_another_folder(folder: Callable[..., Path], tmp_path: Path) -> None:
    root, other = folder(), folder("other")
    (root / "ImageSets/Segmentation/val.txt").unlink()
    (other / "SegmentationClass" / "p12.png").unlink()  # one without a mask: left out of the score
    flags = ("--eval-data", str(other), "--stages", "classify", "seeds")
    train_cpal.main(on(root, *flags))
    assert_maps(read(tmp_path / "out")["maps"], ("background", *CLASSES))


def test_evaluation_pictures_of_other_classes_are_an_error(folder: Callable[..., Path]) -> None:
    root, other = folder(), folder("other", classes=("disc", "rod"))
    with pytest.raises(SystemExit, match=r"--eval-data: its classes \('disc', 'rod'\) are not .*\('disc', 'bar'\)"):
        train_cpal.main(on(root, "--eval-data", str(other)))


def test_without_masks_there_are_pseudo_masks_and_thresholds(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder(masks=False)
    train_cpal.main(on(root))
    metrics = read(tmp_path / "out")
    for split in ("train", "eval"):
        for entry in metrics["maps"][split].values():
            assert entry["miou"] is entry["threshold"] is entry["miou_mask_free"] is None
            assert entry["per_class"] == {}
            assert 0 < entry["threshold_mask_free"] < 1
    assert metrics["pseudo_masks"]["train"]["miou"] is None
    assert metrics["pseudo_masks"]["train"]["pictures"] == {}
    assert metrics["segmentation"]["eval"]["miou"] is None
    assert len(masks(tmp_path / "out" / "pseudo_masks")) == 10
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") >= 6 * 4  # there is something to see all the same
    train_cpal.main(on(root, "--resume"))  # from what was null in JSON
    assert findings(read(tmp_path / "out")) == findings(metrics)


def test_a_sweep_needs_masks(folder: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit, match="--threshold sweep: the training pictures have no masks; take otsu"):
        train_cpal.main(on(folder(masks=False), "--threshold", "sweep", "--stages", "classify", "seeds", "refine"))


def test_a_broken_picture_stops_with_its_path_or_is_left_out(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    broken = {"train": root / "JPEGImages" / "p3.jpg", "eval": root / "JPEGImages" / "p11.jpg"}
    for path in broken.values():
        path.write_bytes(path.read_bytes()[:700])
    flags = ("--stages", "classify", "seeds", "refine")
    with pytest.raises(UnreadableFileError, match=rf"{broken['train']}: cannot be read"):
        train_cpal.main(on(root, *flags))
    train_cpal.main(on(root, *flags, "--skip-broken", "--resume"))
    metrics = read(tmp_path / "out")
    assert {split: list(each) for split, each in metrics["broken"].items()} == {"train": ["p3"], "eval": ["p11"]}
    for split, path in broken.items():
        assert str(path) in next(iter(metrics["broken"][split].values()))
    assert set(masks(tmp_path / "out" / "pseudo_masks")) == {f"p{index}" for index in range(10)} - {"p3"}


def test_a_broken_picture_in_a_reader_process_is_named(folder: Callable[..., Path]) -> None:
    root = folder()
    path = root / "JPEGImages" / "p3.jpg"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UnreadableFileError, match=rf"{path}: cannot be read"):
        train_cpal.main(on(root, "--workers", "1", "--stages", "classify"))


def test_when_every_picture_is_broken(folder: Callable[..., Path]) -> None:
    root = folder()
    for path in (root / "JPEGImages").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="--skip-broken: all 10 pictures are broken, the first: "):
        train_cpal.main(on(root, "--skip-broken"))


def test_an_empty_split_and_a_missing_folder_or_split(folder: Callable[..., Path], tmp_path: Path) -> None:
    root = folder()
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; give the one which holds JPEGImages"):
        train_cpal.main(on(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"test.txt: no such split; the splits there are train, val"):
        train_cpal.main(on(root, "--eval-split", "test"))
    (root / "ImageSets/Segmentation/train.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"train.txt: the split is empty"):
        train_cpal.main(on(root))
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_is_too_large_to_hold_is_read_again() -> None:
    scenes = Scenes(5, size=32)
    held, read_again = common.Pictures(scenes), common.Pictures(scenes, keep=4)
    assert held[1] is held[1]
    assert read_again[1] is not read_again[1]
    assert [each.id for each in read_again] == held.ids == scenes.ids


@pytest.mark.skipif(not MSRC15.is_dir(), reason=f"needs {MSRC15.name} beside the repository")
def test_real_pictures(tmp_path: Path) -> None:
    flags = ["--stages", "classify", "seeds", "--epochs", "1", "--batch", "8", "--output", str(tmp_path)]
    train_cpal.main([*TINY, "--data", str(MSRC15), "--preset", "scenes", *flags])
    metrics = read(tmp_path)
    assert_maps(metrics["maps"], ("background", *VOCFolder(MSRC15, "train").classes))
    assert metrics["pseudo_masks"] == {"train": {}}
    assert metrics["broken"] == {"train": {}, "eval": {}}


# two processes


WATCH = """
import sys
import torch
import cpal_stages, train_cpal

out, argv = sys.argv[1], sys.argv[2:]
real = {"train": train_cpal.train, "seeds": train_cpal.seeds}

def train(name, model, crops, loss_of, epochs, args, accelerator, modules):
    history = real["train"](name, model, crops, loss_of, epochs, args, accelerator, modules)
    torch.save({"model": model.state_dict(), **{key: each.state_dict() for key, each in modules.items()}},
               f"{out}/{name}-{accelerator.process_index}.pt")
    return history

def seeds(net, splits, args, accelerator):
    found = real["seeds"](net, splits, args, accelerator)
    torch.save({"bank": net.bank.state_dict(), "found": found}, f"{out}/seeds-{accelerator.process_index}.pt")
    return found

train_cpal.train, train_cpal.seeds = train, seeds
train_cpal.main(argv)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What two processes wrote, and what each of them held; 23 and 5 pictures cannot be shared evenly."""
    watched, output = tmp_path_factory.mktemp("watched"), tmp_path_factory.mktemp("pair")
    script = watched / "watch.py"
    script.write_text(WATCH)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    flags = [*SCENES, "--batch", "4", "--train-scenes", "23", "--eval-scenes", "5", "--bank", "refresh_every=1"]
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": str(SCRIPT.parent)}
    command = [*launch, str(watched), *flags, "--output", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return watched, output


def test_two_processes_hold_the_same(pair: tuple[Path, Path]) -> None:
    watched, output = pair
    for name in ("classify", "seeds", "segment"):
        first, second = (torch.load(watched / f"{name}-{rank}.pt", weights_only=True) for rank in range(2))
        assert_equal(first, second)
        if name != "seeds":
            assert_equal({key: checkpoint(output, name)[key] for key in first}, first)
    # 23 pictures at 2 x 4 a step are 2 steps an epoch, for the bank as well, and it took in the pictures of both.
    assert int(checkpoint(output)["bank"]["step"]) == 4
    tags = Scenes(24, seed=0, size=48)
    assert int(checkpoint(output)["bank"]["count"][:-1].sum()) <= 2 * sum(int(tags[i].labels.sum()) for i in range(23))


def test_two_processes_score_every_picture_once(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """From the same weights and in another order of the bank's instances, but with the same counts."""
    _, output = pair
    scenes = Scenes(23, seed=0, size=48)
    found = masks(output / "pseudo_masks")
    assert list(found) == scenes.ids
    assert sorted(path.stem for path in (output / "seeds").iterdir()) == scenes.ids
    metrics = read(output)
    pseudo = metrics["pseudo_masks"]["train"]
    assert list(pseudo["pictures"]) == scenes.ids
    truth = [sample.mask.numpy() for sample in map(scenes.__getitem__, range(23)) if sample.mask is not None]
    assert pseudo["miou"] == pytest.approx(miou(list(found.values()), truth, 8))

    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    flags = ("--batch", "4", "--train-scenes", "23", "--eval-scenes", "5", "--bank", "refresh_every=1")
    alone = run(tmp_path, *flags, "--stages", "seeds", "refine", "segment")
    # What does not depend on the bank agrees to the last pixel.
    assert alone["maps"]["train"]["cam"] == metrics["maps"]["train"]["cam"]
    assert alone["maps"]["eval"]["cam"] == metrics["maps"]["eval"]["cam"]
    assert alone["maps"]["eval"]["instance"] == metrics["maps"]["eval"]["instance"]
    assert alone["segmentation"]["eval"]["all_background"] == metrics["segmentation"]["eval"]["all_background"]
    for split in ("train", "eval"):
        gap = alone["maps"][split]["pacam"]["miou"] - metrics["maps"][split]["pacam"]["miou"]
        assert abs(gap) < 0.05
