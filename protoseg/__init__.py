"""Prototype modules for weakly supervised and open-vocabulary semantic segmentation."""

from importlib.metadata import version as _version

from protoseg import functional
from protoseg.context import ContextPrototypeBank
from protoseg.gmm import GMMPrototypeRegularizer

__all__ = ["ContextPrototypeBank", "GMMPrototypeRegularizer", "__version__", "functional"]

__version__ = _version("protoseg")
