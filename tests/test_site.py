"""The documentation site: it builds without a warning, all public names have entries, nothing comes from elsewhere.

Building needs the extra docs, and is slow.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import protoseg
import protoseg.models

ROOT = Path(__file__).parents[1]
PACKAGES = ("", "functional", "modules", "metrics", "data", "clip", "report", "tap", "models.pgseg")
MODELS = [f"models.{each.name}" for each in pkgutil.iter_modules(protoseg.models.__path__)]


def public_names(package: str) -> set[str]:
    """The full names of what a package says is public; of one that says nothing, what it defines."""
    full = f"protoseg.{package}".rstrip(".")
    module = importlib.import_module(full)
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and inspect.getmodule(value) is module and callable(value)
    ]
    return {f"{full}.{name}" for name in getattr(module, "__all__", defined)}


class Links(HTMLParser):
    """What a page links to, what it loads, and the ids that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if "id" in values:
            self.ids.add(str(values["id"]))
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))
        if tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.loaded.append(str(values["src"]))
        if tag == "link" and values.get("href") and values.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(str(values["href"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("sphinx", "furo", "myst_nb"):
        pytest.importorskip(package, reason="the extra docs is not installed")
    output = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E", str(ROOT / "docs"), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {page: Links(page.read_text(encoding="utf-8")) for page in sorted(site.rglob("*.html"))}


@pytest.mark.slow
def test_every_public_name_has_an_entry(site: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    entries = {name for kind, names in inventory.data.items() if kind.startswith("py:") for name in names}
    wanted = set().union(*(public_names(package) for package in (*PACKAGES, *MODELS)))
    assert len(wanted) > 100
    assert not wanted - entries


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(pages: dict[Path, Links]) -> None:
    broken = []
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            known = pages[target].ids if target in pages else set()
            if not target.exists() or (parts.fragment and target in pages and unquote(parts.fragment) not in known):
                broken.append(f"{page.name}: {link}")
    assert len(pages) > 30
    assert not broken


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Links]) -> None:
    for page, found in pages.items():
        elsewhere = [url for url in found.loaded if urlsplit(url).netloc]
        assert not elsewhere, page
        assert all((page.parent / unquote(urlsplit(url).path)).exists() for url in found.loaded), page
    styles = "".join(style.read_text(encoding="utf-8") for style in site.rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import)\s*['\"]?https?:", styles)


@pytest.mark.slow
def test_the_search_needs_no_server(site: Path) -> None:
    """A page that is opened as a file may load a script, and may not fetch JSON."""
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert index.startswith("Search.setIndex(")
    assert "contextprototypebank" in index.lower()


def strings(file: Path) -> list[str]:
    """The strings of a file; where a value is put in, there is a gap."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_the_messages_of_the_errors_page_are_the_codes() -> None:
    text = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    said = [string for file in (ROOT / "protoseg").rglob("*.py") for string in strings(file)]
    unknown = []
    for message in messages:
        if message.startswith("bash: "):  # not ours
            continue
        pieces = [piece.strip() for piece in message.split("...") if len(piece.strip()) > 3]
        unknown += [piece for piece in pieces if not any(piece in string for string in said)]
    assert len(messages) > 20
    assert not unknown


def test_the_drawn_layers_are_those_of_the_contract(tmp_path: Path) -> None:
    pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    script, drawn = ROOT / "docs" / "make_layers.py", tmp_path / "layers.svg"
    subprocess.run([sys.executable, str(script), "--output", str(drawn)], check=True)
    committed = ROOT / "docs" / "_static" / "layers.svg"
    assert drawn.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")
