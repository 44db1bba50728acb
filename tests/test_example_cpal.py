"""The example of CPAL: it learns, writes masks and scores them, and it stands alone."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from protoseg.data import Scenes, load_mask

pytest.importorskip("accelerate", reason="the extra recipes is not installed")
pytest.importorskip("segmentation_models_pytorch", reason="the extra recipes is not installed")
pytest.importorskip("torchvision", reason="the extra recipes is not installed")

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = EXAMPLES / "cpal.py"
SETTINGS = {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "error,ignore:ContextPrototypeBank.fill",
}


class Run(NamedTuple):
    printed: str
    masks: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on a few scenes, in a process of its own."""
    masks = tmp_path_factory.mktemp("masks")
    flags = ["--scenes", "32", "--epochs", "2", "--output", str(masks)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], env={**os.environ, **SETTINGS}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Run(done.stdout, masks)


def test_it_prints_the_settings(run: Run) -> None:
    first = run.printed.splitlines()[0]
    assert "'backbone': 'small:32'" in first
    assert "'epochs': 2" in first


def test_the_classification_loss_falls(run: Run) -> None:
    losses = [float(loss) for loss in re.findall(r"classification (\S+),", run.printed)]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_every_training_picture_has_a_mask(run: Run) -> None:
    scenes = Scenes(32, size=96)
    assert sorted(path.stem for path in run.masks.iterdir()) == scenes.ids

    for index, name in enumerate(scenes.ids):
        sample = scenes[index]
        mask = load_mask(run.masks / f"{name}.png", len(scenes.classes))
        assert mask.shape == sample.image.shape[1:]
        allowed = {0, *(sample.labels.nonzero().flatten() + 1).tolist()}
        assert set(mask.unique().tolist()) <= allowed


def test_every_score_is_a_share(run: Run) -> None:
    scores = dict(re.findall(r"^(.+): mIoU (\S+)$", run.printed, flags=re.MULTILINE))
    assert list(scores) == [
        *("train cam", "train pacam", "val cam", "val pacam"),
        *("train pseudo masks", "val segmentation"),
    ]
    assert all(0 <= float(score) <= 1 for score in scores.values())


def test_it_is_one_short_file_that_stands_alone() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200

    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).partition(".")[0])
    assert "protoseg" in imported
    assert not imported & {"sys", *(path.stem for path in EXAMPLES.glob("*.py"))}
