"""Quantizes a denoiser block after block, each on inputs that already carry the quantization of those before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from torch import nn
from tqdm.auto import tqdm

from qdiff.calibration import LayerStatistics, Samples, Statistics, collect
from qdiff.denoising import StepTracker
from qdiff.layers import QuantizedWeights
from qdiff.methods import Draft, Rounding, draft_layer, needs_of, resolve
from qdiff.plugin.block_rounding import Reconstruction
from qdiff.plugin.blocks import blocks_of
from qdiff.plugin.calls import Call, StopError
from qdiff.recipe import LayerPlan

# Rows of a layer's input over all of these: methods that see quantized inputs have only these to learn from.
ROWS = 1024

Swap = Callable[[Mapping[str, nn.Module]], None]
Finish = Callable[[LayerPlan, nn.Module, QuantizedWeights], nn.Module]


def quantize_in_order(
    denoiser: nn.Module,
    plans: Mapping[str, LayerPlan],
    statistics: Statistics,
    calls: Sequence[Call],
    finish: Finish,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, nn.Module]:
    """The quantized form of every planned layer, made stage by stage in the order in which the denoiser runs them.

    Layers whose methods need "carried" get, in place of their samples, rows of the recorded calls twice: as they are in
    full precision, and as they arrive when the stages before are quantized; rows at a timestep that the statistics do
    not have count for the nearest. A stage is an entry of a module list of the denoiser, or one of its other children;
    or a block (`blocks_of`), where the rounding of its layers is to be learned in common.

    The denoiser is in the end, and on any error, as it was. It should be the case that the same arguments give the same
    bytes.

    Args:
        calls: of the denoiser; each stage costs at most one run of all of them.
        finish: makes a layer of the numbers chosen for it.
    """
    # Of each: rows, and what decides which rows there are.
    carried = {
        name: needs_of(plan) & {"first_token"} | {"samples"}
        for name, plan in plans.items()
        if "carried" in needs_of(plan) and not block_steps(plan) and name in statistics.layers
    }
    blocks = set(blocks_of([name for name in statistics.layers if name in plans and block_steps(plans[name])]).values())
    # All of a block's layers, whatever their methods; but a table is looked up, and no gradient is to pass it.
    block_of = {
        name: block
        for name, plan in plans.items()
        for block in blocks
        if name.startswith(f"{block}.") and plan.kind != "embedding" and name in statistics.layers
    }
    replacements: dict[str, nn.Module] = {}
    tracker = StepTracker(statistics.timesteps)
    with _swapping(denoiser, tracker) as swap:
        stages = _stages(_runs(denoiser, plans, calls[0]), block_of)
        exact = _rows(denoiser, carried, calls, seed)
        reconstruction = Reconstruction(denoiser, blocks, calls, tracker, seed)
        bar = tqdm(total=len(plans), desc="Quantizing in order", unit="layer", disable=not progress)
        with bar:
            # Layers that the recorded call does not run come last: nothing else waits for them.
            for stage in [*stages, [name for name in plans if not any(name in stage for stage in stages)]]:
                arriving = _rows(denoiser, {name: carried[name] for name in stage if name in exact}, calls, seed)
                drafts: dict[str, Draft] = {}
                for name in stage:
                    seen = statistics.layers.get(name)
                    if seen is not None and name in arriving:
                        seen = _with_carried(seen, exact[name], arriving[name])
                    draft = draft_layer(plans[name], denoiser.get_submodule(name), seen)
                    if name in block_of:
                        drafts[name] = draft
                    else:
                        replacements[name] = finish(plans[name], denoiser.get_submodule(name), draft.finished())
                    bar.update()
                codes = reconstruction.learn(block_of[stage[0]], drafts) if drafts else {}
                for name, draft in drafts.items():
                    weights = draft.finished(codes.get(name))
                    replacements[name] = finish(plans[name], denoiser.get_submodule(name), weights)
                swap({name: replacements[name] for name in stage})
    return replacements


def block_steps(plan: LayerPlan) -> int:
    """Steps that the rounding of a layer wants for its whole block."""
    return resolve(plan.rounding, Rounding).block_steps  # type: ignore[type-abstract]


def _with_carried(seen: LayerStatistics, exact: LayerStatistics, arriving: LayerStatistics) -> LayerStatistics:
    """The recorded calls are at some of the timesteps: rows point into all of them."""
    index = (exact.timesteps[:, None] - seen.timesteps).abs().argmin(1)

    def moved(part: LayerStatistics) -> Samples:
        assert part.samples is not None  # asked for by `_rows`
        return Samples(part.samples.values, index[part.samples.timesteps])

    return dataclasses.replace(seen, samples=moved(exact), carried=moved(arriving))


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
            with suppress(StopError):
                _runs(denoiser, needs, call, expected)

    return collect(run, denoiser, layers, needs, progress=False, seed=seed, rows=ROWS).layers


def _runs(denoiser: nn.Module, names: Iterable[str], call: Call, enough: int | None = None) -> list[str]:
    """The layers that a call runs, in order, some more than once (a DiT's first time embedding); up to `enough`."""
    runs: list[str] = []

    def ran(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            runs.append(name)
            if len(runs) == enough:
                raise StopError

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(denoiser.get_submodule(name).register_forward_hook(ran(name)).remove)
        denoiser(*call.args, **call.kwargs)
    return runs


def _stages(runs: Sequence[str], block_of: Mapping[str, str] | None = None) -> list[list[str]]:
    """Layers by block, in the order in which they are first run."""
    stages: dict[str, list[str]] = {}
    for name in dict.fromkeys(runs):
        parts = name.split(".")
        stage = ".".join(parts[: 2 if len(parts) > 1 and parts[1].isdigit() else 1])
        stages.setdefault((block_of or {}).get(name, f"{stage}, but for its blocks"), []).append(name)
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
