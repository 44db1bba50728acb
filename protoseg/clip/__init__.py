"""A frozen CLIP as a source of prototypes, patch features, maps and masks."""

from protoseg.clip.masks import Segmented, segment
from protoseg.clip.model import BACKGROUND, TEMPLATES, Dense, FrozenCLIP, Pooling

__all__ = ["BACKGROUND", "TEMPLATES", "Dense", "FrozenCLIP", "Pooling", "Segmented", "segment"]
