"""A frozen CLIP as a source of prototypes, patch features, maps and masks."""

from protoseg.clip.masks import Segmented, segment, segment_batch
from protoseg.clip.model import (
    BACKGROUND,
    TEMPLATES,
    Dense,
    FrozenCLIP,
    Pooling,
    background_names,
    linear_cam,
    readable,
)

__all__ = [
    "BACKGROUND",
    "TEMPLATES",
    "Dense",
    "FrozenCLIP",
    "Pooling",
    "Segmented",
    "background_names",
    "linear_cam",
    "readable",
    "segment",
    "segment_batch",
]
