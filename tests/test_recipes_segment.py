"""``protoseg segment``: a folder of pictures in, masks out, by one process or by two."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("timm", reason="the extra timm is not installed")

from protoseg.clip import BACKGROUND, FrozenCLIP, segment
from protoseg.data import load_image, load_mask
from protoseg.recipes import cli
from protoseg.recipes import segment as recipe
from tests.test_pocket import make
from tests.trainer import SETTINGS

FLAGS = ["--classes", "cat", "traffic_light", "grass", "--size", "48", "--threshold", "0.2", "--device", "cpu"]
ALONE = """
import sys
import torch
from protoseg.clip import FrozenCLIP
from protoseg.recipes import segment
from tests.test_pocket import make

torch.set_num_threads(1)
clip = make()
FrozenCLIP.pocket = staticmethod(lambda **options: clip)
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures of two sizes in two folders, and what is none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    draw = np.random.default_rng(0)
    for index in range(10):
        size = (60, 80, 3) if index % 3 else (80, 60, 3)
        where = folder / "more" if index > 6 else folder
        Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)).save(where / f"p {index}.png")
    Image.fromarray(draw.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(folder / "UPPER.JPG")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("none either")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> FrozenCLIP:
    """The pocket model of the tests in the place of the real one."""
    clip = make()
    monkeypatch.setattr(FrozenCLIP, "pocket", staticmethod(lambda **options: clip))
    return clip


def masks(folder: Path) -> dict[str, bytes]:
    found = (folder / "masks").rglob("*.png")
    return {file.relative_to(folder / "masks").as_posix(): file.read_bytes() for file in found}


def test_masks_are_those_of_segment(
    pictures: Path, small: FrozenCLIP, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    cli.main(["segment", str(pictures), *FLAGS, "--output", str(output), "--overlays"])
    said = capsys.readouterr().out
    summary = json.loads((output / "summary.json").read_text("utf-8"))
    assert len(masks(output)) == summary["masks"] == 11
    assert list(summary["broken"]) == ["broken.jpg"]
    assert "background prompts left out, as they are classes: grass" in said
    assert f"11 masks in {output / 'masks'}, {len(summary['empty'])} empty, " in said
    assert "pictures per second" in said
    assert "not read: broken.jpg: " in said
    assert (output / "classes.txt").read_text("utf-8").split("\n")[:3] == ["background", "cat", "traffic_light"]

    # A name is read as people write it, and a class is no background.
    classes = small.text_prototypes(["cat", "traffic light", "grass"])
    background = small.text_prototypes([name for name in BACKGROUND if name != "grass"])
    empty = []
    for name in masks(output):
        file = next(pictures.glob(f"{name[:-4]}.*"))
        options = {"threshold": 0.2, "attentions": 0, "short_side": 48}
        wanted = segment(small, load_image(file), classes, background, **options)  # type: ignore[arg-type]
        found = load_mask(output / "masks" / name, 3)
        assert (found == wanted.mask).float().mean() > 0.99  # a batch is summed in another order
        assert (output / "overlays" / f"{name[:-4]}.jpg").exists()
        if not found.any():
            empty.append(file.relative_to(pictures).as_posix())
    assert sorted(empty) == summary["empty"]


@pytest.mark.slow
def test_two_processes_write_the_same_masks(pictures: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(ALONE + "segment.main(sys.argv[1:])\n")
    paths = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": os.pathsep.join(paths)}
    launches = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
    }
    for name, launch in launches.items():
        command = [*launch, str(script), str(pictures), *FLAGS, "--batch", "3", "--output", str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    one, two = (json.loads((tmp_path / name / "summary.json").read_text("utf-8")) for name in launches)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert masks(tmp_path / "one") == masks(tmp_path / "two")
    for key in ("masks", "empty", "broken", "masks with"):
        assert one[key] == two[key]


def test_an_earlier_run_is_kept_unless_asked(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    recipe.main([str(pictures), *FLAGS, "--output", str(output)])
    before = masks(output)
    with pytest.raises(SystemExit, match=r"holds results .* delete; take another --output, or say --overwrite"):
        recipe.main([str(pictures), *FLAGS, "--output", str(output)])
    assert masks(output) == before
    (output / "masks" / "old.png").write_bytes(next(iter(before.values())))
    recipe.main([str(pictures), *FLAGS, "--output", str(output), "--overwrite"])
    assert masks(output) == before

    # What no run of ours has left is not ours to delete.
    foreign = tmp_path / "foreign"
    (foreign / "masks").mkdir(parents=True)
    (foreign / "masks" / "theirs.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="holds results"):
        recipe.main([str(pictures), *FLAGS, "--output", str(foreign), "--overwrite"])
    assert (foreign / "masks" / "theirs.png").exists()


def test_a_run_is_repeated_by_its_configuration(pictures: Path, tmp_path: Path) -> None:
    recipe.main([str(pictures), *FLAGS, "--output", str(tmp_path / "one")])
    flags = ["--config", str(tmp_path / "one" / "config.json"), "--output", str(tmp_path / "two")]
    recipe.main([str(pictures), *flags])
    assert masks(tmp_path / "one") == masks(tmp_path / "two")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--classes: expected names"),
        (["--classes", "cat", "dog", "cat"], "--classes: 'cat' is named twice"),
        (["--classes", "traffic_light", "traffic light"], "--classes: 'traffic light' is named twice"),
        (["--classes", "cat", "--batch", "0"], "--batch: expected at least 1, got 0"),
        (["--classes", "cat", "--pretrained", "openai"], "--pretrained: needs --clip"),
        (["--classes", *(f"c{index}" for index in range(255))], "room for 254 classes, got 255"),
    ],
)
def test_what_cannot_work_stops_at_once(flags: Sequence[str], message: str, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        recipe.main([str(pictures), *flags, "--output", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_folders_that_cannot_be(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is no folder"):
        recipe.main([str(tmp_path / "nothing"), *FLAGS])
    with pytest.raises(SystemExit, match="holds no picture"):
        recipe.main([str(tmp_path), *FLAGS])
    with pytest.raises(SystemExit, match="lies in PICTURES"):
        recipe.main([str(pictures), *FLAGS, "--output", str(pictures / "masks")])
    for ending in ("png", "jpg"):
        Image.new("RGB", (40, 40)).save(tmp_path / f"twice.{ending}")
    with pytest.raises(SystemExit, match="several pictures of the name twice"):
        recipe.main([str(tmp_path), *FLAGS, "--output", str(tmp_path.parent / "out")])


def test_a_class_that_is_found_nowhere_is_told(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.main([str(pictures), *FLAGS, "--output", str(tmp_path / "out"), "--presence", "1", "--overlays"])
    told = capsys.readouterr().out
    assert re.search(r"found nowhere: .*; try other words, or a --presence below 1", told)
    assert f"overlays in {tmp_path / 'out' / 'overlays'}" in told
