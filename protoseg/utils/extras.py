"""Optional packages: imported where they are needed, with an error that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any

from protoseg.utils.checks import near_names

__all__ = ["require", "timm_with"]


def require(module: str, where: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: Its dotted name.
        where: Who needs it, for the message.
        extra: The extra of protoseg that brings the package.

    Raises:
        ImportError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'{where} needs {package}; run pip install "protoseg[{extra}]"') from error


def timm_with(name: str, where: str) -> Any:
    """Import timm, which has to know a network.

    Args:
        name: Of the network.
        where: Who needs it, for the message.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm knows no such network.
    """
    timm = require("timm", where, "timm")
    if not timm.is_model(name):
        near = near_names(name, timm.list_models()) or "see timm.list_models()"
        raise ValueError(f"{where}: name must be a timm model, got {name!r}; near names: {near}")
    return timm
