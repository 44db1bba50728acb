"""Prototype modules for weakly supervised and open-vocabulary semantic segmentation."""

from importlib.metadata import version as _version

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
