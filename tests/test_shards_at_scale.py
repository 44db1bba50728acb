"""Ten thousand pairs in twenty shards, two of them damaged: two processes with two workers each, and a killed run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from protoseg.data import Broken, Pair, write_shards
from protoseg.recipes.files import load_checkpoint
from tests.test_pairs import needs_webdataset, workers_warn
from tests.trainer import SETTINGS, assert_equal

pytestmark = [needs_webdataset, workers_warn]

COUNT, SHARDS = 10_000, 20
WORDS = ("brell", "tovin", "skarn", "molu")
# One of two processes that read whole epochs and write down what they got.
READ = """
import json, sys
import torch.distributed as dist
from torch.utils.data import DataLoader
from protoseg.data import ShardPairs

pattern, report, out = sys.argv[1:]
dist.init_process_group("gloo")
stream = ShardPairs(pattern, report=report, transform=lambda pair: (pair.key, pair.caption, int(pair.image[0, 0, 0])))
epochs = []
for epoch in range(2):
    stream.set_epoch(epoch)
    epochs.append([pair for batch in DataLoader(stream, 64, num_workers=2, collate_fn=list) for pair in batch])
with open(f"{out}/{dist.get_rank()}.json", "w") as file:
    json.dump(epochs, file)
"""


def pair(number: int) -> Pair:
    shade = number % 251
    return Pair(f"{number:05d}", torch.full((3, 16, 16), shade, dtype=torch.uint8), f"a {WORDS[number % 4]} {number}")


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shard 3 is cut off in the middle of its 250th pair; in shard 7 one picture's bytes are noise."""
    folder = tmp_path_factory.mktemp("shards")
    shards = write_shards(map(pair, range(COUNT)), folder, COUNT // SHARDS)
    assert len(shards) == SHARDS
    whole = shards[3].read_bytes()
    shards[3].write_bytes(whole[: whole.index(b"01749.png") + 512 + 20])
    damaged = bytearray(shards[7].read_bytes())
    start = damaged.index(b"03600.png") + 512
    damaged[start : start + 40] = bytes(40)
    shards[7].write_bytes(damaged)
    return str(folder / "pairs-{000000..000019}.tar")


def launch(*command: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *command]


def test_two_processes_see_every_whole_pair_once_an_epoch(pattern: str, tmp_path: Path) -> None:
    script = tmp_path / "read.py"
    script.write_text(READ)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = launch(str(script), pattern, str(tmp_path / "report"), str(tmp_path))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    left = {number for number in range(COUNT) if not 1749 <= number < 2000 and number != 3600}
    for epoch in range(2):
        seen = Counter(key for rank in ranks for key, _, _ in rank[epoch])
        assert seen == Counter({f"{number:05d}": 1 for number in left})
        assert all(len(rank[epoch]) > COUNT // 3 for rank in ranks)
    for key, caption, shade in ranks[0][0]:
        assert (caption, shade) == (f"a {WORDS[int(key) % 4]} {int(key)}", int(key) % 251)
    assert [entry[0] for entry in ranks[0][0]] != [entry[0] for entry in ranks[0][1]]
    broken = Broken.read(tmp_path / "report")
    assert broken.counts == {"damaged shard": 1, "broken picture": 1}
    assert "pairs-000003.tar: behind 01748" in broken.names["damaged shard"][0]
    assert broken.names["broken picture"] == [f"{Path(pattern).parent / 'pairs-000007.tar'}: 03600"]


def test_a_run_of_two_processes_that_was_killed_goes_on(pattern: str, tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--data", pattern, "--shard-pairs", "1024", "--workers", "2", "--nouns", *WORDS]
    flags += ["--size", "16", "--batch", "64", "--epochs", "4", "--npr", "both", "--smallest-crop", "0.8"]
    environment = {**os.environ, **SETTINGS}

    def start(output: Path, *more: str) -> subprocess.Popen[str]:
        command = launch("-m", "--", "protoseg", "train", "pgseg", *flags, "--output", str(output), *more)
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def finish(process: subprocess.Popen[str]) -> None:
        told = process.communicate(timeout=300)[1]
        assert process.returncode == 0, told

    finish(start(tmp_path / "whole"))
    process, path = start(tmp_path / "killed"), tmp_path / "killed" / "checkpoint" / "train.pt"
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    # The launcher starts its processes, and they their workers, in sessions of their own.
    for each in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate()
    assert load_checkpoint(path)["epoch"] < 4
    finish(start(tmp_path / "killed", "--resume"))
    want, got = (load_checkpoint(tmp_path / name / "checkpoint" / "train.pt") for name in ("whole", "killed"))
    assert_equal(got, want)
    metrics: dict[str, Any] = json.loads((tmp_path / "killed" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["broken"]["damaged shard"] == 1
    assert len(metrics["history"]) == 4
