"""Quantizes a denoiser block after block, each on inputs that already carry the quantization of those before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor, nn
from tqdm.auto import tqdm

from qdiff.calibration import LayerStatistics, Samples, Statistics, collect
from qdiff.denoising import StepTracker
from qdiff.methods import needs_of
from qdiff.recipe import LayerPlan

# Calls of the denoiser that are kept to be run again: each stage costs at most one run of all of them.
CALLS = 16
# Rows of a layer's input over all of these: methods that see quantized inputs have only these to learn from.
ROWS = 1024
_GOLDEN = 0.6180339887498949

Quantize = Callable[[LayerPlan, nn.Module, "LayerStatistics | None"], nn.Module]
Swap = Callable[[Mapping[str, nn.Module]], None]


class Call(NamedTuple):
    """The arguments of one call of a denoiser."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


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
            call = Call(_copied(args), _copied(kwargs))
            self._kept = {index: self._kept.get(index, call) for index in candidates}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


def quantize_in_order(
    denoiser: nn.Module,
    plans: Mapping[str, LayerPlan],
    statistics: Statistics,
    calls: Sequence[Call],
    quantize: Quantize,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, nn.Module]:
    """The quantized form of every planned layer, made stage by stage in the order in which the denoiser runs them.

    Layers whose methods need "carried" get, in place of their samples, rows of the recorded calls twice: as they are in
    full precision, and as they arrive when the stages before are quantized. A stage is a block: an entry of a module
    list of the denoiser, or one of its other children.

    The denoiser is in the end, and on any error, as it was. It should be the case that the same arguments give the same
    bytes.
    """
    # Of each: rows, and what decides which rows there are.
    carried = {
        name: needs_of(plan) & {"first_token"} | {"samples"}
        for name, plan in plans.items()
        if "carried" in needs_of(plan) and name in statistics.layers
    }
    replacements: dict[str, nn.Module] = {}
    with _swapping(denoiser, StepTracker(statistics.timesteps)) as swap:
        stages = _stages(_runs(denoiser, plans, calls[0]))
        exact = _rows(denoiser, carried, calls, seed)
        bar = tqdm(total=len(plans), desc="Quantizing in order", unit="layer", disable=not progress)
        with bar:
            # Layers that the recorded call does not run come last: nothing else waits for them.
            for stage in [*stages, [name for name in plans if not any(name in stage for stage in stages)]]:
                arriving = _rows(denoiser, {name: carried[name] for name in stage if name in exact}, calls, seed)
                for name in stage:
                    seen = statistics.layers.get(name)
                    if seen is not None and name in arriving:
                        seen = _with_carried(seen, exact[name], arriving[name])
                    replacements[name] = quantize(plans[name], denoiser.get_submodule(name), seen)
                    bar.update()
                swap({name: replacements[name] for name in stage})
    return replacements


def _with_carried(seen: LayerStatistics, exact: LayerStatistics, arriving: LayerStatistics) -> LayerStatistics:
    """The recorded calls are at some of the timesteps: rows point into all of them."""
    index = (exact.timesteps[:, None] - seen.timesteps).abs().argmin(1)

    def moved(part: LayerStatistics) -> Samples:
        assert part.samples is not None  # asked for by `_rows`
        return Samples(part.samples.values, index[part.samples.timesteps])

    return dataclasses.replace(seen, samples=moved(exact), carried=moved(arriving))


class _EnoughError(Exception):
    """The denoiser need not run on: the last layer of interest has run for the last time."""


def _rows(
    denoiser: nn.Module, needs: Mapping[str, Collection[str]], calls: Sequence[Call], seed: int
) -> Mapping[str, LayerStatistics]:
    """Rows of these layers' inputs. The same seed draws the same positions, whatever the values there are."""
    if not needs:
        return {}
    layers = {name: denoiser.get_submodule(name) for name in needs}
    expected = len(_runs(denoiser, needs, calls[0]))

    def run() -> None:
        for call in calls:
            with suppress(_EnoughError):
                _runs(denoiser, needs, call, expected)

    return collect(run, denoiser, layers, needs, progress=False, seed=seed, rows=ROWS).layers


def _runs(denoiser: nn.Module, names: Iterable[str], call: Call, enough: int | None = None) -> list[str]:
    """The layers that a call runs, in order, some more than once (a DiT's first time embedding); up to `enough`."""
    runs: list[str] = []

    def ran(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            runs.append(name)
            if len(runs) == enough:
                raise _EnoughError

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(denoiser.get_submodule(name).register_forward_hook(ran(name)).remove)
        denoiser(*call.args, **call.kwargs)
    return runs


def _stages(runs: Sequence[str]) -> list[list[str]]:
    """Layers by block, in the order in which they are first run."""
    stages: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(runs):
        parts = name.split(".")
        block = parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1]
        stages.setdefault(tuple(block), []).append(name)
    return list(stages.values())


@contextmanager
def _swapping(denoiser: nn.Module, tracker: StepTracker) -> Iterator[Swap]:
    """Gives a function that puts quantized layers in their places; in the end the old ones are back."""
    places: list[tuple[nn.Module, str, nn.Module]] = []
    hook = tracker.attach(denoiser)

    def swap(replacements: Mapping[str, nn.Module]) -> None:
        new = {id(denoiser.get_submodule(name)): module for name, module in replacements.items()}
        for parent in list(denoiser.modules()):
            for child_name, child in parent._modules.items():
                if child is not None and id(child) in new:
                    places.append((parent, child_name, child))
                    new[id(child)].tracker = tracker  # type: ignore[assignment]  # a plain object, not a module
                    parent._modules[child_name] = new[id(child)]

    try:
        yield swap
    finally:
        hook.remove()
        for parent, child_name, child in places:
            parent._modules[child_name] = child
