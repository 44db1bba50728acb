"""Prototype modules for weakly supervised and open-vocabulary semantic segmentation."""

from importlib.metadata import version as _version

from protoseg import functional
from protoseg.attach import attach
from protoseg.context import ContextPrototypeBank
from protoseg.gmm import GMMPrototypeRegularizer
from protoseg.vision import RegionalSemanticContrast, VisionPrototypeLearner

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
