import numpy as np
import pytest

from qdiff.evaluation import bootstrap
from qdiff.evaluation.bootstrap import mean_interval, resampled_means, shifted_interval


def test_the_interval_covers_the_mean_of_a_normal_sample():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = mean_interval(rng.normal(3, 2, size=50))
        covered += low <= 3 <= high
    # Nominal 0.95; the percentile interval of 50 samples is a little short (0.94); 400 trials know it to 0.011.
    assert covered / 400 == pytest.approx(0.94, abs=0.035)


def test_drawing_in_parts_changes_nothing(monkeypatch):
    samples = np.random.default_rng(1).normal(size=300)
    whole = resampled_means(samples)
    monkeypatch.setattr(bootstrap, "DRAWN_AT_ONCE", 10_000)
    np.testing.assert_array_equal(resampled_means(samples), whole)


def test_independent_sets_add_their_variances():
    rng = np.random.default_rng(2)
    first, second = rng.normal(0, 3, size=400), rng.normal(0, 4, size=900)
    low, high = shifted_interval(10.0, first, second)
    expected = 1.96 * np.sqrt(9 / 400 + 16 / 900)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    assert (high + low) / 2 == pytest.approx(10, abs=0.05)


def test_only_differences_between_influences_count():
    influence = np.random.default_rng(3).normal(size=100)
    assert shifted_interval(1.0, influence + 5) == pytest.approx(shifted_interval(1.0, influence))
