"""Every Python block of the README and the docs runs, and so does every example in a docstring."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import protoseg
from protoseg.data import Scenes, load_mask

ROOT = Path(__file__).parents[1]
COPIES = (ROOT / "docs" / "benchmarks", ROOT / "docs" / "notebooks")  # what building the site leaves there
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if not set(COPIES) & set(page.parents)),
]
PAGES_WITH_CODE = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
MODULES = [info.name for info in pkgutil.walk_packages(protoseg.__path__, "protoseg.")]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[int, str]]:
    text = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: fence.start()].count("\n") + 2, fence[1]) for fence in fences]


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The trainer's small CLIP, briefly trained: no weights can be downloaded."""
    pytest.importorskip("open_clip", reason="the extra clip is not installed")
    from accelerate import Accelerator

    from protoseg.recipes import small_clip

    args = SimpleNamespace(clip_data=["scenes"], clip_scenes=64, clip_steps=10, clip_size=64, seed=0, tags="auto")
    args.workers, args.cache = 0, tmp_path_factory.mktemp("cache")
    return small_clip.load(args, Accelerator(cpu=True))


@pytest.mark.parametrize("page", [page for page in PAGES_WITH_CODE if page.name != "plug-in.md"], ids=name_of)
def test_python_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_clip: Any
) -> None:
    """In a folder with some pictures, and with the small CLIP in the place of OpenAI's; but for plug-in.md."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("protoseg.clip.FrozenCLIP.load", lambda name, pretrained: small_clip)
    Path("pictures").mkdir()
    for sample in Scenes(3, size=64):
        Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(f"pictures/{sample.id}.jpg")
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, code in blocks(page):
        # The blank lines make a traceback name the page's own line.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
    if page.name == "pgseg.md":  # a block that would train nothing is no example
        out: Any = namespace["out"]
        assert out.accept_rate > 0.5
        assert out.loss > 0
    if name_of(page) == "docs/tutorials/clip.md":
        found = {path.stem: load_mask(path, num_classes=3) for path in Path("masks").iterdir()}
        assert set(found) == set(Scenes(3).ids)
        assert all(mask.shape == (64, 64) for mask in found.values())


def test_the_readme_has_python_blocks() -> None:
    assert blocks(ROOT / "README.md")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
    assert failed == 0


def test_public_modules_have_examples() -> None:
    with_examples = {name for name in MODULES if doctest.DocTestFinder().find(importlib.import_module(name))}
    assert {"protoseg.modules.context", "protoseg.functional", "protoseg.metrics"} <= with_examples


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_tree_in_the_docs_is_the_codes() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"<!-- tree -->\n```\n(.*?)```", text, re.DOTALL)
    assert tree is not None
    told = {line.split()[0]: {name.strip(",") for name in line.split()[1:]} for line in tree[1].splitlines()}

    package = ROOT / "protoseg"
    found: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        folder = file.parent.relative_to(package).as_posix()
        if file.name.startswith("__"):
            continue
        if folder == ".":
            found[file.stem] = set()
        else:
            found.setdefault(folder, set()).add(file.stem)
    assert told == found
