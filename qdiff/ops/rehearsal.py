"""Rehearsals: calls that launch nothing, so that all the kernels they need are compiled at once and not one by one.

A denoiser needs some fifty kernels, of which a compiler makes two a second, and one after the other is reached. In a
rehearsal launches only say which kernel they are of; when it ends, all processors have compiled them.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from tqdm.auto import tqdm

from qdiff.ops import _settled

_MOST_THREADS = 16  # a matrix kernel takes the compiler up to 90 MB


class Loadable(Protocol):
    """A kernel on the device of this index. load: compiles it, unless an earlier process has."""

    device: int

    def load(self) -> object: ...


class _Thread(threading.local):
    """What a thread is in: a call that can be rehearsed, and a rehearsal with the kernels that it wants."""

    call: Callable[[], object] | None = None
    wanted: dict[Loadable, None] | None = None


_thread = _Thread()


def expect(call: Callable[[], object] | None) -> None:
    """Say what this thread has begun to do: if a kernel of it is not there, `call` is rehearsed, which does the same.

    None: it has ended. `call` is kept until then.
    """
    _thread.call = call


def rehearse_expected() -> None:
    """Compile what the call that this thread is in needs, if it has told of one: once a call, and none that a graph
    captures.

    It comes in the middle of that call. If it fails, of memory that does not suffice for both, it says so, and what it
    did not reach is compiled when it is launched.
    """
    call, _thread.call = _thread.call, None
    if call is None or os.environ.get("QDIFF_TUNE") == "1" or torch.cuda.is_current_stream_capturing():
        return  # with QDIFF_TUNE, which kernels are needed is found out by launching them
    with rehearsal():
        try:
            call()
        except Exception as error:  # noqa: BLE001  what only saves time must not end the call
            warnings.warn(f"kernels are compiled one by one, which takes longer: {error}", RuntimeWarning, stacklevel=2)


@contextmanager
def rehearsal() -> Iterator[None]:
    """Launches of this thread do nothing: results are undefined. At the end their kernels are compiled and loaded.

    One that does not compile is left out: a launch of it says why.
    """
    before, _thread.wanted = _thread.wanted, {}
    try:
        yield
        wanted = _thread.wanted
    finally:
        _thread.wanted = before
        _settled.forget()  # nothing has read the weights
    _load(wanted)


def wants(kernel: Loadable) -> bool:
    """Whether this thread is in a rehearsal, which then has the kernel on its list."""
    if _thread.wanted is None:
        return False
    _thread.wanted[kernel] = None
    return True


def _load(kernels: Iterable[Loadable]) -> None:
    kernels = list(kernels)
    if not kernels:
        return
    pool = ThreadPoolExecutor(min(_MOST_THREADS, _processors()))
    try:
        done = pool.map(_try, kernels)
        for _ in tqdm(done, "Compiling kernels, once on this machine", len(kernels), leave=False, disable=None):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _try(kernel: Loadable) -> None:
    with suppress(Exception), torch.cuda.device(kernel.device):
        kernel.load()


def _processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
