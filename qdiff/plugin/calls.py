"""Calls of a denoiser, kept so that it can be run on them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qdiff.denoising import TimestepReader

# Calls of the denoiser that are kept to be run again.
CALLS = 16
_GOLDEN = 0.6180339887498949


class Call(NamedTuple):
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call, every tensor changed."""
        return Call(mapped(change, self.args), mapped(change, self.kwargs))


class StopError(Exception):
    """Raised in a hook: the denoiser need not run on, what was wanted of it has been seen."""


class CallRecorder(AbstractContextManager["CallRecorder"]):
    """Keeps up to `CALLS` calls of a denoiser, spread evenly over all that are made within the context."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._seen = 0
        self._kept: dict[int, Call] = {}

    @property
    def calls(self) -> list[Call]:
        """Those kept, in the order they were made."""
        return [self._kept[index] for index in sorted(self._kept)]

    def __enter__(self) -> CallRecorder:
        self._hook = self._denoiser.register_forward_pre_hook(self._record, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def _record(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Multiples of the golden ratio, modulo 1: the lowest of them are spread evenly however many there will be, and
        # fall into step with no trajectory's length.
        self._seen += 1
        candidates = sorted([*self._kept, self._seen], key=lambda index: index * _GOLDEN % 1)[:CALLS]
        if self._seen in candidates:
            call = Call(args, kwargs).mapped(lambda tensor: tensor.detach().clone())
            self._kept = {index: self._kept.get(index, call) for index in candidates}


def some_samples(denoiser: nn.Module, call: Call, count: int, turn: int) -> Call:
    """A call of a denoiser with `count` of its samples (all, if there are fewer), evenly spread, from number `turn` on.

    Tensors with as many entries along their first axis as the latent are a sample's each, the others all samples'.
    """
    rows = TimestepReader.of(denoiser)(call.args, call.kwargs).latent.shape[0]
    if count >= rows:
        return call
    chosen = ((torch.arange(count) * rows) // count + turn) % rows
    return call.mapped(lambda tensor: tensor[chosen.to(tensor.device)] if tensor.shape[:1] == (rows,) else tensor)


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest of mappings and sequences, every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(change, item) for item in value)
    return value


def float_tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors of such a nest, in its order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from float_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from float_tensors(item)
