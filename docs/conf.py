"""The documentation site: ``sphinx-build -W docs build/site``, then open build/site/index.html; no server is needed."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]

project = "protoseg"
author = "The protoseg authors"
copyright = "The protoseg authors, Apache-2.0"
release = importlib.metadata.version("protoseg")
exclude_patterns = ["**/.ipynb_checkpoints"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown as they were saved; a test executes them

# A name that leads nowhere is an error (-W). Only names of other packages may: their pages are not at hand offline.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!protoseg).*"), ("py:class", r"protoseg\.data\.sample\.T")]
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 90
toc_object_entries_show_parents = "hide"
napoleon_attr_annotations = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Shape", "notes_style"), ("State", "notes_style")]

html_theme = "furo"
html_title = f"protoseg {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False


def copy_pages(app: Sphinx) -> None:
    """Bring the notebooks and the benchmarks' pages to where the site can see them; git ignores the copies."""
    shutil.copytree(ROOT / "examples" / "notebooks", Path(app.srcdir, "notebooks"), dirs_exist_ok=True)
    only_pages = shutil.ignore_patterns("*.py", "*.json", "__pycache__")
    shutil.copytree(ROOT / "benchmarks", Path(app.srcdir, "benchmarks"), dirs_exist_ok=True, ignore=only_pages)


def adapt(app: Sphinx, page: str, source: list[str]) -> None:
    """Make links that are right in the repository lead to the copies, and what belongs together stay together."""
    text = re.sub(r"\]\(\.\./benchmarks/results/?\)", "](../benchmarks/results/README.md)", source[0])
    text = re.sub(r"\]\(\.\./((?:\.\./)*)(?:examples/(notebooks)|(benchmarks))/", r"](\1\2\3/", text)
    # A mean and its spread stay on one line.
    text = re.sub(r"(\d) ± (\d)", "\\1\u00a0±\u00a0\\2", text)
    # Too many for the menu, and full of words that people search for; the index of results leads to each.
    aside = page.startswith("benchmarks/results/")
    source[0] = f"---\norphan: true\nnosearch: true\n---\n{text}" if aside else text


def skip(app: Sphinx, what: str, name: str, item: object, skipped: bool, options: Any) -> bool | None:
    """Leave out the plain values of a class: where they matter, its docstring lists them as attributes."""
    told_by_class = (
        what == "class" and not callable(item) and not isinstance(item, property | classmethod | staticmethod)
    )
    return True if told_by_class else None


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.connect("builder-inited", copy_pages)
    app.connect("source-read", adapt)
    app.connect("autodoc-skip-member", skip)
