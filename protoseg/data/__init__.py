"""Pictures with image-level tags or sentences: made scenes, VOC-layout folders, lists, shards."""

from protoseg.data.files import load_image, load_mask, save_mask, voc_palette
from protoseg.data.folders import VOC_CLASSES, VOCFolder
from protoseg.data.pairs import Broken, CsvPairs, ScenePairs, ShardPairs, write_shards
from protoseg.data.sample import Pair, Sample, UnreadableFileError
from protoseg.data.scenes import Scenes

__all__ = [
    "VOC_CLASSES",
    "Broken",
    "CsvPairs",
    "Pair",
    "Sample",
    "ScenePairs",
    "Scenes",
    "ShardPairs",
    "UnreadableFileError",
    "VOCFolder",
    "load_image",
    "load_mask",
    "save_mask",
    "voc_palette",
    "write_shards",
]
