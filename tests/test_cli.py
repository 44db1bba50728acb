"""The command ``protoseg``."""

from __future__ import annotations

import subprocess
import sys

import pytest

import protoseg
from protoseg.recipes import cli


def test_help_needs_no_torch() -> None:
    """So that it takes a moment, where the import of torch takes seconds."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "from protoseg.recipes.cli import main\n"
        "main(['train', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    for recipe in cli.RECIPES:
        assert recipe in done.stdout


def test_flags_reach_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("protoseg.recipes.vpl.main", seen.append)
    cli.main(["train", "vpl", "--data", "scenes", "--epochs", "2"])
    assert seen == [["--data", "scenes", "--epochs", "2"]]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"protoseg {protoseg.__version__}\n"


@pytest.mark.parametrize("recipe", sorted(cli.RECIPES))
def test_a_recipes_help_has_its_own_name(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", recipe, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: protoseg train {recipe} ")


@pytest.mark.parametrize("arguments", [[], ["train"], ["train", "nothing"], ["draw"]])
def test_what_is_no_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: protoseg" in capsys.readouterr().err
