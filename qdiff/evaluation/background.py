"""Work that goes on beside the main thread, on at most a few jobs at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Background(Generic[Job]):
    """Does `work` on every job, in order, in one thread; leaving the `with` block waits for all of them.

    depth: jobs that may wait; `put` blocks while there are as many, which bounds the memory.

    It should be the case that an error of `work` is raised, itself, by the next `put` or at the end of the block, and
    that no job is done after it. When the block is left by an error, waiting jobs are dropped.
    """

    def __init__(self, work: Callable[[Job], None], depth: int = 4) -> None:
        self._work = work
        self._jobs: queue.Queue[Job | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="qdiff-background", daemon=True)

    def put(self, job: Job) -> None:
        """Hand over a job; raises what an earlier one raised."""
        self._raise()
        self._jobs.put(job)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is None:  # after an error the queue is only emptied, so that `put` does not block for ever
                try:
                    self._work(job)
                except BaseException as error:  # noqa: BLE001  # raised in the thread that can do something about it
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Background[Job]:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and self._error is None:
            self._error = error
        self._jobs.put(None)
        self._thread.join()
        if error is None:
            self._raise()
