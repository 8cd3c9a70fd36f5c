"""Names of metrics: a file in this folder that registers a builder adds a metric."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torch

from qdiff.evaluation.metrics.contract import Metric
from qdiff.evaluation.weights import Weights

Builder = Callable[[Weights, torch.device], Metric]
REGISTRY: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    """Decorator: the metric `name` is what this function builds. Raises `ValueError` for a name taken."""

    def add(builder: Builder) -> Builder:
        if name in REGISTRY:
            raise ValueError(f"metric name {name!r} is taken; choose another")
        REGISTRY[name] = builder
        return builder

    return add


def metric(name: str, weights: Weights | None = None, device: torch.device | str = "cpu") -> Metric:
    """Return the metric of this name, computing on `device`, its weights found but not loaded yet.

    Raises:
        ValueError: no metric has this name (with the nearest names).
        MissingWeightsError: its weights are not here and may not or cannot be downloaded.
        ImportError: a package that it needs is not installed.
    """
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=3) or sorted(REGISTRY)
        raise ValueError(f"unknown metric {name!r}: use one of {', '.join(near)}")
    return REGISTRY[name](weights or Weights(), torch.device(device))


def metrics_of(
    names: Sequence[str], weights: Weights | None = None, device: torch.device | str = "cpu"
) -> tuple[Metric, ...]:
    """Return the metrics of these names, in order; raises as `metric` does, and `ValueError` for a name twice."""
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"metrics must each be named once: got {', '.join(sorted(repeated))} more than once")
    return tuple(metric(name, weights, device) for name in names)
