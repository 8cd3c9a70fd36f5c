"""From pictures to rows of numbers on disk, one row a picture and metric; what is there already is left alone."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qdiff.evaluation.entries import Entry
from qdiff.evaluation.generation import Drawn
from qdiff.evaluation.pictures import BLACK, NAN, PictureStore, read_picture
from qdiff.evaluation.rows import RowWriter, read_rows

if TYPE_CHECKING:
    from torch import Tensor

    from qdiff.evaluation.metrics.contract import Metric

FLAWS = ("", NAN, BLACK)  # by their number in the rows of flaws
FLAW_ROWS = "flaw"
# Packing and unpacking a picture of 512 x 512 takes a core up to 0.1 s, longer than a GPU may need to draw it.
THREADS = max(1, min(8, (os.cpu_count() or 1) - 1))


@dataclass(frozen=True)
class Job:
    """A batch of one source. drawn: its pictures where they are new; otherwise they are read from their files."""

    entries: Sequence[Entry]
    references: Sequence[Entry] | None
    drawn: Drawn | None = None


def row_folder(out: Path, metric: Metric, source_id: str, reference_id: str | None) -> Path:
    """Return where the rows of a metric on a source are; of a paired one, on a source against a reference."""
    pair = f"{source_id}-vs-{reference_id}" if metric.needs_reference else source_id
    return out / "rows" / metric.feature_key.replace("/", "_") / pair


def flaw_folder(out: Path, source_id: str) -> Path:
    return out / "rows" / FLAW_ROWS / source_id


def row_key(metric: Metric, entry: Entry, reference: Entry | None) -> str:
    return f"{entry.key}-{reference.key}" if metric.needs_reference and reference is not None else entry.key


class Measurement:
    """Writes the pictures and the rows of one source, by one process."""

    def __init__(
        self, metrics: Sequence[Metric], out: Path, source_id: str, reference_id: str | None, process: int = 0
    ) -> None:
        self.metrics = list({metric.feature_key: metric for metric in reversed(metrics)}.values())
        folders = {m.feature_key: row_folder(out, m, source_id, reference_id) for m in self.metrics}
        folders[FLAW_ROWS] = flaw_folder(out, source_id)
        self.have = {name: set(read_rows(folder).places) for name, folder in folders.items()}
        self.writers = {name: RowWriter(folder, process) for name, folder in folders.items()}
        self.stack = contextlib.ExitStack()
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="qdiff-pictures")

    def __enter__(self) -> Measurement:
        self.stack.enter_context(self.threads)
        for writer in self.writers.values():
            self.stack.enter_context(writer)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def is_measured(self, entry: Entry, reference: Entry | None) -> bool:
        """Whether every row of the picture is there; of a flawed one this cannot be, so it is looked at again."""
        return entry.key in self.have[FLAW_ROWS] and all(
            row_key(metric, entry, reference) in self.have[metric.feature_key] for metric in self.metrics
        )

    @torch.inference_mode()
    def measure(self, job: Job) -> None:
        """Write what is missing of a batch.

        Raises:
            ValueError: a picture that cannot be read, or a pair of different sizes.
            OSError: a file cannot be written.
        """
        pictures, flaws = self._pictures(job)
        sound = [index for index, flaw in enumerate(flaws) if not flaw]
        references = None
        if job.references is not None and any(metric.needs_reference for metric in self.metrics):
            read = list(self.threads.map(read_picture, [entry.path for entry in job.references]))
            references = [picture.pixels for picture in read]
            pairs = [index for index in sound if not read[index].flaw]
        for metric in self.metrics:
            usable = pairs if metric.needs_reference else sound
            self._rows(metric, job, pictures, references if metric.needs_reference else None, usable)
        # Last: a picture whose flaw is known has all its rows.
        keys = [entry.key for entry in job.entries]
        new = [index for index, key in enumerate(keys) if key not in self.have[FLAW_ROWS]]
        if new:
            numbers = np.array([[FLAWS.index(flaws[index])] for index in new], dtype=np.float32)
            self.writers[FLAW_ROWS].append([keys[index] for index in new], numbers)

    def _pictures(self, job: Job) -> tuple[list[Tensor], list[str]]:
        if job.drawn is None:
            read = list(self.threads.map(read_picture, [entry.path for entry in job.entries]))
            return [picture.pixels for picture in read], [picture.flaw or "" for picture in read]
        finite = job.drawn.finite.tolist()
        list(self.threads.map(_write, job.entries, job.drawn.pictures, finite))
        flaws = [
            NAN if not sound else BLACK if int(pixels.max()) == 0 else ""
            for pixels, sound in zip(job.drawn.pictures, finite)
        ]
        return list(job.drawn.pictures), flaws

    def _rows(
        self,
        metric: Metric,
        job: Job,
        pictures: Sequence[Tensor],
        references: Sequence[Tensor] | None,
        usable: Sequence[int],
    ) -> None:
        keys = [
            row_key(metric, entry, None if job.references is None else job.references[index])
            for index, entry in enumerate(job.entries)
        ]
        missing = [index for index in usable if keys[index] not in self.have[metric.feature_key]]
        for indices in _runs_of_one_size(missing, pictures):
            pixels = torch.stack([pictures[index] for index in indices])
            other = None if references is None else _paired(job, pixels, references, indices)
            prompts = [str(job.entries[index].item.prompt) for index in indices]
            rows = metric.rows(pixels, other, prompts).float().cpu().numpy()
            self.writers[metric.feature_key].append([keys[index] for index in indices], rows)


def _write(entry: Entry, pixels: Tensor, finite: bool) -> None:
    PictureStore(entry.path.parent).write(entry.key, pixels, finite=finite)


def _runs_of_one_size(indices: Sequence[int], pictures: Sequence[Tensor]) -> Iterator[list[int]]:
    for _, run in itertools.groupby(indices, key=lambda index: pictures[index].shape):
        yield list(run)


def _paired(job: Job, pixels: Tensor, references: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    for index in indices:
        if references[index].shape != pixels.shape[1:]:
            assert job.references is not None
            (_, high, wide), (_, reference_high, reference_wide) = pixels.shape[1:], references[index].shape
            raise ValueError(
                f"pairs must have one size: {job.entries[index].path} is {wide}x{high}, "
                f"{job.references[index].path} is {reference_wide}x{reference_high}; draw both at the same size"
            )
    return torch.stack([references[index] for index in indices])
