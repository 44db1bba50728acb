"""The files around the code say what pyproject.toml says: version, dependencies, and what an issue form needs."""

from __future__ import annotations

import importlib
import re
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest

import protoseg

ROOT = Path(__file__).parents[1]


def load(path: Path) -> Any:
    yaml = pytest.importorskip("yaml", reason="the extra recipes is not installed")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_citation_is_of_this_version() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert citation["version"] == protoseg.__version__
    assert citation["license"] == "Apache-2.0"
    assert {reference["url"].rsplit("/", 1)[1] for reference in citation["references"]} == {
        "2403.07630",
        "2310.19001",
        "2412.19650",
    }
    heading = f"## [{protoseg.__version__}] - {citation['date-released']}"
    assert heading in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_conda_recipe_has_the_same_dependencies() -> None:
    recipe = (ROOT / "conda" / "meta.yaml").read_text(encoding="utf-8")
    run = re.search(r"  run:\n((?:    - .*\n)+)", recipe)
    assert run is not None
    listed = {tuple(line.split()[1:]) for line in run[1].splitlines()}

    needed = {("python", ">=3.10")}
    for requirement in requires("protoseg") or []:
        if "extra ==" in requirement:
            continue
        name, least = re.fullmatch(r"([\w-]+)(>=[\d.]+)", requirement.replace(" ", "")).groups()  # type: ignore[union-attr]
        needed.add(("pytorch" if name == "torch" else name, least))
    assert listed == needed


def test_the_conda_recipe_renders() -> None:
    """What conda-build fills in is there, and what the recipe tests and starts exists."""
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    jinja2 = pytest.importorskip("jinja2", reason="the extra recipes is not installed")
    yaml = pytest.importorskip("yaml", reason="the extra recipes is not installed")

    def load_file_data(path: str, from_recipe_dir: bool) -> Any:
        assert from_recipe_dir
        return tomllib.loads((ROOT / "conda" / path).read_text(encoding="utf-8"))

    template = jinja2.Template(
        (ROOT / "conda" / "meta.yaml").read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined
    )
    recipe = yaml.safe_load(template.render(load_file_data=load_file_data, PYTHON="python"))
    assert recipe["package"] == {"name": "protoseg", "version": protoseg.__version__}
    assert (ROOT / recipe["about"]["license_file"]).exists()

    for name in recipe["test"]["imports"]:
        importlib.import_module(name)
    for script in recipe["build"]["entry_points"]:
        module, function = script.split(" = ")[1].split(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_have_what_a_form_needs(path: Path) -> None:
    form = load(path)
    if path.stem == "config":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(form)
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(part["attributes"]["label"] for part in form["body"])
