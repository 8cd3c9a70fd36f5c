"""The bootstrap (Efron 1979): how far a mean would move with other pictures, in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float64

# 2,000 resamples: the ends of a 95 % interval then move by less than 2 % of its width from seed to seed.
RESAMPLES = 2000
CONFIDENCE = (0.025, 0.975)
# Indices drawn at a time: 32 MiB of them, whatever the number of samples.
DRAWN_AT_ONCE = 1 << 22


def resampled_means(samples: Float64[np.ndarray, "n"], seed: int = 0) -> Float64[np.ndarray, "resamples"]:
    """Return the means of `RESAMPLES` draws of n samples with replacement; the same for the same samples and seed."""
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    step = max(1, DRAWN_AT_ONCE // samples.size)
    for start in range(0, RESAMPLES, step):
        stop = min(start + step, RESAMPLES)
        means[start:stop] = samples[rng.integers(0, samples.size, size=(stop - start, samples.size))].mean(axis=1)
    return means


def mean_interval(samples: Float64[np.ndarray, "n"]) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `samples`, all finite."""
    low, high = np.quantile(resampled_means(samples), CONFIDENCE)
    return float(low), float(high)


def shifted_interval(value: float, *influences: Float64[np.ndarray, "n"]) -> tuple[float, float]:
    """Return a 95 % interval of a smooth statistic about its `value`: the bootstrap of its first-order expansion.

    influences: for each independent set of samples, how much the statistic changes with the weight of each sample
    (the derivative is taken at weight 1/n; centred to mean zero here). Resampling the statistic itself would repeat
    samples, which biases distances between distributions upwards and widens their spread; its first-order expansion
    (Efron 1982, the infinitesimal jackknife) has neither fault and costs one pass.
    """
    moves = sum(
        resampled_means(influence - influence.mean(), seed) for seed, influence in enumerate(influences)
    ) + np.zeros(RESAMPLES)
    low, high = np.quantile(value + moves, CONFIDENCE)
    return float(low), float(high)
