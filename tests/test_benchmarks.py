from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SPEED = Path(__file__).resolve().parents[1] / "benchmarks" / "speed.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What a quick run of the speed benchmark writes, in a process of its own because it sets the thread counts."""
    for package in ("timm", "sklearn"):
        pytest.importorskip(package, reason=f"the speed benchmark needs {package}")
    output = tmp_path_factory.mktemp("speed") / "results"
    command = [sys.executable, "-W", "error", str(SPEED), "--quick", "--threads", "1", "--output", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    page = (output / "speed.md").read_text(encoding="utf-8")
    return json.loads((output / "speed.json").read_text(encoding="utf-8")), page


def measured(value: Any) -> Iterator[dict[str, Any]]:
    """Every measured number in ``value``, however deep."""
    if isinstance(value, dict) and "median" in value:
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from measured(part)


def test_json_has_every_section(results: tuple[dict[str, Any], str]) -> None:
    found, _ = results
    keys = {"environment", "quick", "sizes", "step", "oracle", "kmeans", "growth", "goals", "seconds"}
    assert set(found) == keys
    assert found["quick"]
    assert {"versions", "cpu_count", "torch_threads", "device", "dtype"} <= set(found["environment"])
    assert {"torch", "timm", "scikit-learn", "protoseg"} <= set(found["environment"]["versions"])
    assert found["environment"]["torch_threads"] == 1
    assert {"batch", "features", "refresh_every"} <= set(found["step"]["sizes"])
    assert len(found["goals"]) == 5
    for goal in found["goals"]:
        assert {"what", "goal", "measured", "met"} == set(goal)


def test_every_number_has_a_spread(results: tuple[dict[str, Any], str]) -> None:
    rows = list(measured(results[0]))
    assert len(rows) == 10 + 3 + 3 * 7 + 2
    for row in rows:
        assert math.isfinite(row["median"])
        assert 0 < row["q1"] <= row["median"] <= row["q3"]
        assert row["repeats"] >= 2


def test_bank_and_loops_compute_the_same(results: tuple[dict[str, Any], str]) -> None:
    assert results[0]["oracle"]["largest_difference"] < 1e-4


def test_growth_counts_the_state(results: tuple[dict[str, Any], str]) -> None:
    for one in results[0]["growth"]:
        rows, dim = one["classes"] + 1, results[0]["sizes"]["growth_shape"][1]
        assert one["state_bytes"] >= 4 * rows * one["capacity"] * dim
        assert one["peak_bytes"] >= 0


def test_page_says_what_was_measured(results: tuple[dict[str, Any], str]) -> None:
    found, page = results
    for section in ("step", "oracle", "kmeans"):
        for row in found[section]["rows"]:
            assert f"| {row['what']} | " in page
    for goal in found["goals"]:
        assert f"| {goal['what']} | {goal['goal']} | " in page
    for words in ("--quick", "1 threads", "float32", f"torch {found['environment']['versions']['torch']}"):
        assert words in page
    for sizes in (found["step"]["sizes"]["features"], found["oracle"]["sizes"]["features"]):
        assert str(sizes) in page
    assert f"| {found['growth'][0]['classes']} | {found['growth'][0]['capacity']} | " in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5, 11}, "tables of four and of ten columns"


def test_page_names_no_machine_and_no_folder(results: tuple[dict[str, Any], str]) -> None:
    assert str(SPEED.parents[1]) not in json.dumps(results[0]) + results[1]
    assert platform.node() not in results[1] or len(platform.node()) < 4


def test_accuracy_of_pgseg_runs_what_is_missing_and_shows_means(tmp_path: Path) -> None:
    for package in ("timm", "accelerate", "open_clip", "webdataset"):
        pytest.importorskip(package, reason=f"the trainer needs {package}")
    command = [sys.executable, str(SPEED.with_name("accuracy_pgseg.py")), "--sets", "npr", "--seeds", "0", "1"]
    command += ["--jobs", "2", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out"), "--"]
    command += ["--train-scenes", "16", "--eval-scenes", "4", "--epochs", "1", "--batch", "8", "--size", "32"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    runs = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/*/metrics.json")}
    assert set(runs) == {f"{npr}-{seed}" for npr in ("none", "image", "text", "both") for seed in (0, 1)}
    summary = json.loads((tmp_path / "out" / "accuracy-pgseg-scenes-npr.json").read_text(encoding="utf-8"))
    known = [
        json.loads((tmp_path / "runs" / "scenes" / f"both-{seed}" / "metrics.json").read_text(encoding="utf-8"))
        for seed in (0, 1)
    ]
    mious = [each["maps"]["eval"]["zeroshot"]["miou"] for each in known]
    assert summary["variants"]["both"]["mIoU"]["values"] == mious
    assert summary["variants"]["none"]["accepted, image"]["mean"] is None
    page = (tmp_path / "out" / "accuracy-pgseg-scenes-npr.md").read_text(encoding="utf-8")
    assert f"| both | {sum(mious) / 2:.3f} ± " in page
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    again = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/*/metrics.json")}
    assert again == runs


def test_accuracy_leaves_parts_out_and_ranks_them_without_masks(tmp_path: Path) -> None:
    for package in ("timm", "accelerate", "segmentation_models_pytorch"):
        pytest.importorskip(package, reason=f"the trainer needs {package}")
    command = [sys.executable, str(SPEED.with_name("accuracy.py")), "--seeds", "0", "--device", "cpu", "--name", "tiny"]
    command += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out"), "--"]
    command += ["--train-scenes", "16", "--eval-scenes", "6", "--epochs", "4", "--batch", "8", "--size", "48"]
    command += ["--crop", "48", "--backbone", "small:8", "--segmentation-epochs", "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    run = json.loads((tmp_path / "runs" / "tiny" / "cpal-0" / "metrics.json").read_text(encoding="utf-8"))
    summary = json.loads((tmp_path / "out" / "accuracy-tiny.json").read_text(encoding="utf-8"))
    page = (tmp_path / "out" / "accuracy-tiny.md").read_text(encoding="utf-8")
    assert summary["maps"]["cpal/eval/pacam"]["contrast"]["values"] == [run["maps"]["eval"]["pacam"]["contrast"]]
    # Batches come in another order than single pictures, and clusters depend on it a little.
    whole = summary["parts"]["nothing"]["eval"]["miou"]["mean"]
    assert whole == pytest.approx(run["maps"]["eval"]["pacam"]["miou"], abs=0.05)
    assert len({each["eval"]["contrast"]["mean"] for each in summary["parts"].values()}) > 5
    for figure in summary["rank_correlation"].values():
        assert -1 <= figure["mean"] <= 1
    assert f"| nothing | {summary['parts']['nothing']['train']['miou']['mean']:.3f} | " in page
    assert f"contrast with mIoU on eval is {summary['rank_correlation']['contrast']['mean']:.3f}" in page


def test_speed_of_grad_cam_measures_every_way_and_all_make_the_same_maps(tmp_path: Path) -> None:
    for package in ("open_clip", "pytorch_grad_cam"):
        pytest.importorskip(package, reason=f"the speed benchmark of CLIP needs {package}")
    command = [sys.executable, "-W", "error", str(SPEED.with_name("speed_clip.py")), "--quick", "--threads", "1"]
    subprocess.run([*command, "--output", str(tmp_path / "out")], check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "out" / "speed-clip.json").read_text(encoding="utf-8"))
    page = (tmp_path / "out" / "speed-clip.md").read_text(encoding="utf-8")
    assert max(found["largest_difference"].values()) < 1e-3
    assert len(found["calls"]) == 4
    for row in [*found["calls"], *found["ratios"]]:
        assert 0 < row["q1"] <= row["median"] <= row["q3"]
        assert f"| {row['what']} | " in page
    assert all(one["peak_bytes"] > 0 for one in found["calls"])
    assert str(tmp_path) not in page + json.dumps(found)
    assert str(SPEED.parents[1]) not in page + json.dumps(found)


def test_speed_of_a_pretrained_step(tmp_path: Path) -> None:
    script = str(SPEED.with_name("speed_pretrained.py"))
    flags = ["--batch", "2", "--side", "64", "--repeats", "2", "--output", str(tmp_path)]
    subprocess.run([sys.executable, "-W", "error", script, *flags], capture_output=True, check=True)
    found = json.loads((tmp_path / "speed-pretrained.json").read_text())
    names = [each["what"] for each in found["rows"]]
    assert names[:2] == ["channels first, without", "channels first, with the bank"]
    assert all(each["median"] > 0 for each in found["rows"][:5])
    assert "bank's share of a step" in (tmp_path / "speed-pretrained.md").read_text()
