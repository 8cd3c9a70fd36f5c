"""Units over processes: one that dies takes its own unit with it and nothing else."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from board.measure import Bench, Settings, Unit

Outcome = dict[str, Any]  # a unit's figures, or {"failed": why}


class Worker:
    """A process that measures the units it is sent, one after the other."""

    def __init__(self, settings: Settings, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=work, args=(theirs, settings, threads), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.unit: Unit | None = None

    def start(self, unit: Unit) -> None:
        self.unit = unit
        self.pipe.send(unit)

    def outcome(self) -> Outcome:
        try:
            found: Outcome = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return {"failed": f"its process ended with exit code {self.process.exitcode}"}
        return found

    def stop(self) -> None:
        self.pipe.close()  # an idle process ends by itself; a busy one has run out of time
        if self.unit is None:
            self.process.join(timeout=20)
        self.process.terminate()
        self.process.join()


def work(pipe: Connection, settings: Settings, threads: int) -> None:
    """What a process runs until the other end is closed."""
    torch.set_num_threads(threads)
    bench = Bench(settings)
    while True:
        try:
            unit = pipe.recv()
        except EOFError:
            return
        pipe.send(outcome_of(bench, unit))


def outcome_of(bench: Bench, unit: Unit) -> Outcome:
    """A row that fails is a row that says why; the others go on."""
    started = time.perf_counter()
    try:
        found = bench.measure(unit)
    except Exception as error:  # noqa: BLE001  # whatever a method or a peer raises is its own row's outcome
        first = (str(error).strip() or "no message").splitlines()[0]
        found = {"failed": f"{type(error).__name__}: {first}"[:300]}
    return found | {"seconds": time.perf_counter() - started}


def run_all(
    units: Sequence[Unit],
    settings: Settings,
    jobs: int,
    threads: int,
    deadline: float,
    report: Callable[[Unit, Outcome], None],
) -> int:
    """Measure the units in order, `jobs` at a time; report each as it ends. Returns how many the time left undone."""
    waiting = list(reversed(units))
    workers = [Worker(settings, threads) for _ in range(min(jobs, len(units)))]
    try:
        while True:
            for index, worker in enumerate(workers):
                if worker.unit is None and waiting and time.monotonic() < deadline:
                    if not worker.process.is_alive():
                        workers[index] = worker = Worker(settings, threads)
                    worker.start(waiting.pop())
            busy = {worker.pipe: worker for worker in workers if worker.unit is not None}
            ready = wait(list(busy), timeout=max(0.0, deadline - time.monotonic())) if busy else []
            if not ready:  # all done, or out of time
                return len(waiting) + len(busy)
            for pipe in ready:
                worker = busy[pipe]  # type: ignore[index]  # `wait` takes other things than pipes too
                unit, worker.unit = worker.unit, None
                assert unit is not None
                report(unit, worker.outcome())
    finally:
        for worker in workers:
            worker.stop()
