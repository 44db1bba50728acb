"""The command ``protoseg``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import protoseg
from protoseg.recipes import cli, cpal_options, pgseg_options, vpl_options
from protoseg.recipes.options import plain


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


class TestConfiguration:
    """``--config``: another run's options, in YAML or JSON."""

    def test_it_repeats_a_run_and_flags_go_before_it(self, tmp_path: Path) -> None:
        given = ["--method", "none", "--epochs", "3", "--scales", "1", "0.5", "--bank", "top_k=1", "--weights", "none"]
        first = cpal_options.parse(given)
        (tmp_path / "config.json").write_text(json.dumps(plain(first)), encoding="utf-8")
        again = cpal_options.parse(["--config", str(tmp_path / "config.json")])
        assert {**plain(again), "config": None} == plain(first)
        changed = cpal_options.parse(["--config", str(tmp_path / "config.json"), "--epochs", "5"])
        assert (changed.epochs, changed.scales, changed.seed_map) == (5, [1.0, 0.5], "cam")

    def test_it_chooses_the_preset(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text("preset: scratch\ndata: pictures\nlr: 0.5\n", encoding="utf-8")
        options = cpal_options.parse(["--config", str(path)])
        assert (options.lr, options.crop) == (0.5, cpal_options.PRESETS["scratch"]["crop"])
        assert options.output == Path("runs/cpal")

    def test_it_never_resumes_or_overwrites(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text("resume: true\noverwrite: true\n", encoding="utf-8")
        options = vpl_options.parse(["--config", str(path)])
        assert not options.resume
        assert not options.overwrite

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("epoch: 3\n", "has no option 'epoch' to give; near names: .*epochs"),
            ("- 3\n", "must hold options by name, got list"),
            ("a: [\n", "cannot be read"),
            (None, "cannot be read"),
        ],
    )
    def test_what_is_no_configuration(self, content: str | None, message: str, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        if content is not None:
            path.write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit, match=f"--config: .*{message}"):
            pgseg_options.parse(["--config", str(path)])


def test_help_shows_the_defaults_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    for preset in ("scratch", "paper-voc"):
        with pytest.raises(SystemExit):
            cpal_options.parse(["--preset", preset, "--help"])
        assert f"(default: {cpal_options.PRESETS[preset]['crop']})" in capsys.readouterr().out
