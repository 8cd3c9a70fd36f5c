"""Picture metrics by name, each computed by the package that the field takes it from.

A metric turns pictures into rows of numbers (`rows`) and all rows into records (`reduce`): see `Metric`.
"""

from qdiff.evaluation.metrics import (  # noqa: F401  # each registers its metrics
    clip_score,
    dinov2,
    image_reward,
    inception_score,
    perceptual,
    pick_score,
    pixels,
    precision_recall,
    set_distances,
)
from qdiff.evaluation.metrics.contract import Metric
from qdiff.evaluation.metrics.features import Features
from qdiff.evaluation.metrics.registry import REGISTRY, metric, metrics_of
from qdiff.evaluation.metrics.statistics import Statistics

METRICS: tuple[str, ...] = tuple(sorted(REGISTRY))

__all__ = ["METRICS", "Features", "Metric", "Statistics", "metric", "metrics_of"]
