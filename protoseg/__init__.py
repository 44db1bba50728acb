"""Prototype modules for weakly supervised and open-vocabulary semantic segmentation."""

import importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protoseg import functional
    from protoseg.modules import (
        ContextPrototypeBank,
        GMMPrototypeRegularizer,
        RegionalSemanticContrast,
        VisionPrototypeLearner,
    )
    from protoseg.tap import attach

__all__ = [
    "ContextPrototypeBank",
    "GMMPrototypeRegularizer",
    "RegionalSemanticContrast",
    "VisionPrototypeLearner",
    "__version__",
    "attach",
    "functional",
]

__version__ = _version("protoseg")

# Imported when they are asked for: the command's help does not need torch.
_HOMES = {
    "ContextPrototypeBank": "protoseg.modules",
    "GMMPrototypeRegularizer": "protoseg.modules",
    "RegionalSemanticContrast": "protoseg.modules",
    "VisionPrototypeLearner": "protoseg.modules",
    "attach": "protoseg.tap",
}


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("protoseg.functional")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'protoseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
