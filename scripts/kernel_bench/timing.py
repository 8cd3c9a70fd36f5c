"""Medians of calls on the GPU, competitors in turn.

Calls are captured in a CUDA graph, so that the time is the kernels' and not the launches'. A call gets the number of
one of several copies of its inputs, which are worked through in order: together they do not fit the L2 cache, as they
would not in a pass through a model.

A large GPU lowers its clocks some 20 ms after a load began that draws too much power. A turn is therefore one replay,
of two milliseconds: all competitors then run at the clocks that all of them together make, and none pays for, or gains
by, what the one before has drawn. Every round begins with another one.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ROUNDS = 15
# A replay is made as long as this: a launch, of some 5 us, is then lost in it.
REPLAY_US = 2000.0
# Twice the largest L2 of the GPUs that this is run on (H100: 50 MB, H200: 60 MB).
COLD_BYTES = 120e6
MOST_COPIES = 16

Call = Callable[[int], Any]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call (NaN: it failed), and what is to be said about it: an error, or "eager"."""

    us: float
    note: str = ""


@dataclass(frozen=True)
class _Run:
    replay: Callable[[], None]
    calls: int
    note: str


def copies_for(bytes_of_one: float, most: int = MOST_COPIES) -> int:
    """How many copies of a problem are larger than the L2 cache together."""
    return max(1, min(most, math.ceil(COLD_BYTES / bytes_of_one)))


def glance(call: Call, copies: int) -> float:
    """Microseconds of a call, roughly: one replay of one pass over the copies."""
    return _measure([_prepare(call, copies, lengthened=False)])[0]


def race(competitors: dict[str, Call], copies: int) -> dict[str, Timing]:
    """The median time of a call of each. One that raises is out, and its timing says why; a broken device raises."""
    torch.cuda.empty_cache()  # what the graphs of the race before held
    runs: dict[str, _Run] = {}
    timings: dict[str, Timing] = {}
    for name, call in competitors.items():
        try:
            runs[name] = _prepare(call, copies)
        except Exception as error:  # noqa: BLE001  a competitor's compiler, tuner or shape check
            torch.cuda.synchronize()  # raises where the error was the device's: nothing after it would be true
            timings[name] = Timing(math.nan, f"{type(error).__name__}: {error}".splitlines()[0])
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = deque(runs)
    for _ in range(ROUNDS if runs else 0):
        for name, us in zip(order, _measure([runs[name] for name in order]), strict=True):
            samples[name].append(us)
        order.rotate(-1)
    timings |= {name: Timing(statistics.median(samples[name]), run.note) for name, run in runs.items()}
    return timings


_stream: torch.cuda.Stream | None = None


def _side_stream() -> torch.cuda.Stream:
    # One for all: cuBLAS and the allocator keep memory for each stream.
    global _stream
    _stream = _stream or torch.cuda.Stream()
    return _stream


def _prepare(call: Call, copies: int, lengthened: bool = True) -> _Run:
    results: list[Any] = [None] * copies  # a copy's result lives until its next turn: results are cold memory too

    def run(passes: int) -> None:
        for _ in range(passes):
            for i in range(copies):
                results[i] = call(i)

    _side_stream().wait_stream(torch.cuda.current_stream())  # the inputs were made there
    with torch.cuda.stream(_side_stream()):
        run(1)  # compiles, tunes, allocates
    torch.cuda.synchronize()
    try:
        replay, note = _capture(lambda: run(1)).replay, ""
    except RuntimeError:
        torch.cuda.synchronize()
        replay, note = (lambda: run(1)), "eager"
    if not lengthened:
        return _Run(replay, copies, note)
    once = statistics.median(_measure([_Run(replay, 1, "")] * 3))
    passes = max(1, round(REPLAY_US / once))
    if passes > 1 and not note:
        replay = _capture(lambda: run(passes)).replay
    elif note:
        replay = lambda: run(passes)  # noqa: E731
    return _Run(replay, copies * passes, note)


def _capture(body: Callable[[], None]) -> torch.cuda.CUDAGraph:
    # torch.cuda.graph() empties the allocator's cache at each entry, which here would take most of the time.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_side_stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            body()
        finally:
            graph.capture_end()
    return graph


def _measure(runs: Sequence[_Run]) -> list[float]:
    """Microseconds of a call of each, one replay after the other."""
    runs = [runs[-1], *runs]  # queued back to back: only the first, which is thrown away, waits for the host
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
    for event, run in zip(events, runs, strict=False):
        event.record()
        run.replay()
    events[-1].record()
    events[-1].synchronize()
    times = [a.elapsed_time(b) * 1e3 / run.calls for run, (a, b) in zip(runs, itertools.pairwise(events), strict=True)]
    return times[1:]
