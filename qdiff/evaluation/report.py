"""Measurements as flat records that say where they come from, in JSON and back.

`report.json` is one object, version 2:

    version       2
    title         text
    records       a list, one object a figure:
        name        what was measured, with its unit where it has one: "psnr_db", "fid", "peak_memory_bytes"
        value       a number, or "inf" or "-inf"
        low, high   its 95 % interval; both equal the value where nothing varies
        n           the number of samples behind the value
        tags        texts by name, what it was measured on: "candidate", "group", ...
        provenance  texts by name, what it was measured with: "package", "backbone", "weights_sha256", "resize",
                    "interval", "warning", ...; {} for what needs none
    settings      what a reader needs to measure the same again
    series        named curves: lists of numbers
    tables        named tables: {"rows": names, "columns": numbers, "values": a list of numbers a row}
    pairs         pictures to show: {"key", "prompt", "group", "candidate", "reference_png", "candidate_png", "psnr_db"}
    environment   versions of packages, kind of machine

Version 1 had no provenance, tables and pairs; it is read as having none.
"""

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
from typing import TYPE_CHECKING, Any

import numpy as np

from qdiff.evaluation.bootstrap import mean_interval, shifted_interval

if TYPE_CHECKING:
    from jaxtyping import Float64

REPORT_FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
PACKAGES = ("diffusers-qdiff", "torch", "diffusers", "transformers", "torchmetrics", "numpy")


@dataclass(frozen=True)
class Record:
    """One measured value.

    name: what was measured, with its unit where it has one ("psnr_db").  low, high: a 95 % interval, or the value
    itself for what does not vary.  n: how many samples the value is the mean of.  tags: what it was measured on
    (model, recipe, candidate).  provenance: what it was measured with (package, backbone, weights, resize mode).
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)

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
        low, high = mean_interval(values)
        return cls(name, float(values.mean()), low, high, values.size, tags)

    @classmethod
    def smooth(cls, name: str, value: float, *influences: Float64[np.ndarray, "n"], **tags: str) -> Record:
        """A smooth statistic of samples with the interval of `bootstrap.shifted_interval`; n is that of the first set.

        influences: of each sample on the statistic, one array for each independent set of samples.
        """
        low, high = shifted_interval(value, *influences)
        return cls(name, float(value), low, high, influences[0].size, tags)

    def sourced(self, provenance: Mapping[str, str]) -> Record:
        """This record with these entries added to its provenance."""
        return dataclasses.replace(self, provenance={**self.provenance, **provenance})


@dataclass(frozen=True)
class Report:
    """Records, the settings and the environment they were measured with.

    settings: what a reader needs to measure the same again.  series: named curves, such as an error at each step.
    tables: by name, {"rows": names, "columns": numbers, "values": a list of floats a row}, such as an error of each
    layer at each timestep.  pairs: pictures to show, each {"key", "prompt", "group", "candidate", "reference_png",
    "candidate_png" (paths from the report's folder), "psnr_db"}.
    """

    title: str
    records: tuple[Record, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    series: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    pairs: Sequence[Mapping[str, Any]] = ()
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
            ValueError: the text is no report, or of a version that is not known.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.pop("version", None) not in READABLE_VERSIONS:
            raise ValueError(f"a report must be a JSON object of version 1 to {REPORT_FORMAT_VERSION}; update qdiff")
        data["records"] = tuple(_record(item) for item in data["records"])
        data["series"] = {name: [float(value) for value in values] for name, values in data["series"].items()}
        data["tables"] = {name: _table(table) for name, table in data.get("tables", {}).items()}
        data["pairs"] = tuple({key: _number(value) for key, value in pair.items()} for pair in data.get("pairs", ()))
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
    value, low, high = (float(data[key]) for key in ("value", "low", "high"))
    provenance = dict(data.get("provenance", {}))
    return Record(data["name"], value, low, high, int(data["n"]), dict(data["tags"]), provenance)


def _table(data: Mapping[str, Any]) -> dict[str, Any]:
    return {**data, "values": [[float(value) for value in row] for row in data["values"]]}


def _number(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf") else value


def _plain(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
