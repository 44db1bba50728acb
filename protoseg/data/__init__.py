"""Pictures with image-level tags or sentences: made scenes, folders of any kind, lists, shards."""

from protoseg.data.files import load_image, load_mask, save_mask, voc_palette
from protoseg.data.folders import VOC_CLASSES, TaggedPictures, VOCFolder
from protoseg.data.pairs import Broken, CsvPairs, ScenePairs, ShardPairs, write_shards
from protoseg.data.plain import PictureFolder
from protoseg.data.sample import Pair, Sample, UnreadableFileError
from protoseg.data.scenes import Scenes
from protoseg.data.surveys import Fault, Survey, survey

__all__ = [
    "VOC_CLASSES",
    "Broken",
    "CsvPairs",
    "Fault",
    "Pair",
    "PictureFolder",
    "Sample",
    "ScenePairs",
    "Scenes",
    "ShardPairs",
    "Survey",
    "TaggedPictures",
    "UnreadableFileError",
    "VOCFolder",
    "load_image",
    "load_mask",
    "save_mask",
    "survey",
    "voc_palette",
    "write_shards",
]
