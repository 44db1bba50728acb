"""The prototype modules: a bank of context prototypes, a regularizer by EM, prototypes in CLIP's vision space."""

from protoseg.modules.context import ContextPrototypeBank, ContextPrototypes, MapContrast
from protoseg.modules.gmm import GMMPrototypeRegularizer, GroupPrototypes
from protoseg.modules.gmm_published import PublishedPrototypeRegularizer
from protoseg.modules.regional import ContrastedRegions, RegionalSemanticContrast
from protoseg.modules.vision import VisionPrototypeLearner

__all__ = [
    "ContextPrototypeBank",
    "ContextPrototypes",
    "ContrastedRegions",
    "GMMPrototypeRegularizer",
    "GroupPrototypes",
    "MapContrast",
    "PublishedPrototypeRegularizer",
    "RegionalSemanticContrast",
    "VisionPrototypeLearner",
]
