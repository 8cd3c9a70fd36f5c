"""The report of an evaluation: from the rows that all processes left on disk, and from what one process measures."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.evaluation.costing import Costs, costs_of_folder, measure_costs
from qdiff.evaluation.drawing import free
from qdiff.evaluation.drift import Drift, measure_drift
from qdiff.evaluation.flops import Ceilings
from qdiff.evaluation.generation import Generation
from qdiff.evaluation.metrics.frechet import FrechetDistance
from qdiff.evaluation.plan import REFERENCE, Plan
from qdiff.evaluation.processes import Processes
from qdiff.evaluation.prompts import Item
from qdiff.evaluation.reducing import PictureSet, Reduction
from qdiff.evaluation.report import Record, Report
from qdiff.evaluation.shown_pairs import shown_pairs
from qdiff.evaluation.sources import PipelineSource

if TYPE_CHECKING:
    from qdiff.evaluation.metrics.contract import Metric

PSNR = "psnr"


@dataclasses.dataclass
class Assembly:
    """Gathers the parts of a report; `report` is called once, when every process is done."""

    plan: Plan
    metrics: Sequence[Metric]
    generation: Generation
    out: Path
    processes: Processes
    records: list[Record] = dataclasses.field(default_factory=list)
    series: dict[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    tables: dict[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    pairs: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    flawed: dict[str, Any] = dataclasses.field(default_factory=dict)
    statistics: dict[str, str] = dataclasses.field(default_factory=dict)
    not_measured: dict[str, str] = dataclasses.field(default_factory=dict)

    def report(self, costs: bool, drift: int, settings: Mapping[str, Any]) -> Report:
        """Return the report of everything."""
        self._add_quality()
        if drift:
            self._add_drift(drift)
        if costs:
            self._add_costs()
        about = {**dataclasses.asdict(self.generation), **settings, **self._about()}
        return Report("qdiff evaluate", tuple(self.records), about, self.series, self.tables, tuple(self.pairs))

    def _about(self) -> dict[str, Any]:
        sources = {
            name: {"id": source.id, "from": str(getattr(source, "folder", None) or "a pipeline in memory")}
            for name, source in self.plan.sources.items()
        }
        return {
            "reference": REFERENCE,
            "sources": sources,
            "pictures": {name: len(entries) for name, entries in self.plan.entries.items()},
            "device": str(self.processes.device.type),
            "processes": self.processes.num_processes,
            "left_out": self.flawed,
            "statistics": self.statistics,
            "not_measured": self.not_measured,
        }

    def _add_quality(self) -> None:
        sets = {
            name: PictureSet.read(self.out, source.id, self.plan.entries[name])
            for name, source in self.plan.sources.items()
        }
        reduction = Reduction(self.out, self.plan.statistics or sets.get(REFERENCE), self.plan.paired)
        for name, pictures in sets.items():
            tags = {"candidate": name}
            self.records += pictures.flaw_records(tags)
            if flawed := pictures.flawed():
                self.flawed[name] = flawed
                counts = ", ".join(f"{len(names)} {flaw}" for flaw, names in flawed.items())
                warnings.warn(
                    f"{name}: pictures left out of every metric: {counts} of {len(pictures.entries)}", stacklevel=4
                )
            for metric in self.metrics:
                if name != REFERENCE or not (metric.needs_reference or metric.compares_sets):
                    self.records += reduction.records(metric, pictures, tags)
                if metric.name == PSNR and name != REFERENCE:
                    values = reduction.pair_values(metric, pictures)
                    entries = self.plan.entries
                    self.pairs += shown_pairs(name, entries[name], entries[REFERENCE], values, self.out)

        if isinstance(reduction.reference, PictureSet) and not self.plan.paired:
            for metric in self.metrics:
                if isinstance(metric, FrechetDistance):
                    path = reduction.save_statistics(metric).relative_to(self.out)
                    self.statistics[metric.name] = path.as_posix()

    def _add_drift(self, pictures: int) -> None:
        reference = self.plan.sources.get(REFERENCE)
        candidates = [source for source in self.plan.candidates.values() if isinstance(source, PipelineSource)]
        if not isinstance(reference, PipelineSource) or not candidates:
            self.not_measured["drift"] = "needs a pipeline on both sides"
            return
        items = [entry.item for entry in self.plan.entries[REFERENCE][:pictures]]
        for source in candidates:
            try:
                self._add_drift_of(source.name, self._drift(reference, source, items))
            except ValueError as error:  # other steps or layers: pictures can be compared all the same
                self._leave_out(f"drift/{source.name}", error)
            free(source, self.processes.device)

    def _drift(self, reference: PipelineSource, candidate: PipelineSource, items: Sequence[Item]) -> Drift:
        device = self.processes.device
        return measure_drift(reference.load(device), candidate.load(device), items, self.generation)

    def _add_drift_of(self, name: str, found: Drift) -> None:
        self.series[f"drift/{name}"] = found.latents.mean(1).tolist()
        self.tables[f"layer-error/{name}"] = {
            "rows": list(found.layers.layers),
            "columns": list(found.timesteps),
            "values": found.layers.values.tolist(),
        }
        self.records.append(Record.mean("latent_relative_error", found.latents[-1].tolist(), candidate=name))
        self.records.append(Record.exact("denoiser_relative_error", found.layers.denoiser, candidate=name))

    def _add_costs(self) -> None:
        ceilings = Ceilings()
        for name, source in self.plan.sources.items():
            if not isinstance(source, PipelineSource):
                self.not_measured[f"cost/{name}"] = "a folder of pictures has no cost"
                continue
            entries = self.plan.entries[name]
            items = [entries[index % len(entries)].item for index in range(self.generation.batch_size)]
            try:
                costs = self._costs_of(source, items, ceilings)
            except RuntimeError as error:
                self._leave_out(f"cost/{name}", error)
                continue
            self.records += costs.records({"candidate": name})
            self.not_measured |= {f"{what}/{name}": why for what, why in costs.not_measured.items()}

    def _costs_of(self, source: PipelineSource, items: Sequence[Item], ceilings: Ceilings) -> Costs:
        device = self.processes.device
        if source.folder is not None:
            costs = costs_of_folder(source, items, self.generation, device)
        else:
            pipe = source.load(device)
            costs, device = measure_costs(pipe, items, self.generation), pipe.device
        costs.compare_with(ceilings, device)
        return costs

    def _leave_out(self, what: str, error: Exception) -> None:
        self.not_measured[what] = str(error)
        warnings.warn(f"{what} was not measured: {error}", stacklevel=4)
