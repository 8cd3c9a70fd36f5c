"""From rows on disk to records: all rows in the order of the items, so that who made them does not matter."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdiff.evaluation.entries import Entry
from qdiff.evaluation.measuring import FLAWS, flaw_folder, row_folder, row_key
from qdiff.evaluation.report import Record
from qdiff.evaluation.rows import read_rows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Int

    from qdiff.evaluation.metrics.contract import Metric
    from qdiff.evaluation.metrics.statistics import Statistics


@dataclass(frozen=True)
class PictureSet:
    """The pictures of one source, in the order of the items, and the flaw of each (an index into `FLAWS`)."""

    source_id: str
    entries: Sequence[Entry]
    flaws: Int[np.ndarray, "n"]

    @classmethod
    def read(cls, out: Path, source_id: str, entries: Sequence[Entry]) -> PictureSet:
        """Raises `FileNotFoundError` where a picture was not made yet."""
        places = read_rows(flaw_folder(out, source_id))
        missing = [entry for entry in entries if entry.key not in places.places]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(entries)} pictures were not made (first: {missing[0].path}): a process was "
                "killed, or does not share this disk; run the same command again, it goes on where it was"
            )
        with _scratch() as path:
            flaws = np.array(places.ordered([entry.key for entry in entries], path)[:, 0], dtype=np.int64)
        return cls(source_id, entries, flaws)

    @property
    def sound(self) -> Bool[np.ndarray, "n"]:
        return self.flaws == 0

    def flawed(self) -> dict[str, list[str]]:
        """The names of the pictures with each flaw, by what they were asked to show."""
        return {
            flaw: [str(self.entries[index].item.prompt) for index in np.flatnonzero(self.flaws == number).tolist()]
            for number, flaw in enumerate(FLAWS)
            if flaw and (self.flaws == number).any()
        }

    def flaw_records(self, tags: Mapping[str, str]) -> list[Record]:
        count = len(self.entries)
        found = {flaw: float((self.flaws == number).sum()) for number, flaw in enumerate(FLAWS) if flaw}
        return [Record(f"pictures_{flaw}", value, value, value, count, tags) for flaw, value in found.items()]


@dataclass(frozen=True)
class Reduction:
    """Turns rows into records. reference: None where there is none.  paired: its items are the candidates' own."""

    out: Path
    reference: PictureSet | Statistics | None
    paired: bool

    def records(self, metric: Metric, candidate: PictureSet, tags: Mapping[str, str]) -> list[Record]:
        """Return the metric's records of a candidate, over all its pictures without a flaw, and by group.

        Of pairs, both must be without one: no black picture is averaged in, on either side.
        """
        from qdiff.evaluation.groups import group_records

        which = candidate.sound
        if self.paired and isinstance(self.reference, PictureSet):
            which = which & self.reference.sound
        if not which.any():
            raise ValueError(
                f"{metric.name}: every picture of {tags.get('candidate', 'the candidate')} is black or NaN"
            )
        items = [entry.item for entry, chosen in zip(candidate.entries, which) if chosen]
        groups = [item.group for item in items]
        grouped = metric.splits_by_group and any(groups)
        with self._rows(metric, candidate, which) as rows, self._others(metric, which, grouped) as others:
            records = metric.reduce(rows, others if metric.compares_sets else None, tags)
            if grouped and not (metric.compares_sets and not self.paired):
                same_items = others if self.paired and isinstance(others, np.ndarray) else None
                records += group_records(metric, rows, groups, same_items, tags)
            return records

    @contextmanager
    def _others(
        self, metric: Metric, which: Bool[np.ndarray, "n"], grouped: bool
    ) -> Iterator[Float32[np.ndarray, "m d"] | Statistics | None]:
        """What a candidate's rows are compared with: the whole reference, or its pictures of the same items."""
        if not isinstance(self.reference, PictureSet):
            yield self.reference
        elif metric.compares_sets or (grouped and self.paired and not metric.needs_reference):
            with self._rows(metric, self.reference, which if self.paired else self.reference.sound) as rows:
                yield rows
        else:
            yield None

    def pair_values(self, metric: Metric, candidate: PictureSet) -> dict[int, float]:
        """Return a paired metric's figure of each sound pair, by the item's place."""
        assert isinstance(self.reference, PictureSet)
        which = candidate.sound & self.reference.sound
        with self._rows(metric, candidate, which) as rows:
            return dict(zip(np.flatnonzero(which).tolist(), rows[:, 0].tolist()))

    @contextmanager
    def _rows(
        self, metric: Metric, pictures: PictureSet, which: Bool[np.ndarray, "n"]
    ) -> Iterator[Float32[np.ndarray, "m d"]]:
        reference = self.reference if isinstance(self.reference, PictureSet) else None
        reference_id = None if reference is None else reference.source_id
        found = read_rows(row_folder(self.out, metric, pictures.source_id, reference_id))
        keys = []
        for index in np.flatnonzero(which).tolist():
            pair = reference.entries[index] if metric.needs_reference and reference is not None else None
            keys.append(row_key(metric, pictures.entries[index], pair))
        if missing := [key for key in keys if key not in found.places]:
            raise FileNotFoundError(
                f"{metric.name}: {len(missing)} of {len(keys)} pictures were not measured: a process was killed, or "
                "does not share this disk; run the same command again, it goes on where it was"
            )
        with _scratch() as path:
            yield found.ordered(keys, path)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A file for rows in their order: on disk, since 50,000 rows of 2,048 numbers are 400 MB."""
    with tempfile.TemporaryDirectory(prefix="qdiff-rows-") as folder:
        yield Path(folder) / "rows.npy"
