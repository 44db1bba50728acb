"""``protoseg masks``, killed at random moments and taken up again each time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import folders
from tests.trainer import SETTINGS, assert_equal, checkpoint, findings, read

from protoseg.data import Scenes  # isort: skip
from protoseg.data.files import read_mask  # isort: skip
from protoseg.utils.files import UNFINISHED  # isort: skip

pytestmark = pytest.mark.slow

FLAGS = ["--device", "cpu", "--preset", "scenes", "--size", "48", "--crop", "48", "--backbone", "small:8"]
FLAGS += ["--epochs", "12", "--batch", "8", "--refine", "none"]
KILLS = 10
SECONDS = 120


def start(flags: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "protoseg", "masks", *flags, *FLAGS]
    environment = {**os.environ, **SETTINGS}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill(process: subprocess.Popen[bytes]) -> bool:
    """Whether it was still running."""
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    return process.returncode != 0


def finish(flags: list[str]) -> None:
    process = start(flags)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors.decode()


def written(output: Path, since: float) -> int:
    """Files that were written after a moment."""
    return sum(changed(Path(folder) / name) >= since for folder, _, names in os.walk(output) for name in names)


def changed(path: Path) -> float:
    """When a file was written; long ago, if it took its place just now."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def moment(draw: random.Random, output: Path) -> Callable[[], bool]:
    """A random moment: at once after some file has been written, or a while after the first."""
    began = time.time()
    if draw.random() < 0.6:
        count = draw.randrange(1, 70)
        return lambda: written(output, began) >= count

    wait = draw.uniform(0, 4)
    first: list[float] = []

    def passed() -> bool:
        if not first and written(output, began):
            first.append(time.time())
        return bool(first) and time.time() - first[0] >= wait

    return passed


def test_ten_kills_leave_the_same_masks_and_no_half_file(tmp_path: Path) -> None:
    source = Scenes(24, size=48)
    given = []
    for sample in map(source.__getitem__, range(24)):
        assert sample.mask is not None
        tags = tuple(tag for tag, here in zip(source.classes, sample.labels, strict=True) if here)
        given.append(folders.Item(sample.id, sample.image.permute(1, 2, 0).numpy(), tags, sample.mask.numpy()))
    data = folders.plain(tmp_path, given, source.classes)
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    finish([*data, "--output", str(unbroken)])

    draw = random.Random(16)
    kills = 0
    while kills < KILLS:
        process = start([*data, "--output", str(killed), "--resume"])
        ready = moment(draw, killed)
        deadline = time.monotonic() + SECONDS
        while process.poll() is None and not ready():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        kills += kill(process)
        if process.returncode == 0:
            # It came to its end before the moment: the next one begins anew, over its files.
            again = ["--stages", "classify", "seeds", "refine", "--overwrite"]
            process = start([*data, "--output", str(killed), *again])
            time.sleep(draw.uniform(4, 8))
            kills += kill(process)

        # Whatever stands there under its own name is whole.
        for path in killed.glob("pseudo_masks/*.png"):
            read_mask(path, len(source.classes))
        for path in killed.glob("*.json"):
            read(killed, path.name)

    finish([*data, "--output", str(killed), "--resume"])
    assert not [path for path in killed.rglob("*") if UNFINISHED.fullmatch(path.name)]
    assert sorted(path.relative_to(killed) for path in killed.rglob("*")) == sorted(
        path.relative_to(unbroken) for path in unbroken.rglob("*")
    )
    for path in unbroken.glob("pseudo_masks/*.png"):
        assert (killed / "pseudo_masks" / path.name).read_bytes() == path.read_bytes()
    assert findings(read(killed)) == findings(read(unbroken))
    assert_equal(checkpoint(killed), checkpoint(unbroken))
