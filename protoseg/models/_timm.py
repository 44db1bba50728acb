"""timm's models by name, with an error that helps where there is none."""

from __future__ import annotations

import difflib
from types import ModuleType

__all__ = ["knowing"]


def knowing(where: str, name: str) -> ModuleType:
    """Return timm, which has a model of that name.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm knows no such network.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f'{where} needs timm; run pip install "protoseg[timm]"') from error
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5)) or "see timm.list_models()"
        raise ValueError(f"{where}: name must be a timm model, got {name!r}; near names: {near}")
    return timm
