"""Mean and covariance of features: of rows in bounded memory, and kept in a file as a reference."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdiff.evaluation.metrics.finite import ROWS_AT_ONCE
from qdiff.evaluation.pictures import written_whole
from qdiff.evaluation.weights import sha256_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Float64

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Statistics:
    """What a Gaussian fit knows of a set of pictures.

    n: how many pictures, 0 where that is not known.  mean, covariance: of their features (divided by n - 1).
    feature_key: of the extractor with its weights and resize mode: only features of the same key may be compared. ""
    for statistics that others published, which do not say it: then it is on trust, and the provenance says so.
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
        """Write an .npz file, whole or not at all, making its folder, and return its path."""
        path = Path(path)
        about = {"version": FORMAT_VERSION, "n": self.n, "feature_key": self.feature_key}
        text = json.dumps(about | {"provenance": dict(self.provenance)})
        with written_whole(path) as aside, aside.open("wb") as stream:  # a name without .npz stays as it is
            np.savez(stream, mean=self.mean, covariance=self.covariance, about=np.array(text))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote, or statistics of Inception as they are published.

        Those hold "mu" and "sigma": pytorch-fid, clean-fid and guided-diffusion write them.

        Raises:
            ValueError: the file holds no such statistics, or of a version that is not known.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                if {"mu", "sigma"} <= set(data.files):
                    return cls._published(Path(path), data["mu"], data["sigma"])
                about, mean, covariance = json.loads(str(data["about"])), data["mean"], data["covariance"]
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} holds no feature statistics that can be read: {error}") from error
        if about.get("version") != FORMAT_VERSION:
            raise ValueError(f"{path} must be of version {FORMAT_VERSION}: got {about.get('version')}; update qdiff")
        return cls(int(about["n"]), mean, covariance, about["feature_key"], about["provenance"])

    @classmethod
    def _published(cls, path: Path, mean: np.ndarray, covariance: np.ndarray) -> Statistics:
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"mu must be [d] and sigma [d, d]: got {mean.shape} and {covariance.shape}")
        about = f"{path.name}, sha256 {sha256_of(path)[:12]}; its network and resize mode are taken on trust"
        return cls(0, mean.astype(np.float64), covariance.astype(np.float64), "", {"reference": about})


def chunks(rows: Float32[np.ndarray, "n d"], kept: Bool[np.ndarray, "n"]) -> Iterator[Float64[np.ndarray, "c d"]]:
    """Yield the rows that are kept, some thousands at a time, in order, as float64 copies."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        yield rows[part][kept[part]].astype(np.float64)
