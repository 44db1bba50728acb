from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import protoseg

ROOT = Path(__file__).parents[1]


def python(program: str) -> str:
    """Output of a fresh interpreter in which every warning is an error."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_import_is_light_and_silent() -> None:
    loaded = set(python("import sys, protoseg; print(*sys.modules)").split())
    heavy = {"timm", "open_clip", "torchvision", "scipy", "sklearn", "PIL", "matplotlib", "accelerate", "pandas"}
    assert "torch" in loaded
    assert not heavy & loaded


@pytest.mark.parametrize("name", ["protoseg", "protoseg.functional", "protoseg.context", "protoseg.gmm"])
def test_all_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for entry in module.__all__:
        assert hasattr(module, entry), entry


def test_version_is_that_of_pyproject() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert f'version = "{protoseg.__version__}"' in lines


@pytest.mark.parametrize("name", ["functional", "context", "_kmeans"])
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"protoseg.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_package_is_typed() -> None:
    assert (ROOT / "protoseg" / "py.typed").exists()
