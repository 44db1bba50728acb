"""The command ``protoseg layers``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from protoseg.recipes import layers
from protoseg.recipes.cli import main
from tests import hosts


def test_it_prints_the_line_to_copy(capsys: pytest.CaptureFixture[str]) -> None:
    main(["layers", "tests.stand_ins:AMNFirst", "--size", "64", "48", "--count", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "1. features [B, 8, 4, 3], CAM of 4 channels, agrees with the classifier by 100 %",
        '   tap = attach(network, features="stage4", cam="classifier", bank=bank)',
    ]
    assert len(lines) == 4


def test_a_networks_own_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "cam.py").write_text("from tests.hosts import ChannelsLast as Net\n")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "protoseg", "layers", "net.cam:Net"]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'features="norm", cam="head", reshape=lambda x: x.permute(0, 3, 1, 2)' in done.stdout


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("tests.hosts", "expected MODULE:BUILDER"),
        ("tests.nothing:Net", "tests.nothing cannot be imported"),
        ("tests.hosts:Wid", "tests.hosts has no 'Wid'; near names: Wide"),
        ("tests.hosts:C", "must give a torch.nn.Module, got int"),
        ("tests.hosts:MixEncoder", "must be callable without arguments"),
    ],
)
def test_what_is_no_network(target: str, problem: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        layers.build(target)
    assert problem in str(stopped.value)


def test_a_network_without_a_cam() -> None:
    with pytest.raises(SystemExit, match="nothing looks like a CAM"):
        layers.main(["torch.nn:Identity"])
    assert isinstance(layers.build("tests.hosts:Wide"), hosts.Wide)
