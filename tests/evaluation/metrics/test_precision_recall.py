import numpy as np
import pytest

from qdiff.evaluation.metrics import metric


def brute_force(own, other, neighbours=3):
    """Shares of `own` within a ball of `other`, ball after ball."""

    def radius(row):
        return np.sort(np.linalg.norm(other - row, axis=1))[neighbours]  # the nearest is the row itself

    radii = [radius(row) for row in other]
    return np.mean([any(np.linalg.norm(row - centre) <= r for centre, r in zip(other, radii)) for row in own])


def rows(n, seed, spread=1.0):
    found = np.random.default_rng(seed).normal(0, spread, size=(n, 1280)).astype(np.float32)
    found[:, 4:] = 0  # four dimensions: neighbourhoods that overlap in part
    return found


def test_precision_and_recall_are_those_of_brute_force():
    own, other = rows(60, 1, 1.5), rows(80, 2)
    precision, recall = metric("precision-recall-efficientnet-lite0").reduce(own, other)
    assert precision.name == "precision_efficientnet_lite0"
    assert recall.name == "recall_efficientnet_lite0"
    assert precision.value == pytest.approx(brute_force(own, other))
    assert recall.value == pytest.approx(brute_force(other, own))
    assert precision.value < recall.value
    assert (precision.n, recall.n) == (60, 80)
    assert precision.low < precision.value < precision.high


def test_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match="more than 3 pictures of both: got 3 and 80"):
        metric("precision-recall-efficientnet-lite0").reduce(rows(3, 1), rows(80, 2))
