"""A run of cpal that takes up a run without the bank where the bank begins."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.trainer import assert_equal, checkpoint, findings, read, run

pytestmark = pytest.mark.slow

FLAGS = ("--epochs", "4", "--start", "0.75", "--maps", "pacam", "--stages", "classify", "seeds")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plain")
    run(output, *FLAGS, "--method", "none", "--seed-map", "pacam")
    return output


def test_a_fork_is_the_run_from_the_beginning(plain: Path, tmp_path: Path) -> None:
    assert checkpoint(plain, "fork")["epoch"] == 1
    whole = run(tmp_path / "whole", *FLAGS)
    forked = run(tmp_path / "fork", *FLAGS, "--fork", str(plain))
    assert findings(forked) == findings(whole)
    assert_equal(checkpoint(tmp_path / "fork"), checkpoint(tmp_path / "whole"))
    assert not (tmp_path / "fork" / "checkpoint" / "fork.pt").exists()
    with pytest.raises(SystemExit, match=r"--fork: .* must be a run of --method none with its fork.pt"):
        run(tmp_path / "other", *FLAGS, "--fork", str(tmp_path / "whole"))
    # It can be stopped and resumed like any other.
    assert findings(run(tmp_path / "fork", *FLAGS, "--resume")) == findings(whole)


def test_a_fork_of_other_flags_is_refused(plain: Path, tmp_path: Path) -> None:
    fork = ("--fork", str(plain))
    with pytest.raises(SystemExit, match=r"--fork: .* is a run with other flags: seed was 0 and is 1"):
        run(tmp_path, *FLAGS, *fork, "--seed", "1")
    with pytest.raises(SystemExit, match="--fork: only --method cpal takes up another run"):
        run(tmp_path, *FLAGS, *fork, "--method", "none", "--seed-map", "pacam")
    with pytest.raises(SystemExit, match=r"--fork: nothing is no run's folder: .*No such file"):
        run(tmp_path, *FLAGS, "--fork", "nothing")
    with pytest.raises(SystemExit, match=r"--fork: .* is in --output, where this run begins anew"):
        run(plain, *FLAGS, *fork, "--overwrite")
    assert not list(tmp_path.iterdir())


def test_a_fork_may_have_another_bank_and_weight(plain: Path, tmp_path: Path) -> None:
    fork = ("--fork", str(plain))
    found = run(tmp_path, *FLAGS, *fork, "--weight", "3", "--bank", "score=dot", "--bank-rounds", "1")
    assert 0 < found["maps"]["eval"]["pacam"]["miou"] < 1
    shutil.rmtree(tmp_path)
    assert read(plain, "config.json")["method"] == "none"
