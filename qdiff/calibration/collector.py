"""Watches the denoiser run: hooks on every layer, put on in one place and always taken off."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qdiff.calibration.accumulator import SAMPLE_ROWS, Memory, MomentSum, observe
from qdiff.calibration.histogram import LogScale
from qdiff.calibration.statistics import ChannelHistograms, LayerStatistics, Moments, Samples, Statistics
from qdiff.calibration.timesteps import TimestepBins
from qdiff.denoising import read_timestep
from qdiff.numerics.first_token import same_token

HISTOGRAMS = "histograms"
SAMPLES = "samples"
HESSIAN = "hessian"
# Collected not here but by a second pass, when layers are quantized one after the other.
CARRIED = "carried"
# Changes what all of the above are of: see `LayerStatistics.first_token`.
FIRST_TOKEN = "first_token"
NEEDS = frozenset({"absmax", HISTOGRAMS, SAMPLES, HESSIAN, CARRIED, FIRST_TOKEN})


def collect(
    run: Callable[[], object],
    denoiser: nn.Module,
    layers: Mapping[str, nn.Module],
    needs: Collection[str] | Mapping[str, Collection[str]],
    progress: bool = True,
    seed: int = 0,
    steps: Collection[int] | None = None,
    rows: int = SAMPLE_ROWS,
) -> Statistics:
    """What the inputs of `layers` look like, per timestep, while `run` drives `denoiser`.

    needs:  any of "absmax" (always collected), "histograms", "samples", "hessian" (the second moments): for all
            layers, or a mapping from each layer's name. Layers that did not run are missing from the result.
    steps:  which steps of each trajectory to look at, counted from 0, the noisiest; None: all of them.
    rows:   of samples a layer, over all timesteps.
    Raises `ValueError` for an input with NaN or infinite values (layer and timestep named), and where the denoiser
    never ran. Hooks are gone in any case.
    """
    if not isinstance(needs, Mapping):
        needs = dict.fromkeys(layers, needs)
    unknown = set().union(*needs.values()) - NEEDS
    if unknown:
        raise ValueError(f"calibration can collect {', '.join(sorted(NEEDS))}: got {', '.join(sorted(unknown))}")
    collector = Collector(layers, needs, seed, steps, rows)
    with collector.watching(denoiser, progress):
        run()
    if not collector.memories:
        raise ValueError("the denoiser never ran during calibration; does the pipeline use another copy of it?")
    return collector.statistics()


class Collector:
    """Gathers a `Memory` for every (timestep, layer) pair; `statistics` stacks them into tables."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        needs: Mapping[str, Collection[str]],
        seed: int,
        steps: Collection[int] | None = None,
        rows: int = SAMPLE_ROWS,
    ) -> None:
        self.layers = layers
        self.needs = needs
        self.seed = seed
        self.steps = steps
        self.sample_rows = rows
        self.position = (0.0, -1)  # the running timestep, and its number in the trajectory
        self.calls = 0
        self.bins = TimestepBins()
        self.memories: dict[float, dict[str, Memory]] = {}
        self.scales: dict[str, LogScale] = {}
        # A generator for each layer and need: what is drawn of one does not depend on what else is collected.
        self.generators = {
            # 32 bits, because the CPU's generator ignores the rest of a seed.
            (name, need): torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{need}".encode()))
            for name in layers
            for need in (SAMPLES, HISTOGRAMS)
        }
        self.parts: list[tuple[float, Tensor | None]] = []
        self.unchecked: list[tuple[str, float, Tensor]] = []  # the largest values of this call's inputs
        self.first_tokens: dict[str, Tensor | None] = {}  # None: not the same everywhere
        self.rest: dict[int, tuple[Tensor, Tensor]] = {}  # of this call's inputs, by id: what follows the first token
        self.sums: dict[str, MomentSum] = {}
        # By id, version and geometry: the inputs of this call, and where their moments went.
        self.summed: dict[tuple[object, ...], tuple[ref[Tensor], MomentSum]] = {}

    @contextmanager
    def watching(self, denoiser: nn.Module, progress: bool) -> Iterator[None]:
        """All hooks on; all off again, whatever happens."""
        with ExitStack() as stack:
            bar = stack.enter_context(tqdm(desc="Calibrating", unit="step", disable=not progress))
            stack.callback(denoiser.register_forward_pre_hook(partial(self._step, bar), with_kwargs=True).remove)
            for name, layer in self.layers.items():
                stack.callback(layer.register_forward_pre_hook(partial(self._input, name), with_kwargs=True).remove)
            yield

    def _step(self, bar: tqdm, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the denoiser runs: which rows of its batch are at which timestep."""
        self._check_finite()
        timestep, _ = read_timestep(denoiser, args, kwargs)
        values = torch.as_tensor(timestep).detach().double().flatten().cpu()
        bar.update()
        if not self._chosen(float(values.max())):
            self.parts = []
            return
        distinct = values.unique()
        masks: list[Tensor | None] = [None] if len(distinct) == 1 else [values == value for value in distinct]
        self.parts = []
        for value, mask in zip(distinct.tolist(), masks):
            key = self._timestep(value)  # may join bins, and so rename those already in `parts`
            self.parts.append((key, mask))
        self.calls += 1
        self.summed = {}
        self.rest = {}

    def _chosen(self, timestep: float) -> bool:
        """Timesteps fall along a trajectory; a larger one than the last begins another."""
        last, number = self.position
        if timestep != last or number < 0:
            self.position = (timestep, 0 if timestep > last or number < 0 else number + 1)
        return self.steps is None or self.position[1] in self.steps

    def _timestep(self, value: float) -> float:
        key, moved = self.bins.add(value)
        if moved:
            self._join(moved)
        if key not in self.memories:
            self.memories[key] = {}
            if len(self.memories).bit_count() == 1:  # at powers of two: seldom, and at most twice the rows in the end
                self._trim()
        return key

    def _join(self, moved: Mapping[float, float]) -> None:
        joined: dict[float, dict[str, Memory]] = {}
        for old, memories in self.memories.items():
            into = joined.setdefault(moved[old], {})
            for name, memory in memories.items():
                into[name] = into[name].join(memory) if name in into else memory
        self.memories = joined
        self.parts = [(moved.get(key, key), mask) for key, mask in self.parts]
        self._trim()

    def _input(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer runs: look at its input, one timestep at a time."""
        if not self.parts:
            return
        x = args[0] if args else kwargs["input"]
        if FIRST_TOKEN in self.needs.get(name, ()):
            x = self._after_first_token(name, x)
        for key, mask in self.parts:
            rows = x if mask is None else x[self._rows(name, mask, len(x)).to(x.device)]
            memory = self._observe(name, layer, rows, key)
            before = self.memories[key].get(name)
            self.memories[key][name] = before.join(memory) if before else memory
            self.memories[key][name].trim(self._rows_per_timestep())
        if HESSIAN in self.needs.get(name, ()):
            self._add_moments(name, layer, x)

    def _after_first_token(self, name: str, x: Tensor) -> Tensor:
        """The input without its first token, while that is the same in all samples and calls."""
        value = self.first_tokens.get(name, x[0, 0].float().clone() if x.dim() == 3 and x.shape[1] > 1 else None)
        if value is not None and not (x.dim() == 3 and bool(same_token(x[:, 0], value).all())):
            # It was left out until now, and counts after all.
            for memories in self.memories.values():
                if name in memories:
                    memories[name].absmax = torch.maximum(memories[name].absmax, value.abs())
            value = None
        self.first_tokens[name] = value
        if value is None:
            return x
        if id(x) not in self.rest:  # one view for all that read the same tensor, so that they still do
            self.rest[id(x)] = (x, x[:, 1:])
        return self.rest[id(x)][1]

    def _add_moments(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """Layers that read the very same tensor from the first call on (queries, keys and values) share one sum."""
        geometry = (layer.kernel_size, layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else None
        key = (id(x), 0 if x.is_inference() else x._version, geometry)
        before, shared = self.summed.get(key, (None, None))
        if shared is not None and before is not None and before() is x:
            if self.sums.get(name) is shared:
                return
            if name not in self.sums and shared.calls == 1:
                self.sums[name] = shared
                return
        total = self.sums.setdefault(name, MomentSum())
        # Of the call and not of the layer: whoever reads a tensor draws the same rows of it, shared or not.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/call {self.calls}".encode()))
        for _, mask in self.parts:
            rows = x if mask is None else x[self._rows(name, mask, len(x)).to(x.device)]
            total.add(layer, rows, generator)
        total.calls += 1
        self.summed[key] = (ref(x), total)

    def _rows(self, name: str, mask: Tensor, rows: int) -> Tensor:
        if rows % len(mask):
            raise ValueError(
                f"calibration cannot tell the timesteps of layer {name!r} apart: {rows} rows of input for "
                f"{len(mask)} timesteps; calibrate with one timestep a batch"
            )
        return mask.repeat_interleave(rows // len(mask))

    def _observe(self, name: str, layer: nn.Module, x: Tensor, key: float) -> Memory:
        needs = self.needs.get(name, ())
        if HISTOGRAMS in needs and name not in self.scales:
            largest = x.abs().amax()
            self.unchecked.append((name, key, largest[None]))
            self._check_finite()
            self.scales[name] = LogScale.around(largest.item())
        memory = observe(
            layer,
            x,
            self.scales.get(name),
            self._rows_per_timestep() if SAMPLES in needs else 0,
            self.generators[name, SAMPLES],
            self.generators[name, HISTOGRAMS],
        )
        self.unchecked.append((name, key, memory.absmax))
        return memory

    def _check_finite(self) -> None:
        """Once a call and not at every layer, where an accelerator would have to finish all that it was given."""
        unchecked, self.unchecked = self.unchecked, []
        if not unchecked or torch.isfinite(torch.cat([values.to(unchecked[0][2]) for *_, values in unchecked])).all():
            return
        name, key, _ = next(entry for entry in unchecked if not torch.isfinite(entry[2]).all())
        raise ValueError(
            f"calibration met NaN or infinite values in the input of layer {name!r} at timestep "
            f"{self.bins.value(key):g}; check the model's weights, or run it in float32 or bfloat16"
        )

    def _rows_per_timestep(self) -> int:
        return -(-self.sample_rows // max(1, len(self.memories)))

    def _trim(self) -> None:
        for memories in self.memories.values():
            for memory in memories.values():
                memory.trim(self._rows_per_timestep())

    def statistics(self) -> Statistics:
        """Tables over the timesteps, ascending."""
        self._check_finite()
        self._trim()
        keys = sorted(self.memories, key=self.bins.value)
        timesteps = torch.tensor([self.bins.value(key) for key in keys], dtype=torch.float32)
        ran = {name for memories in self.memories.values() for name in memories}
        sums = {id(total): total for total in self.sums.values()}  # each once, however many layers share it
        moments = {key: total.moments() for key, total in sums.items()}
        layers = {
            name: self._layer(name, keys, timesteps, moments.get(id(self.sums.get(name))))
            for name in self.layers
            if name in ran
        }
        return Statistics(tuple(timesteps.tolist()), layers)

    def _layer(self, name: str, keys: list[float], timesteps: Tensor, moments: Moments | None) -> LayerStatistics:
        """One layer's table; a timestep at which it did not run takes its nearest neighbour's row."""
        seen = [index for index, key in enumerate(keys) if name in self.memories[key]]
        memories = [self.memories[keys[index]][name] for index in seen]
        nearest = (torch.arange(len(keys))[:, None] - torch.tensor(seen)).abs().argmin(1)
        absmax = torch.stack([memory.absmax for memory in memories])
        take = nearest.to(absmax.device)
        counts = [memory.counts for memory in memories if memory.counts is not None]
        rows = [memory.rows for memory in memories if memory.rows is not None]
        of_row = [torch.full((len(part),), index) for index, part in zip(seen, rows)]
        return LayerStatistics(
            timesteps=timesteps.to(absmax.device),
            channel_absmax=absmax[take],
            histograms=ChannelHistograms(self.scales[name], torch.stack(counts)[take]) if counts else None,
            samples=Samples(torch.cat(rows), torch.cat(of_row).to(absmax.device)) if rows else None,
            moments=moments,
            first_token=self.first_tokens.get(name),
        )
