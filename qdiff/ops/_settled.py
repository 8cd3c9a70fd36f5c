"""Weights that a kernel may read while the kernel before it on the stream still runs.

With programmatic dependent launch (cuda/include/dependent.cuh) a kernel may begin before what the one before it writes
is there; what was written earlier is. A weight that an earlier call has waited for, and that is unchanged, was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from weakref import ref

import torch
from torch import Tensor

# By identity: the tensor, its version and where it is.
_read: dict[int, tuple[Callable[[], Tensor | None], int, int]] = {}
_NOT_READ: tuple[Callable[[], Tensor | None], int, int] = (lambda: None, 0, 0)


def settled(weights: tuple[Tensor, ...]) -> bool:
    """Whether an earlier call has read all of them as they are now. If not, this one waits, and later ones need not."""
    for weight in weights:
        reference, version, place = _read.get(id(weight), _NOT_READ)
        if reference() is not weight or version != weight._version or place != weight.data_ptr():
            note_read(weights)
            return False
    return True


def forget() -> None:
    """Let the next call wait for all weights."""
    _read.clear()


def note_read(weights: Iterable[Tensor]) -> None:
    """Say that a call has waited for them as they are now."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return  # nothing is read before the graph runs
    for weight in weights:
        if not weight.is_inference():  # such have no version
            _read[id(weight)] = ref(weight, partial(_gone, id(weight))), weight._version, weight.data_ptr()


def _gone(identity: int, _: ref[Tensor]) -> None:
    _read.pop(identity, None)
