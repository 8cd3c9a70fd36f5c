"""What is to be compared with what: sources, their pictures in order, and which of them are pairs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.evaluation.entries import Entry, check_names, entries_of
from qdiff.evaluation.generation import Generation
from qdiff.evaluation.metrics.frechet import FrechetDistance
from qdiff.evaluation.metrics.statistics import Statistics
from qdiff.evaluation.preconditions import check_pictures, check_requests
from qdiff.evaluation.prompts import Item, items_of, read_prompts
from qdiff.evaluation.sources import FolderSource, Source, source_of

if TYPE_CHECKING:
    from qdiff.evaluation.metrics.contract import Metric

REFERENCE = "reference"


@dataclass(frozen=True)
class Plan:
    """A comparison, with all of its input checked.

    entries: of each source, by its name, in the order of the items.  paired: picture i of every source is of item i.
    statistics: of a reference that is no pictures.
    """

    sources: Mapping[str, Source]
    entries: Mapping[str, Sequence[Entry]]
    paired: bool
    statistics: Statistics | None

    @property
    def candidates(self) -> dict[str, Source]:
        return {name: source for name, source in self.sources.items() if name != REFERENCE}

    def pairs(self, name: str) -> list[tuple[Entry, Entry | None]]:
        """Return a source's pictures, each with its reference where there are pairs."""
        if name == REFERENCE or not self.paired or REFERENCE not in self.entries:
            return [(entry, None) for entry in self.entries[name]]
        return list(zip(self.entries[name], self.entries[REFERENCE]))


def make_plan(
    reference: Any,
    candidates: Mapping[str, Any],
    prompts: str | os.PathLike[str] | Sequence[str | int | Item] | None,
    metrics: Sequence[Metric],
    generation: Generation,
    out: Path,
    device_type: str,
    dtype: str,
) -> Plan:
    """Check all input and return the plan; nothing is drawn.

    Raises:
        ValueError: no candidate, a name that is taken, metrics that the sources or prompts do not serve, prompts that
            are malformed or that a pipeline does not take, folders that cannot be paired, or pictures that are too few
            or too small for a metric, as far as that is known.
        OSError: a folder or a file cannot be read.
    """
    if not candidates or REFERENCE in candidates:
        raise ValueError(f"candidates must be one or more, none called {REFERENCE!r}: got {list(candidates)}")
    statistics = _statistics(reference)
    given = {} if statistics else {REFERENCE: reference}
    sources = {name: source_of(name, source, dtype) for name, source in {**given, **candidates}.items()}
    items = _items(prompts)
    needs_pairs = [metric.name for metric in metrics if metric.needs_reference]
    if needs_pairs and statistics:
        raise ValueError(f"{', '.join(needs_pairs)} compare picture with picture: the reference is saved statistics")
    if statistics:
        _check_statistics(metrics, statistics)
    _check_prompts(metrics, items)
    if items is not None:
        check_requests(sources, items, generation)
    folder = sources.get(REFERENCE)
    if items is None and needs_pairs and isinstance(folder, FolderSource):
        for source in sources.values():
            if isinstance(source, FolderSource):
                check_names(folder, source)
    # A folder that nothing is paired with is a set of pictures of its own, as large as it is.
    alone = isinstance(folder, FolderSource) and not needs_pairs
    where, pictures = (device_type, dtype), out / "pictures"
    entries = {
        name: entries_of(source, None if alone and name == REFERENCE else items, generation, where, pictures)
        for name, source in sources.items()
    }
    check_pictures(metrics, sources, entries, generation, REFERENCE)
    return Plan(sources, entries, paired=bool(needs_pairs) or (items is not None and not alone), statistics=statistics)


def _items(prompts: str | os.PathLike[str] | Sequence[str | int | Item] | None) -> tuple[Item, ...] | None:
    if prompts is None:
        return None
    return read_prompts(os.fspath(prompts)) if isinstance(prompts, str | os.PathLike) else items_of(prompts)


def _statistics(reference: Any) -> Statistics | None:
    if isinstance(reference, Statistics):
        return reference
    is_file = isinstance(reference, str | os.PathLike) and Path(reference).suffix == ".npz"
    return Statistics.load(Path(reference).expanduser()) if is_file else None


def _check_statistics(metrics: Sequence[Metric], statistics: Statistics) -> None:
    """Now, and not after everything is drawn."""
    for metric in metrics:
        if isinstance(metric, FrechetDistance):
            metric.check_statistics(statistics)
        elif metric.compares_sets:
            raise ValueError(f"{metric.name} compares single pictures: the reference is saved statistics of them")


def _check_prompts(metrics: Sequence[Metric], items: Sequence[Item] | None) -> None:
    needing = [metric.name for metric in metrics if metric.needs_prompts]
    if needing and (items is None or not all(isinstance(item.prompt, str) for item in items)):
        got = "no prompts" if items is None else "class labels"
        raise ValueError(f"{', '.join(needing)} compare pictures with their text: got {got}; leave these metrics out")
