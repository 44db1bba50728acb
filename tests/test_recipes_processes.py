"""The trainer in two processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from protoseg.data import Scenes
from protoseg.recipes.session import start_engine
from tests.trainer import SCENES, SETTINGS, assert_equal, checkpoint, cpal, masks, miou, read, run

pytestmark = pytest.mark.slow

WATCH = """
import sys
import torch
from protoseg.recipes import cpal

out, argv = sys.argv[1], sys.argv[2:]
real = {"train": cpal.train, "seeds": cpal.seeds}

def train(name, model, crops, loss_of, epochs, args, accelerator, modules, **options):
    history = real["train"](name, model, crops, loss_of, epochs, args, accelerator, modules, **options)
    torch.save({"model": model.state_dict(), **{key: each.state_dict() for key, each in modules.items()}},
               f"{out}/{name}-{accelerator.process_index}.pt")
    return history

def seeds(net, splits, args, accelerator):
    found = real["seeds"](net, splits, args, accelerator)
    torch.save({"bank": net.bank.state_dict(), **found._asdict()}, f"{out}/seeds-{accelerator.process_index}.pt")
    return found

cpal.train, cpal.seeds = train, seeds
cpal.main(argv)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What two processes wrote, and what each of them held; 23 and 5 pictures cannot be shared evenly."""
    watched, output = tmp_path_factory.mktemp("watched"), tmp_path_factory.mktemp("pair")
    script = watched / "watch.py"
    script.write_text(WATCH)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    flags = [*SCENES, "--batch", "4", "--train-scenes", "23", "--eval-scenes", "5", "--bank", "refresh_every=1"]
    environment = {**os.environ, **SETTINGS}
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
    # 23 pictures at 2 x 4 a step are 2 steps an epoch, and the bank took in the pictures of both, in the second epoch.
    assert int(checkpoint(output)["bank"]["memory.step"]) == 2
    tags = Scenes(24, seed=0, size=48)
    assert int(checkpoint(output)["bank"]["memory.stored"][:-1].sum()) <= sum(
        int(tags[i].labels.sum()) for i in range(23)
    )


def test_two_processes_score_every_picture_once(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the same weights they fill the same bank, in the same order, and find the same as one process."""
    watched, output = pair
    scenes = Scenes(23, seed=0, size=48)
    found = masks(output / "pseudo_masks")
    assert list(found) == scenes.ids
    assert sorted(path.stem for path in (output / "seeds").iterdir()) == scenes.ids
    metrics = read(output)
    pseudo = metrics["pseudo_masks"]["train"]
    assert list(pseudo["pictures"]) == scenes.ids
    truth = [sample.mask.numpy() for sample in map(scenes.__getitem__, range(23)) if sample.mask is not None]
    assert pseudo["miou"] == pytest.approx(miou(list(found.values()), truth, 8))

    banks = []
    real = cpal.seeds
    monkeypatch.setattr(cpal, "seeds", lambda net, *rest: (real(net, *rest), banks.append(net.bank))[0])
    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    flags = ("--batch", "4", "--train-scenes", "23", "--eval-scenes", "5", "--bank", "refresh_every=1")
    alone = run(tmp_path, *flags, "--stages", "seeds", "refine", "--overwrite")
    together = torch.load(watched / "seeds-0.pt", weights_only=True)["bank"]
    for key, value in banks[0].state_dict().items():
        if key != "step":
            torch.testing.assert_close(together[key], value)
    # Of the final network and every picture once: nothing that training left, none twice to share them evenly.
    tags = torch.stack([scenes[index].labels for index in range(23)]).sum(0)
    assert (together["memory.stored"][:-1] <= tags).all()
    assert together["memory.stored"][-1] <= 23
    # Counts are the same to the last one; a mean of contrasts is summed in another order.
    for split, maps in alone["maps"].items():
        for name, entry in maps.items():
            assert entry.pop("contrast") == pytest.approx(metrics["maps"][split][name].pop("contrast"), rel=1e-9)
    assert alone["maps"] == metrics["maps"]
    assert alone["pseudo_masks"] == metrics["pseudo_masks"]


def test_amn_in_two_processes_makes_its_masks_first(tmp_path: Path) -> None:
    """Its first run must not end the processes' group."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    launch += ["-m", "protoseg", "train", "cpal"]
    flags = ["--batch", "4", "--head", "amn", "--first-epochs", "2", "--stages", "classify"]
    command = [*launch, *SCENES, *flags, "--output", str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, **SETTINGS}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(masks(tmp_path / "first" / "pseudo_masks")) == 24
    assert checkpoint(tmp_path)["processes"] == 2


def test_processes_that_do_not_know_of_each_other_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would do all of the work, and write over the other's files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=r"2 processes were started, and accelerate takes each .*; say --device cpu"):
        start_engine("auto")
