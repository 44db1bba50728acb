from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import protoseg

ROOT = Path(__file__).parents[1]
MODULES = [info.name for info in pkgutil.walk_packages(protoseg.__path__, "protoseg.")]


def python(program: str) -> str:
    """Output of a fresh interpreter in which every warning is an error."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_import_is_light_and_silent() -> None:
    loaded = set(python("import sys, protoseg, protoseg.report; print(*sys.modules)").split())
    heavy = {"timm", "open_clip", "torchvision", "scipy", "sklearn", "accelerate", "pandas"}
    heavy |= {"PIL", "matplotlib", "jinja2"}  # which a report needs, when it is written
    assert "torch" in loaded
    assert not heavy & loaded


@pytest.mark.parametrize("name", MODULES)
def test_all_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    for entry in names:
        assert hasattr(module, entry), entry


@pytest.mark.parametrize("name", MODULES)
def test_no_name_hides_a_module(name: str) -> None:
    """``import protoseg.x.y as m`` takes the attribute of that name, which has to be the module."""
    module, parent = importlib.import_module(name), importlib.import_module(name.rpartition(".")[0])
    assert getattr(parent, name.rpartition(".")[2]) is module


def test_version_is_that_of_pyproject() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert f'version = "{protoseg.__version__}"' in lines


def test_package_is_typed() -> None:
    assert (ROOT / "protoseg" / "py.typed").exists()
