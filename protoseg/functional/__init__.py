"""The mathematics of the modules as pure functions of tensors.

Axes: ``B`` images, ``C`` classes, ``K`` prototypes, ``D`` channels, ``H W``. Leading axes written ``...`` broadcast.
Every function computes in float32 whatever the input's dtype (float64 stays float64) and whatever autocast says;
the modules cast back.
"""

from protoseg.functional.affinity import attention_affinity, feature_attention, refine_by_affinity
from protoseg.functional.cam import (
    margin_map,
    max_normalize,
    multi_scale,
    otsu_threshold,
    quantile_threshold,
    to_mask,
    with_background,
)
from protoseg.functional.clustering import Clusters, kmeans
from protoseg.functional.matching import Matching, match, own_similarity, symmetric_contrast
from protoseg.functional.mixture import Kernel, Mixture, em
from protoseg.functional.prototypes import (
    Metric,
    cosine_map,
    dot_map,
    masked_average_pooling,
    mean_direction,
    metric_scale,
    positiveness,
    prototype_cam,
    prototype_shift,
    select_top_k,
    similarity,
    weighted_mean,
)
from protoseg.functional.refinement import Refiner, load_refiner, pixel_adaptive_refine

__all__ = [
    "Clusters",
    "Kernel",
    "Matching",
    "Metric",
    "Mixture",
    "Refiner",
    "attention_affinity",
    "cosine_map",
    "dot_map",
    "em",
    "feature_attention",
    "kmeans",
    "load_refiner",
    "margin_map",
    "masked_average_pooling",
    "match",
    "max_normalize",
    "mean_direction",
    "metric_scale",
    "multi_scale",
    "otsu_threshold",
    "own_similarity",
    "pixel_adaptive_refine",
    "positiveness",
    "prototype_cam",
    "prototype_shift",
    "quantile_threshold",
    "refine_by_affinity",
    "select_top_k",
    "similarity",
    "symmetric_contrast",
    "to_mask",
    "weighted_mean",
    "with_background",
]
