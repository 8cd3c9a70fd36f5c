"""Mean and covariance of features: of rows in bounded memory, and kept in a file as a reference."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdiff.evaluation.metrics.finite import ROWS_AT_ONCE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Float64

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Statistics:
    """What a Gaussian fit knows of a set of pictures.

    n: how many pictures.  mean, covariance: of their features (divided by n - 1).  feature_key: of the extractor with
    its weights and resize mode: only features of the same key may be compared.
    """

    n: int
    mean: Float64[np.ndarray, "d"]
    covariance: Float64[np.ndarray, "d d"]
    feature_key: str
    provenance: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_rows(
        cls,
        rows: Float32[np.ndarray, "n d"],
        feature_key: str,
        provenance: Mapping[str, str] | None = None,
        kept: Bool[np.ndarray, "n"] | None = None,
    ) -> Statistics:
        """Return the statistics of the rows that are kept (all, when None), in float64 and two passes.

        Raises:
            ValueError: fewer than two rows.
        """
        kept = np.ones(len(rows), dtype=bool) if kept is None else kept
        n = int(kept.sum())
        if n < 2:
            raise ValueError(f"statistics need two pictures or more: got {n} with finite features")
        mean = sum((chunk.sum(axis=0) for chunk in chunks(rows, kept)), np.zeros(rows.shape[1])) / n
        covariance = np.zeros((rows.shape[1], rows.shape[1]))
        for chunk in chunks(rows, kept):
            chunk -= mean
            covariance += chunk.T @ chunk
        return cls(n, mean, covariance / (n - 1), feature_key, dict(provenance or {}))

    def require(self, feature_key: str, used_by: str) -> None:
        """Raise `ValueError` unless these are statistics of features with this key."""
        if self.feature_key != feature_key:
            raise ValueError(
                f"{used_by} compares features {feature_key!r}: the reference statistics are of {self.feature_key!r}; "
                f"make them with the same network, weights and resize mode"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an .npz file, making its folder, and return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"version": FORMAT_VERSION, "n": self.n, "feature_key": self.feature_key}
        text = json.dumps(about | {"provenance": dict(self.provenance)})
        with path.open("wb") as stream:  # a name without .npz stays as it is
            np.savez(stream, mean=self.mean, covariance=self.covariance, about=np.array(text))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds no such statistics, or of a version that is not known.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                about, mean, covariance = json.loads(str(data["about"])), data["mean"], data["covariance"]
        except (KeyError, ValueError, EOFError) as error:
            raise ValueError(f"{path} holds no feature statistics that qdiff saved: {error}") from error
        if about.get("version") != FORMAT_VERSION:
            raise ValueError(f"{path} must be of version {FORMAT_VERSION}: got {about.get('version')}; update qdiff")
        return cls(int(about["n"]), mean, covariance, about["feature_key"], about["provenance"])


def chunks(rows: Float32[np.ndarray, "n d"], kept: Bool[np.ndarray, "n"]) -> Iterator[Float64[np.ndarray, "c d"]]:
    """Yield the rows that are kept, some thousands at a time, in order, as float64 copies."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        yield rows[part][kept[part]].astype(np.float64)
