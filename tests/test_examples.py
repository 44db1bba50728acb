"""The examples: each learns, writes masks and scores them, and stands alone in one short file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from protoseg.data import Scenes, load_mask

EXTRA = "the extra recipes is not installed"
for package in ("accelerate", "segmentation_models_pytorch", "torchvision", "open_clip"):
    pytest.importorskip(package, reason=EXTRA)

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
SETTINGS = {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "error,ignore:ContextPrototypeBank.fill",
}


def run(name: str, *flags: str) -> str:
    """Run an example in a process of its own, and give what it printed."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *flags], env={**os.environ, **SETTINGS}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def scores(printed: str) -> dict[str, float]:
    """The lines "NAME: mIoU VALUE"."""
    return {name: float(value) for name, value in re.findall(r"^(.+): mIoU (\d\.\d+)", printed, flags=re.MULTILINE)}


def masks_of(folder: Path, scenes: Scenes) -> dict[str, Tensor]:
    """The masks of all scenes, checked for size and number."""
    assert sorted(path.stem for path in folder.glob("*.png")) == scenes.ids
    masks = {name: load_mask(folder / f"{name}.png", len(scenes.classes)) for name in scenes.ids}
    assert all(mask.shape == scenes[index].image.shape[1:] for index, mask in enumerate(masks.values()))
    return masks


def assert_only_tags(masks: dict[str, Tensor], scenes: Scenes) -> None:
    """A mask shows no class that the picture has no tag of."""
    for index, mask in enumerate(masks.values()):
        present = scenes[index].labels.nonzero().flatten() + 1
        assert set(mask.unique().tolist()) <= {0, *present.tolist()}


def test_cpal(tmp_path: Path) -> None:
    printed = run("cpal.py", "--scenes", "32", "--epochs", "2", "--output", str(tmp_path))
    assert "'backbone': 'small:32'" in printed.splitlines()[0]

    losses = [float(loss) for loss in re.findall(r"classification (\S+),", printed)]
    assert len(losses) == 2
    assert losses[1] < losses[0]

    scenes = Scenes(32, size=96)
    assert_only_tags(masks_of(tmp_path, scenes), scenes)
    found = scores(printed)
    assert list(found) == [
        *("train cam", "train pacam", "val cam", "val pacam"),
        *("train pseudo masks", "val segmentation"),
    ]
    assert all(0 <= score <= 1 for score in found.values())


def test_vpl(tmp_path: Path) -> None:
    flags = ["--scenes", "32", "--clip-scenes", "256", "--epochs", "2", "--output", str(tmp_path)]
    printed = run("vpl.py", *flags)

    for network in ("CLIP", "FrozenDecoder"):
        losses = [float(loss) for loss in re.findall(rf"^{network}, epoch \d: loss (\S+)", printed, flags=re.MULTILINE)]
        assert losses[-1] < losses[0]

    scenes = Scenes(32, size=64)
    assert_only_tags(masks_of(tmp_path, scenes), scenes)
    maps = re.findall(r"^maps of (\S+) pictures.*: text (\S+), vision (\S+), refined (\S+)$", printed, re.MULTILINE)
    assert [split for split, *_ in maps] == ["held-out", "tagged"]
    assert all(0 <= float(score) <= 1 for _, *three in maps for score in three)
    assert all(0 <= score <= 1 for score in scores(printed).values())
    assert list(scores(printed)) == ["masks of tagged pictures", "decoder on held-out pictures"]


def test_pgseg(tmp_path: Path) -> None:
    printed = run("pgseg.py", "--scenes", "256", "--epochs", "2", "--output", str(tmp_path))

    losses = [float(loss) for loss in re.findall(r"^epoch \d: loss (\S+)", printed, flags=re.MULTILINE)]
    assert len(losses) == 2
    assert losses[1] < losses[0]

    masks_of(tmp_path / "masks", Scenes(300, seed=1, size=64))
    assert (tmp_path / "pgseg.pt").stat().st_size > 10**6
    assert 0 <= scores(printed)["held-out pictures"] <= 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_an_example_is_one_short_file_that_stands_alone(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert text.count(".add_argument(") + text.count("    add(") <= 12

    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert not str(node.module).startswith("protoseg.recipes")
            imported.add(str(node.module).partition(".")[0])
    assert "protoseg" in imported
    assert not imported & {"sys", *(path.stem for path in SCRIPTS)}
