"""The trainer, stopped and resumed, and stages run again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from protoseg.data import Scenes
from protoseg.recipes import cpal_options
from protoseg.recipes.cpal_options import CPALOptions
from protoseg.recipes.files import save_checkpoint
from tests.trainer import (
    COMMAND,
    SCENES,
    SETTINGS,
    assert_equal,
    checkpoint,
    cpal,
    findings,
    masks,
    pseudo_masks,
    read,
    run,
)


def start(output: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [*COMMAND, *SCENES, "--output", str(output), *flags]
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


@pytest.mark.slow
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
        real = cpal.train

        def watched(name: str, *rest: Any, **options: Any) -> Any:
            forward.append(name)
            return real(name, *rest, **options)

        patch.setattr(cpal, "train", watched)
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
    with pytest.raises(SystemExit, match=r"holds a run with other flags: epochs was 2 and is 1; give the same flags"):
        run(finished, "--resume", "--epochs", "1")
    with pytest.raises(
        SystemExit,
        match=r"seed was 0 and is 1, bank was \['score=whitened'\] and is \['top_k=1'\]",
    ):
        run(finished, "--stages", "seeds", "--seed", "1", "--bank", "top_k=1")
    with pytest.raises(SystemExit, match=r"threshold was 'otsu' and is '0.3'"):
        run(finished, "--stages", "segment", "--threshold", "0.3")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.slow
def test_more_epochs_than_last_time_go_on(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    metrics = run(tmp_path, "--resume", "--epochs", "3")
    printed = capsys.readouterr().out
    assert "--resume: classify goes on to 3 epochs; seeds, refine, segment will be done anew" in printed
    assert "classify 2/3" not in printed
    assert "classify 3/3" in printed

    # What the new network finds, and nothing of the old one's.
    before = checkpoint(finished)["history"]
    assert checkpoint(tmp_path)["history"][:2] == before
    assert len(checkpoint(tmp_path)["history"]) == 3
    assert metrics["maps"] != read(finished)["maps"]
    assert "segment 1/" in printed

    # Nothing is left to do for those who ask again.
    assert findings(run(tmp_path, "--resume", "--epochs", "3")) == findings(metrics)
    assert "classify" not in capsys.readouterr().out


@pytest.mark.slow
def test_more_epochs_of_the_last_stage_leave_the_earlier_ones_alone(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    longer = str(read(finished, "config.json")["segmentation_epochs"] + 1)
    metrics = run(tmp_path, "--resume", "--segmentation-epochs", longer)
    assert metrics["pseudo_masks"] == read(finished)["pseudo_masks"]
    assert checkpoint(tmp_path, "segment")["epoch"] == int(longer)


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line(tmp_path: Path) -> None:
    # What a shell runs in the background ignores the signal, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(tmp_path, *LONG)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint" / "classify.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.decode().strip() == f"stopped; the same command with --resume goes on in {tmp_path}"


def test_a_run_says_how_it_goes_and_how_it_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    out, errors = capfd.readouterr()
    lines = out.splitlines()
    first = r"classify 1/2: loss \d\.\d{4}( \(.+\))?; about \d+ s left"
    assert any(re.fullmatch(first, line) for line in lines)
    assert any(re.fullmatch(r"classify 2/2: loss \d\.\d{4}( \(.+\))?", line) for line in lines)
    assert re.fullmatch(r"done in \d+ s, with at most \d+ MB", lines[-3])
    assert lines[-2].startswith(f"pseudo_masks: 24 in {tmp_path / 'pseudo_masks'}")
    assert lines[-1] == f"report: {tmp_path / 'report.html'}"
    assert errors == ""  # no bar where there is no terminal


def test_trackers_are_told_losses(tmp_path: Path) -> None:
    """accelerate's own base class stands for a service."""
    told: list[dict[str, Any]] = []

    class Notes(GeneralTracker):
        name = "notes"
        requires_logging_directory = False

        def __init__(self) -> None:
            super().__init__()

        @property
        def tracker(self) -> None:
            return None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.append(values)

        def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
            told.append({**values, "step": step})

    def launch(options: CPALOptions) -> Accelerator:
        accelerator = Accelerator(cpu=True)
        accelerator.trackers = [Notes()]
        return accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpal, "launch", launch)
        run(tmp_path, "--stages", "classify")
    history = checkpoint(tmp_path)["history"]
    assert [entry["step"] for entry in told] == [1, 2]
    assert [entry["classify/classify"] for entry in told] == [entry["classify"] for entry in history]


def test_trackers_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match=r"--log-with: accelerate knows no tracker 'tensorbord'; near names: .*tensorboard"
    ):
        run(tmp_path, "--log-with", "tensorbord")
    missing = next(name for name in LOGGER_TYPE_TO_CLASS if name not in map(str, get_available_trackers()))
    with pytest.raises(SystemExit, match=f"--log-with: the package of {missing} is not installed"):
        run(tmp_path, "--log-with", missing)


def test_a_run_of_other_processes_is_not_resumed(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    save_checkpoint(tmp_path / "checkpoint" / "classify.pt", {**checkpoint(finished), "processes": 2})
    with pytest.raises(SystemExit, match=r"classify.pt is of 2 processes and these are 1.*launch as many as before"):
        run(tmp_path, "--resume", "--stages", "classify")
    assert checkpoint(tmp_path)["processes"] == 2


def test_later_stages_can_be_run_again_with_flags_of_their_own(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    metrics = run(
        tmp_path, "--stages", "refine", "--threshold", "0.9", "--refine", "none", "--seed-map", "cam", "--overwrite"
    )
    assert metrics["pseudo_masks"]["train"]["threshold"] == 0.9
    assert metrics["pseudo_masks"]["train"]["map"] == "cam"
    assert metrics["maps"] == read(finished)["maps"]
    assert metrics["segmentation"] == {}  # that of other masks
    assert read(tmp_path, "config.json")["threshold"] == "0.9"
    assert not (tmp_path / "checkpoint" / "segment.pt").exists()
    expected = {}
    for name in Scenes(24, seed=0, size=48).ids:
        maps = pseudo_masks.read_seeds(cpal_options.parse(["--output", str(tmp_path)]), name)["cam"]
        scores = torch.nn.functional.interpolate(maps[None].float(), (48, 48), mode="bilinear")[0]
        expected[name] = int((scores.amax(0) >= 0.9).sum())
    found = {name: int((mask > 0).sum()) for name, mask in masks(tmp_path / "pseudo_masks").items()}
    assert sum(abs(found[name] - expected[name]) for name in expected) <= 0.002 * 48 * 48 * 24


def test_a_run_anew_leaves_nothing_of_the_old_one(finished: Path, tmp_path: Path) -> None:
    """Not even a finished segmentation network that a later --resume would take for its own."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run(tmp_path, "--stages", "classify", "--train-scenes", "16", "--overwrite")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        *("classes.txt", "classify.pt", "config.json", "metrics.json", "progress.json", "report.html"),
    ]
    assert read(tmp_path)["maps"] == {}


def test_the_same_command_again_deletes_nothing(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flags in ((), ("--stages", "refine"), ("--seed", "1")):
        with pytest.raises(SystemExit, match=r"holds results .* would delete; .* --resume, or say --overwrite"):
            run(tmp_path, *flags)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_page_that_no_run_wrote_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    for flags in ((), ("--overwrite",), ("--resume",)):
        with pytest.raises(SystemExit, match=r"holds results \(report.html and 0 more\)"):
            run(tmp_path, *flags)
    assert (tmp_path / "report.html").read_text() == "mine"


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
    assert pseudo_masks.true_mask(sample) is sample.mask
    assert pseudo_masks.true_mask(sample._replace(mask=None)).unique().tolist() == [255]
