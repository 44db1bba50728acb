"""Prototype modules for weakly supervised and open-vocabulary semantic segmentation."""

from protoseg.context import ContextPrototypeBank

__all__ = ["ContextPrototypeBank"]
