"""Units over processes: one that dies takes its own unit with it and nothing else."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from board.measure import Bench
from board.units import Settings, Task, Unit, next_ready

Outcome = dict[str, Any]  # a unit's figures, or {"failed": why}


class Worker:
    """A process that measures the units it is sent, one after the other; the i-th has the i-th GPU, modulo all."""

    def __init__(self, settings: Settings, threads: int, index: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=work, args=(theirs, settings, threads, index), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.task: Task | None = None

    def start(self, task: Task) -> None:
        self.task = task
        self.pipe.send(task.unit)

    def outcome(self) -> Outcome:
        try:
            found: Outcome = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return {"failed": f"its process ended with exit code {self.process.exitcode}"}
        return found

    def stop(self) -> None:
        """At once: what it has not reported is lost, and half a file is never found under its name."""
        self.pipe.close()
        self.process.terminate()


def work(pipe: Connection, settings: Settings, threads: int, index: int) -> None:
    """What a process runs until the other end is closed."""
    torch.set_num_threads(threads)
    if settings.device == "cuda":
        torch.cuda.set_device(index % torch.cuda.device_count())
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
    tasks: Sequence[Task],
    settings: Settings,
    jobs: int,
    threads: int,
    deadline: float,
    report: Callable[[Unit, Outcome], None],
) -> int:
    """Do the tasks in order, `jobs` at a time; report each as it ends. Returns how many the time left undone.

    A task whose turn it is lets those behind it pass while it waits for a preparation.
    """
    waiting = list(tasks)
    unfinished = {task.key for task in tasks}
    workers: list[Worker] = []
    try:
        while time.monotonic() < deadline:
            for index in range(min(jobs, len(tasks))):
                if index < len(workers) and workers[index].task is not None:
                    continue
                task = next_ready(waiting, unfinished)
                if task is None:
                    break
                if index == len(workers):
                    workers.append(Worker(settings, threads, index))
                elif not workers[index].process.is_alive():
                    workers[index] = Worker(settings, threads, index)
                waiting.remove(task)
                workers[index].start(task)
            busy = {worker.pipe: worker for worker in workers if worker.task is not None}
            ready = wait(list(busy), timeout=max(0.0, deadline - time.monotonic())) if busy else []
            if not ready:  # all done, or out of time
                break
            for pipe in ready:
                worker = busy[pipe]  # type: ignore[index]  # `wait` takes other things than pipes too
                task, worker.task = worker.task, None
                assert task is not None
                unfinished.discard(task.key)
                report(task.unit, worker.outcome())
        return len(unfinished)
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.process.join()
