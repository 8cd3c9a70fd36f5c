"""How much each picture moves the Frechet distance: its derivative by the weight of one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qdiff.evaluation.metrics.statistics import Statistics, chunks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Float64

    Rows = tuple[Float32[np.ndarray, "n d"], Bool[np.ndarray, "n"]]

# Eigenvalues below this share of the largest are rounding: float64 leaves 2e-16 of the largest.
NEGLIGIBLE = 1e-13


def influences(own: Statistics, other: Statistics, *rows: Rows) -> tuple[Float64[np.ndarray, "n"], ...]:
    """Return the influence of each kept row on the Frechet distance of two Gaussians, one array for each set of rows.

    rows: (features, which are kept) of the first set and, where they are at hand, of the second.

    With T the optimal map from the first Gaussian to the second (Dowson & Landau 1982), the derivative by the first
    covariance is I - T, by the second I - T^-1, and by the means 2 (m1 - m2) and its negative.

    It should be the case that the influences' mean is zero, and their standard deviation over the root of n the
    distance's standard error; measured in 48 dimensions: 1.0 to 1.35 of the true one, where resampling the distance
    itself gives 1.2 to 2.1 (75 to 500 pictures, paired or not).
    """
    forward, backward = _maps(own.covariance, other.covariance)
    shift = 2 * (own.mean - other.mean)
    parts = zip(rows, (own, other), (shift, -shift), (forward, backward))
    return tuple(_quadratic(part, about.mean, slope, map_) for part, about, slope, map_ in parts)


def _maps(
    first: Float64[np.ndarray, "d d"], second: Float64[np.ndarray, "d d"]
) -> tuple[Float64[np.ndarray, "d d"], Float64[np.ndarray, "d d"]]:
    """The optimal map S2^1/2 (S2^1/2 S1 S2^1/2)^-1/2 S2^1/2 and its inverse; pseudo-inverses where singular."""
    values, vectors = _eigen(second)
    root, inverse_root = _power(values, vectors, 0.5), _power(values, vectors, -0.5)
    values, vectors = _eigen(root @ first @ root)
    forward = root @ _power(values, vectors, -0.5) @ root
    return forward, inverse_root @ _power(values, vectors, 0.5) @ inverse_root


def _eigen(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.where(values > NEGLIGIBLE * values[-1], values, 0), vectors


def _power(values: np.ndarray, vectors: np.ndarray, exponent: float) -> np.ndarray:
    powers = np.zeros_like(values)
    powers[values > 0] = values[values > 0] ** exponent
    return (vectors * powers) @ vectors.T


def _quadratic(rows: Rows, mean: np.ndarray, slope: np.ndarray, map_: np.ndarray) -> Float64[np.ndarray, "n"]:
    form = np.eye(len(mean)) - map_
    found = []
    for chunk in chunks(*rows):
        chunk -= mean
        found.append(chunk @ slope + ((chunk @ form) * chunk).sum(axis=1))
    values = np.concatenate(found)
    return values - values.mean()
