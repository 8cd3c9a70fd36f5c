"""A report seen as the page needs it: by candidate, by measure, by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qdiff.evaluation.page.measures import measure_of, order_of
from qdiff.evaluation.report import Record, Report

NAMED = 5  # prompts of pictures that were left out; the report's JSON has all


@dataclass(frozen=True)
class Sheet:
    """A report's records by candidate. Records without a "candidate" tag are of the report as a whole."""

    report: Report

    @cached_property
    def reference(self) -> str:
        """The name of what the candidates are compared with."""
        return str(self.report.settings.get("reference", "reference"))

    @cached_property
    def candidates(self) -> list[str]:
        """The names of the candidates, in the order of the report; without the reference's."""
        names = [record.tags["candidate"] for record in self.report.records if "candidate" in record.tags]
        return [name for name in dict.fromkeys(names) if name != self.reference]

    @cached_property
    def columns(self) -> list[str]:
        """The candidates, after the reference where it has figures of its own."""
        return [self.reference, *self.candidates] if self._by_candidate.get(self.reference) else list(self.candidates)

    @cached_property
    def names(self) -> list[str]:
        """The names of the records of candidates as wholes, in the order of the page."""
        return sorted({name for records in self._by_candidate.values() for name in records}, key=order_of)

    def record(self, name: str, candidate: str) -> Record | None:
        """Return the candidate's figure over all pictures; None where it was not measured."""
        return self._by_candidate.get(candidate, {}).get(name)

    def groups(self, name: str) -> dict[str, dict[str, Record]]:
        """Return the records of a measure by group and candidate; empty where there are no groups."""
        found: dict[str, dict[str, Record]] = {}
        for record in self.report.records:
            if record.name == name and "group" in record.tags and "candidate" in record.tags:
                found.setdefault(record.tags["group"], {})[record.tags["candidate"]] = record
        return found

    @cached_property
    def grouped_names(self) -> list[str]:
        """The names of the records that groups have, in the order of the page."""
        return sorted({record.name for record in self.report.records if "group" in record.tags}, key=order_of)

    def pairs(self, candidate: str) -> list[Mapping[str, Any]]:
        """Return the candidate's pairs of pictures, the least like the reference first."""
        pairs = [pair for pair in self.report.pairs if pair["candidate"] == candidate]
        return sorted(pairs, key=lambda pair: float(pair["psnr_db"]))

    @cached_property
    def pictures(self) -> int:
        """How many pictures the largest set has; 0 where the report does not say."""
        counts = self.report.settings.get("pictures", 0)
        return int(max(counts.values(), default=0) if isinstance(counts, Mapping) else counts)

    @cached_property
    def gaps(self) -> list[str]:
        """What is not in the figures, in sentences: measures that were not taken, pictures that were left out."""
        settings = self.report.settings
        missing: dict[tuple[str, str], list[str]] = {}
        for name, why in settings.get("not_measured", {}).items():
            measure, _, source = name.partition("/")
            missing.setdefault((measure_of(measure).title, why), []).append(source)
        sentences = []
        for (title, why), sources in missing.items():
            whose = f" ({', '.join(sources)})" if any(sources) else ""
            sentences.append(f"{title}{whose}: not measured, {why}.")
        for source, flaws in settings.get("left_out", {}).items():
            for flaw, prompts in flaws.items():
                named = "; ".join(prompts[:NAMED]) + ("; ..." if len(prompts) > NAMED else "")
                sentences.append(f"{source}: {len(prompts)} {flaw}, left out of every measure: {named}.")
        return sentences

    @cached_property
    def _by_candidate(self) -> dict[str, dict[str, Record]]:
        found: dict[str, dict[str, Record]] = {}
        for record in self.report.records:
            if "candidate" in record.tags and "group" not in record.tags:
                found.setdefault(record.tags["candidate"], {})[record.name] = record
        return found
