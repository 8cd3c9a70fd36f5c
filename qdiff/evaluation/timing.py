"""Times on a device: on a GPU by its own events, so that what the host does meanwhile is not in them."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class Marks:
    """Points in a device's work; the seconds between them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds from each mark to the next; waits until the device has passed the last."""
        pairs = zip(self._marks, self._marks[1:])
        if self.device.type != "cuda":
            return [after - before for before, after in pairs]
        if self._marks:
            self._marks[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


@contextmanager
def step_marks(scheduler: Any, device: torch.device) -> Iterator[Marks]:
    """Mark every return of `scheduler.step` while the context is open: what lies between two is one denoising step."""
    marks, step = Marks(device), scheduler.step

    @functools.wraps(step)  # pipelines look at the signature of `step`
    def marked(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        marks.mark()
        return result

    scheduler.step = marked
    try:
        yield marks
    finally:
        del scheduler.step


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_and_range(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the smallest and the largest."""
    ordered = sorted(samples)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return median, ordered[0], ordered[-1]
