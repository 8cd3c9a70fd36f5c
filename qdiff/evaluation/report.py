"""Measurements as flat records that say where they come from, in JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

REPORT_FORMAT_VERSION = 1
# 2,000 resamples: the ends of a 95 % interval then move by less than 2 % of its width from seed to seed.
BOOTSTRAP_RESAMPLES = 2000
PACKAGES = ("diffusers-qdiff", "torch", "diffusers", "transformers", "torchmetrics", "numpy")


@dataclass(frozen=True)
class Record:
    """One measured value.

    name: what was measured, with its unit where it has one ("psnr_db").  low, high: a 95 % interval, or the value
    itself for what does not vary.  n: how many samples the value is the mean of.  tags: what it was measured on
    (model, recipe).
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def exact(cls, name: str, value: float, **tags: str) -> Record:
        """A value that does not vary from sample to sample, as a count of bytes."""
        return cls(name, float(value), float(value), float(value), 1, tags)

    @classmethod
    def mean(cls, name: str, samples: Iterable[float], **tags: str) -> Record:
        """The mean of `samples` with its 95 % percentile-bootstrap interval (Efron 1979), the same every time.

        Infinite samples (the PSNR of identical pictures) make the mean infinite, and both ends of the interval.

        Raises:
            ValueError: no sample, or one that is NaN.
        """
        values = np.asarray([float(sample) for sample in samples], dtype=np.float64)
        if values.size == 0 or np.isnan(values).any():
            raise ValueError(f"samples of {name!r} must be one number or more, none NaN: got {values.tolist()}")
        if np.isinf(values).any():
            return cls(name, float(values.mean()), float(values.mean()), float(values.mean()), values.size, tags)
        draws = np.random.default_rng(0).integers(0, values.size, size=(BOOTSTRAP_RESAMPLES, values.size))
        low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
        return cls(name, float(values.mean()), float(low), float(high), values.size, tags)


@dataclass(frozen=True)
class Report:
    """Records, the settings and the environment they were measured with.

    settings: what a reader needs to measure the same again.  series: named curves, such as an error at each step.
    """

    title: str
    records: tuple[Record, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    series: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: environment())

    def find(self, name: str, **tags: str) -> Record:
        """Return the one record with this name and (at least) these tags.

        Raises:
            KeyError: there is none, or more than one.
        """
        found = [r for r in self.records if r.name == name and tags.items() <= r.tags.items()]
        if len(found) != 1:
            raise KeyError(f"one record named {name!r} with tags {tags} was expected: found {len(found)}")
        return found[0]

    def to_json(self) -> str:
        """Law: `Report.from_json(report.to_json()) == report`. Infinity becomes the string "inf"."""
        data = {"version": REPORT_FORMAT_VERSION} | dataclasses.asdict(self)
        return json.dumps(_plain(data), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Return the report of a JSON text.

        Raises:
            ValueError: the text is no report, or of another version.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("version", None) != REPORT_FORMAT_VERSION:
            raise ValueError(f"a report must be a JSON object of version {REPORT_FORMAT_VERSION}; update qdiff")
        data["records"] = tuple(_record(item) for item in data["records"])
        data["series"] = {name: [float(value) for value in values] for name, values in data["series"].items()}
        return cls(**data)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON to `path`, making its folder, and return it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        return path


def environment() -> dict[str, str]:
    """Return the versions and the kind of machine that a figure depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _record(data: Mapping[str, Any]) -> Record:
    numbers = {key: float(data[key]) for key in ("value", "low", "high")}
    return Record(name=data["name"], n=int(data["n"]), tags=dict(data["tags"]), **numbers)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
