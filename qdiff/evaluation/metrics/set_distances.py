"""The distances between sets of pictures by name, over the features of each network."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qdiff.evaluation.metrics.dinov2 import dinov2
from qdiff.evaluation.metrics.efficientnet import efficientnet_lite0
from qdiff.evaluation.metrics.features import Features
from qdiff.evaluation.metrics.frechet import FrechetDistance
from qdiff.evaluation.metrics.inception import RESIZES, inception, random_inception
from qdiff.evaluation.metrics.kernel import KernelDistance
from qdiff.evaluation.metrics.registry import register
from qdiff.evaluation.weights import Weights

Distance = type[FrechetDistance] | type[KernelDistance]


def _register(distance: Distance, name: str, build: Callable[[Weights, torch.device, str], Features]) -> None:
    """build: the extractor, from the weights, the device, and the name to use in errors."""

    @register(name)
    def over_features(weights: Weights, device: torch.device) -> FrechetDistance | KernelDistance:
        return distance(build(weights, device, name))


def _register_published(distance: Distance, mode: str) -> None:
    name = distance.standard if mode == "clean" else f"{distance.standard}-{mode.replace('_', '-')}"
    _register(distance, name, lambda weights, device, used_by: inception(weights, device, used_by, mode))


_distances: tuple[Distance, ...] = (FrechetDistance, KernelDistance)
for _distance in _distances:
    for _mode in RESIZES:
        _register_published(_distance, _mode)
    _register(
        _distance,
        f"{_distance.general}-efficientnet-lite0",
        lambda weights, device, used_by: efficientnet_lite0(device),
    )
    _register(_distance, f"{_distance.general}-inception-random", random_inception)
    _register(_distance, f"{_distance.general}-dinov2", dinov2)
