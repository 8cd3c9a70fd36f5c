"""Makes what is missing of one source, by one process: draws pictures while earlier ones are written and measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from tqdm.auto import tqdm

from qdiff.evaluation.background import Background
from qdiff.evaluation.entries import Entry
from qdiff.evaluation.generation import Generation, draw
from qdiff.evaluation.measuring import Job, Measurement
from qdiff.evaluation.sources import PipelineSource, Source

Pair = tuple[Entry, Entry | None]  # a picture and, where there is one, its reference


def draw_and_measure(
    source: Source,
    pairs: Sequence[Pair],
    measurement: Measurement,
    generation: Generation,
    device: torch.device,
    progress: bool,
) -> None:
    """Draw the pictures that are not there, and add every row that is missing.

    It should be the case that a process killed at any moment leaves nothing half done that a second call would not
    finish, and that the second call repeats only what was on its way.

    Raises:
        ValueError: the items do not fit the pipeline, or a picture cannot be read.
        OSError: something could not be written; what was is kept.
    """
    absent = [pair for pair in pairs if not pair[0].path.is_file()]
    present = [pair for pair in pairs if pair[0].path.is_file() and not measurement.is_measured(*pair)]
    bar = tqdm(total=len(pairs), desc=source.name, unit="picture", disable=not progress)
    with bar, measurement, Background(_on_own_stream(measurement.measure, device)) as background:
        bar.update(len(pairs) - len(absent) - len(present))
        for batch in _batches(present, generation.batch_size):
            background.put(_job(batch))
            bar.update(len(batch))
        if not absent:
            return
        if not isinstance(source, PipelineSource):
            raise ValueError(
                f"{absent[0][0].path}: expected a picture, as there was when this run began; put it back or leave its "
                f"prompt out"
            )
        pipe = source.load(device)
        for batch in _batches(absent, generation.batch_size):
            drawn = draw(pipe, [entry.item for entry, _ in batch], generation)
            job = _job(batch)
            background.put(Job(job.entries, job.references, drawn))
            bar.update(len(batch))


def free(source: Source, device: torch.device) -> None:
    """Give back the memory of a pipeline that was loaded from its folder, once nothing refers to it any more."""
    if isinstance(source, PipelineSource) and source.folder is not None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _job(batch: Sequence[Pair]) -> Job:
    references = [reference for _, reference in batch if reference is not None]
    return Job([entry for entry, _ in batch], references if len(references) == len(batch) else None)


def _batches(pairs: Sequence[Pair], size: int) -> Iterator[Sequence[Pair]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def _on_own_stream(work: Callable[[Job], None], device: torch.device) -> Callable[[Job], None]:
    """On a GPU the metrics' kernels go between the denoiser's and do not wait for them."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)

    def on_stream(job: Job) -> None:
        with torch.cuda.device(device), torch.cuda.stream(stream):  # both are a thread's own
            work(job)

    return on_stream
