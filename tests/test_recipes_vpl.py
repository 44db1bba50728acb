"""The VPL trainer: what it writes, its options, other data, killed runs, two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from protoseg.data import Scenes, save_mask
from protoseg.models.decoder import Decoded
from protoseg.recipes.files import load_checkpoint
from protoseg.recipes.pictures import Pictures
from tests.test_pocket import make as small_pocket
from tests.trainer import SETTINGS, assert_equal, findings, masks, miou, read

pytest.importorskip("open_clip", reason="the extra clip is not installed")

from protoseg.recipes import small_clip, vpl, vpl_options, vpl_stages

COMMAND = [sys.executable, "-m", "protoseg", "train", "vpl"]
TINY = ["--device", "cpu", "--clip-scenes", "16", "--clip-steps", "3", "--clip-size", "32", "--size", "32"]
TINY += ["--crop", "32", "--epochs", "2", "--batch", "8", "--train-scenes", "12", "--eval-scenes", "5"]
TINY += ["--decoder-dim", "16", "--decoder-depth", "1"]
MAPS = {"text", "text_centered", "vision", "vision_affinity"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(output: Path, cache: Path, *flags: str) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        vpl.main([*TINY, "--cache", str(cache), "--output", str(output), *flags])
    finally:
        torch.set_num_threads(threads)
    return read(output)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A complete run; not to be changed."""
    output = tmp_path_factory.mktemp("vpl")
    run(output, cache)
    return output


def test_metrics_have_the_documented_form(finished: Path) -> None:
    metrics, names = read(finished), ["background", *Scenes(1).classes]
    for split in ("train", "eval"):
        assert set(metrics["maps"][split]) == MAPS
        for entry in metrics["maps"][split].values():
            assert set(entry) == {"miou", "threshold", "per_class", "miou_mask_free", "threshold_mask_free", "contrast"}
            assert 0 < entry["contrast"] < 1
            assert 0 <= entry["miou_mask_free"] <= entry["miou"] <= 1
            assert list(entry["per_class"]) == names
    assert metrics["method"] == "with regional contrast"
    assert metrics["prototypes"]["kl_end"] < metrics["prototypes"]["kl_start"]
    assert set(metrics["trivial"]["eval"]) == {"background", "regions", "tag", "disc", "disc radius"}
    assert set(metrics["segmentation"]) == {"train", "eval"}
    assert set(metrics["segmentation"]["eval"]) == {"miou", "miou_tagged", "per_class", "all_background"}
    assert "VPL on scenes" in (finished / "report.html").read_text(encoding="utf-8")
    history = json.loads((finished / "checkpoint" / "progress.json").read_text())["stages"]["segment"]["history"]
    assert set(history[0]) == {"segment", "affinity", "contrast"}


def test_final_masks_are_those_that_are_scored_and_hold_tags_only(finished: Path) -> None:
    scenes, found = Scenes(12, seed=0, size=32), masks(finished / "masks")
    assert set(found) == set(scenes.ids) == set(masks(finished / "pseudo_masks"))
    truth = []
    for index, name in enumerate(scenes.ids):
        sample = scenes[index]
        assert sample.mask is not None
        truth.append(np.asarray(sample.mask))
        assert set(np.unique(found[name])) <= {0, *(sample.labels.nonzero().flatten() + 1).tolist()}
    score = read(finished)["segmentation"]["train"]["miou"]
    assert score == pytest.approx(miou([found[name] for name in scenes.ids], truth, 8))


def test_the_small_clip_is_trained_once_for_each_setting(
    finished: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    real = small_clip.train
    monkeypatch.setattr(small_clip, "train", lambda *args: trained.append(args[2].seed) or real(*args))
    again = run(tmp_path / "again", cache)
    assert trained == []
    assert findings(again) == findings(read(finished))
    run(tmp_path / "other", cache, "--seed", "1", "--stages", "prototypes")
    assert trained == [1]


@pytest.mark.slow
def test_other_prompts_prototypes_and_contrast_by_flag(finished: Path, cache: Path, tmp_path: Path) -> None:
    base = read(finished)
    (tmp_path / "names.json").write_text('{"brell": ["brello"], "molu": ["mola", "molus"]}', encoding="utf-8")
    only = ("--stages", "prototypes", "seeds")
    for number, flags in enumerate(
        [
            ("--synonyms", str(tmp_path / "names.json")),
            ("--prompts", "ensemble", "--templates", "a {}", "the {}"),
            ("--no-background",),
            ("--no-fit-tags",),
            ("--ratio", "4"),
            ("--shift", "channels"),
        ]
    ):
        found = run(tmp_path / str(number), cache, *only, *flags)
        assert findings(found)["maps"] != base["maps"], flags
        assert found["segmentation"] == {}
    shutil.copytree(finished, tmp_path / "plain")
    plain = run(tmp_path / "plain", cache, "--stages", "segment", "--no-rsc", "--overwrite")
    assert plain["method"] == "without regional contrast"
    assert plain["maps"] == base["maps"]
    both = [load_checkpoint(each / "checkpoint" / "decoder.pt") for each in (tmp_path / "plain", finished)]
    assert [set(each["history"][0]) for each in both] == [{"segment", "affinity"}, {"segment", "affinity", "contrast"}]
    weights = [each["model"]["enter.0.1.weight"] for each in both]
    assert not torch.equal(*weights)


def test_maps_of_several_scales_are_means_on_the_grid_of_the_first() -> None:
    clip = small_pocket()
    text = clip.text_prototypes(["cat", "bus"])
    known = vpl_stages.Prototypes(text, text, text.flip(0), text[:0])
    sample = Scenes(1, seed=3, size=64)[0]._replace(labels=torch.ones(2))

    def maps(*scales: float) -> dict[str, Tensor]:
        args = vpl_options.parse(["--clip", "pocket", "--size", "64", "--scales", *map(str, scales)])
        return vpl_stages.picture_maps(clip, known, sample, args)[0]

    both, first, second = maps(1, 2), maps(1), maps(2)
    for name, found in both.items():
        assert found.shape == first[name].shape == (2, 4, 4)
        smaller = F.interpolate(second[name][None], (4, 4), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(found, (first[name] + smaller) / 2)
    torch.testing.assert_close(first["text"], first["vision"].flip(0))


def test_the_decoder_is_scored_without_tags_and_with_them(tmp_path: Path) -> None:
    class Sure(nn.Module):
        """Says that everything is the second class, or else the first."""

        def forward(self, layers: Sequence[Tensor]) -> Decoded:
            logits = torch.tensor([0.0, 1.0, 2.0])[:, None, None].expand(2, 3, 4, 4)
            return Decoded(logits, logits, logits)

    scene = Scenes(1, seed=3, size=64)[0]
    sample = scene._replace(labels=torch.tensor([1.0, 0.0]), mask=torch.ones(64, 64, dtype=torch.uint8))
    pictures = Known([sample])
    args = vpl_options.parse(["--clip", "pocket", "--size", "64", "--output", str(tmp_path)])
    splits: Any = {"eval": pictures, "train": pictures}
    scores = vpl_stages.score_decoder(small_pocket(), Sure(), splits, args, Accelerator(cpu=True))  # type: ignore[arg-type]
    assert scores["eval"]["miou"] == 0
    assert scores["eval"]["miou_tagged"] == scores["train"]["miou"] == 1
    assert "miou_tagged" not in scores["train"]


class Known(list[Any]):
    """Pictures of two classes."""

    classes = ("brell", "molu")


def test_prompts_hold_names_as_people_write_them(tmp_path: Path) -> None:
    """Row 10: also the other names that a file gives."""

    class Asked:
        templates = ("a photo of a {}",)

        def __init__(self) -> None:
            self.names: list[Any] = []

        def text_prototypes(self, names: Sequence[Any], templates: Sequence[str]) -> torch.Tensor:
            self.names.append(names)
            return torch.zeros(len(names), 4)

    (tmp_path / "synonyms.json").write_text(json.dumps({"tvmonitor": ["television_set"]}))
    args = vpl_options.parse(
        ["--synonyms", str(tmp_path / "synonyms.json"), "--background-names", "sky", "dining table"]
    )
    classes = ["traffic_light", "pottedplant", "diningtable", "tvmonitor", "cat"]
    clip = Asked()
    told: list[str] = []
    vpl_stages.texts(clip, classes, args, say=told.append)  # type: ignore[arg-type]
    assert told == ["background prompts left out, as they are classes: dining table"]
    expected = [["traffic light"], ["potted plant"], ["dining table"], ["tv monitor", "television set"], ["cat"]]
    assert clip.names == [expected, ["sky"]]


def test_permuted_colors_are_what_every_stage_sees() -> None:
    scenes = Scenes(5, seed=0, size=96)
    permuted = Pictures(scenes)
    permuted.channels = [1, 2, 0]
    assert torch.equal(permuted[3].image, scenes[3].image[[1, 2, 0]])
    assert torch.equal(permuted[3].image, next(each for each in permuted if each.id == scenes.ids[3]).image)


def test_a_folder_and_a_model_of_open_clips(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes, folder = Scenes(8, size=64), tmp_path / "voc"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    tags = ["id,labels"]
    for index, name in enumerate(scenes.ids):
        sample = scenes[index]
        assert sample.mask is not None
        image = sample.image[:, : 50 + index].permute(1, 2, 0).numpy()  # of several sizes
        Image.fromarray(image).save(folder / "JPEGImages" / f"{name}.png")
        save_mask(folder / "SegmentationClass" / f"{name}.png", sample.mask[: 50 + index])
        there = sample.labels.nonzero().flatten().tolist()
        tags.append(f"{name},{' '.join(scenes.classes[each] for each in there)}")
    (folder / "labels.csv").write_text("\n".join(tags), encoding="utf-8")
    (folder / "classes.txt").write_text("\n".join(("background", *scenes.classes)), encoding="utf-8")
    lists = folder / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("\n".join(scenes.ids[:5]), encoding="utf-8")
    (lists / "val.txt").write_text("\n".join(scenes.ids[5:]), encoding="utf-8")

    import open_clip

    from protoseg.clip import FrozenCLIP

    text = {"context_length": 20, "width": 32, "heads": 1, "layers": 1}

    def load(name: str, pretrained: str | None, **options: Any) -> FrozenCLIP:
        assert (name, pretrained) == ("ViT-B-16", "openai")
        torch.manual_seed(0)
        model = open_clip.CLIP(16, {"image_size": 32, "patch_size": 8, "width": 64, "layers": 4}, text)
        return FrozenCLIP(model, open_clip.SimpleTokenizer(context_length=20))

    monkeypatch.setattr(FrozenCLIP, "load", load)
    flags = ["--data", str(folder), "--clip", "ViT-B-16", "--pretrained", "openai", "--attentions", "2"]
    metrics = run(tmp_path / "out", cache, *flags)
    assert set(metrics["maps"]["train"]) == MAPS
    assert len(masks(tmp_path / "out" / "masks")) == 5
    # The small CLIP reads the folder's tags as captions as well.
    metrics = run(tmp_path / "small", cache, "--data", str(folder), "--clip-data", "scenes", str(folder))
    assert set(metrics["maps"]["eval"]) == MAPS


def start(output: Path, cache: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [*COMMAND, *TINY, "--cache", str(cache), "--output", str(output), *flags]
    return subprocess.Popen(command, env={**os.environ, **SETTINGS}, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["checkpoint/prototypes.pt", "checkpoint/decoder.pt"])
def test_a_killed_run_resumes_bit_for_bit(when: str, cache: Path, tmp_path: Path) -> None:
    long = ("--epochs", "12")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    want = run(whole, cache, *long)
    process, deadline = start(broken, cache, *long), time.monotonic() + 180
    while not (broken / when).exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (broken / "metrics.json").exists()
    got = run(broken, cache, *long, "--resume")
    assert findings(got) == findings(want)
    for name in ("prototypes", "decoder"):
        both = (load_checkpoint(each / "checkpoint" / f"{name}.pt") for each in (broken, whole))
        assert_equal(*both)
    for folder in ("masks", "pseudo_masks"):
        ours, theirs = masks(broken / folder), masks(whole / folder)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_processes_learn_the_same_prototypes(finished: Path, cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["-m", "protoseg", "train", "vpl"]
    command += [*TINY, "--cache", str(cache), "--output", str(tmp_path), "--batch", "4"]
    done = subprocess.run(command, env={**os.environ, **SETTINGS, "PYTHONWARNINGS": ""}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    alone, both = (load_checkpoint(each / "checkpoint" / "prototypes.pt") for each in (finished, tmp_path))
    torch.testing.assert_close(both["vision"], alone["vision"], rtol=0, atol=1e-3)
    metrics, single = read(tmp_path), read(finished)
    for name in ("text", "text_centered"):  # do not depend on the fit
        assert metrics["maps"]["eval"][name] == single["maps"]["eval"][name]
    assert set(masks(tmp_path / "masks")) == set(masks(finished / "masks"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--threshold", "2"), "--threshold: expected otsu, sweep or a number"),
        (("--pretrained", "openai"), "--pretrained: needs --clip"),
        (("--epochs", "0"), "--epochs: expected at least 1"),
    ],
)
def test_flags_that_cannot_work_stop_at_once(flags: Sequence[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        vpl.main([*TINY, "--output", str(tmp_path / "none"), *flags])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--clip", "ViT-B-61"), "no model 'ViT-B-61' in open_clip; near ones: ViT-B-16"),
        (("--clip", "ViT-B-16", "--pretrained", "opnai"), "neither a file nor a tag of ViT-B-16; near tags: openai"),
        (("--layers", "3"), "layers must lie between -3 and 2"),
        (("--templates", "a photo"), "expected {} for the name"),
        (("--background-names", "sea", "sea"), "every name may occur once"),
        (("--templates", "a {} " + 40 * "very "), "the model reads 32 tokens"),
    ],
)
def test_what_does_not_suit_the_model_stops_before_older_files_go(
    flags: Sequence[str], message: str, finished: Path, cache: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, cache, *flags)
    assert read(tmp_path) == read(finished)
    assert len(masks(tmp_path / "masks")) == 12


def test_a_run_of_other_flags_is_not_resumed(finished: Path, cache: Path) -> None:
    with pytest.raises(SystemExit, match=r"ratio was 2.0 and is 3.0"):
        run(finished, cache, "--ratio", "3", "--resume")
    with pytest.raises(SystemExit, match=r"seed_map was 'vision' and is 'text'"):
        run(finished, cache, "--stages", "segment", "--seed-map", "text")
