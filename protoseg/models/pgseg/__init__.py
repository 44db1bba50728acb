"""PGSeg (arXiv 2310.19001): its network, published weights, and masks for classes by name."""

from protoseg.models.pgseg.grouping import ImageConfig
from protoseg.models.pgseg.network import PGSeg, PGSegConfig, PGSegOutput
from protoseg.models.pgseg.zeroshot import ZeroShot, segment

__all__ = ["ImageConfig", "PGSeg", "PGSegConfig", "PGSegOutput", "ZeroShot", "segment"]
