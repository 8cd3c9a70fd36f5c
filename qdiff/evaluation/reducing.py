"""From rows on disk to records: all rows in the order of the items, so that who made them does not matter."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdiff.evaluation.disk import writing_to
from qdiff.evaluation.entries import Entry
from qdiff.evaluation.fingerprint import short_hash
from qdiff.evaluation.measuring import FLAWS, flaw_folder, row_folder, row_key
from qdiff.evaluation.metrics.finite import finite_rows
from qdiff.evaluation.metrics.statistics import Statistics
from qdiff.evaluation.report import Record
from qdiff.evaluation.rows import Rows, read_rows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32, Int

    from qdiff.evaluation.metrics.contract import Metric


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
        with _ordered(places, [entry.key for entry in entries], out) as rows:
            flaws = np.array(rows[:, 0], dtype=np.int64)
        return cls(source_id, entries, flaws)

    @property
    def key(self) -> str:
        """Changes with the pictures that are in the set."""
        return short_hash(sorted(entry.key for entry in self.entries))

    @property
    def sound(self) -> Bool[np.ndarray, "n"]:
        return self.flaws == 0

    def flawed(self) -> dict[str, list[str]]:
        """The names of the pictures with each flaw, by what they were asked to show."""
        return {
            flaw: [self.entries[index].item.subject for index in np.flatnonzero(self.flaws == number).tolist()]
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
        places = np.flatnonzero(which)
        with self._rows(metric, candidate, places) as rows, self._others(metric, places) as others:
            records = metric.reduce(rows, others, tags)
        groups = np.array([candidate.entries[place].item.group or "" for place in places.tolist()])
        if metric.splits_by_group and groups.any() and (self.paired or not metric.compares_sets):
            # Group after group: each is then a part of the file, and takes no memory of its own.
            order = np.argsort(groups, kind="stable")
            with self._rows(metric, candidate, places[order]) as rows, self._same(metric, places[order]) as others:
                records += group_records(metric, rows, [group or None for group in groups[order]], others, tags)
        return records

    @contextmanager
    def _others(
        self, metric: Metric, places: Int[np.ndarray, "k"]
    ) -> Iterator[Float32[np.ndarray, "m d"] | Statistics | None]:
        """What a set of rows is compared with: the reference's pictures of the same items, or all of them."""
        if not metric.compares_sets:
            yield None
        elif not isinstance(self.reference, PictureSet):
            yield self.reference
        else:
            whole = places if self.paired else np.flatnonzero(self.reference.sound)
            with self._rows(metric, self.reference, whole) as rows:
                yield rows

    @contextmanager
    def _same(self, metric: Metric, places: Int[np.ndarray, "k"]) -> Iterator[Float32[np.ndarray, "k d"] | None]:
        """The reference's own rows of the same items; None where the metric's rows are of pairs, or there is none."""
        if metric.needs_reference or not self.paired or not isinstance(self.reference, PictureSet):
            yield None
        else:
            with self._rows(metric, self.reference, places) as rows:
                yield rows

    def save_statistics(self, metric: Metric) -> Path:
        """Write the statistics of the reference's pictures, unless they are there, and return their file.

        They serve as a reference themselves, where the pictures are not at hand.
        """
        assert isinstance(self.reference, PictureSet)
        name = f"{metric.feature_key.replace('/', '_')}-{self.reference.key}.npz"
        path = self.out / "statistics" / name
        if not path.is_file():
            with self._rows(metric, self.reference, np.flatnonzero(self.reference.sound)) as rows:
                Statistics.of_rows(rows, metric.feature_key, metric.provenance(), finite_rows(rows)).save(path)
        return path

    def pair_values(self, metric: Metric, candidate: PictureSet) -> dict[int, float]:
        """Return a paired metric's figure of each sound pair, by the item's place."""
        assert isinstance(self.reference, PictureSet)
        places = np.flatnonzero(candidate.sound & self.reference.sound)
        with self._rows(metric, candidate, places) as rows:
            return dict(zip(places.tolist(), rows[:, 0].tolist()))

    @contextmanager
    def _rows(
        self, metric: Metric, pictures: PictureSet, places: Int[np.ndarray, "k"]
    ) -> Iterator[Float32[np.ndarray, "k d"]]:
        reference = self.reference if isinstance(self.reference, PictureSet) else None
        reference_id = None if reference is None else reference.source_id
        found = read_rows(row_folder(self.out, metric, pictures.source_id, reference_id))
        keys = []
        for index in places.tolist():
            pair = reference.entries[index] if metric.needs_reference and reference is not None else None
            keys.append(row_key(metric, pictures.entries[index], pair))
        if missing := [key for key in keys if key not in found.places]:
            raise FileNotFoundError(
                f"{metric.name}: {len(missing)} of {len(keys)} pictures were not measured: a process was killed, or "
                "does not share this disk; run the same command again, it goes on where it was"
            )
        with _ordered(found, keys, self.out) as rows:
            yield rows


@contextmanager
def _ordered(rows: Rows, keys: Sequence[str], out: Path) -> Iterator[Float32[np.ndarray, "n d"]]:
    """Rows in their order, in a file of their own: 50,000 rows of 2,048 numbers are 400 MB.

    The file has no name, so that no kill leaves it behind, and is where the user expects large files.
    """
    with ExitStack() as stack:
        with writing_to(out):
            file = stack.enter_context(tempfile.TemporaryFile(dir=out))
            ordered = rows.ordered(keys, file)
        yield ordered
