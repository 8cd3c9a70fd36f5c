"""One row on one model with one seed: quantize a copy, replay the trajectory, generate, compare."""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from board.peers import Peer, bytes_of, quantized
from board.rows import Row
from board.units import Settings, Shared, Unit
from qdiff import Recipe, calibrate, quantize_pipeline
from qdiff.demo.measure import generate, load, replayed_rows
from qdiff.evaluation import Trajectory, half_precision_bytes, paired_quality, record_denoiser, relative_error
from qdiff.plugin.calibrate import PipelineStatistics
from qdiff.plugin.structure import find_denoiser

DTYPES = {"float32": torch.float32, "float16": torch.float16}
# Roundings that are made on the device: hundreds of products of large matrices (AdaRound of emoji-sd: 190 s on a core).
# All others are many small operations, for which processes that share a GPU mostly wait (AWQ of emoji-sd: 135 s with 14
# processes on an H200, 18 s on a core).
LEARNED = ("adaround", "adaquant")


@dataclass(frozen=True)
class Reference:
    """The full-precision run. trajectory: the denoiser's calls on the first pictures.  bytes: in float16."""

    inputs: list[Any]
    pictures: Tensor
    trajectory: Trajectory
    bytes: int


class Bench:
    """Measures units in one process: each pipeline is loaded once, and copied for a row.

    What rows share is left in files, from which every process takes it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.phases: dict[str, float] = {}
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True

    def measure(self, unit: Unit) -> dict[str, Any]:
        """The unit's figures as plain JSON values; of a preparation, only the seconds that it took."""
        self.phases = {}
        if isinstance(unit.row, Row | Peer):
            return self._measure_row(unit, unit.row) | {"phases": self.phases}
        with self._phase("reference" if unit.row is None else "calibrate"):
            self._prepare(unit)
        return {"phases": self.phases}

    def _measure_row(self, unit: Unit, row: Row | Peer) -> dict[str, Any]:
        with self._phase("load"):
            reference: Reference = self._prepared(Unit(unit.model, unit.seed, None), "cpu")
            pipe = self._copy(unit.model, self.settings.device if on_device(row) else "cpu")
            statistics = self._statistics(unit, row)
        with self._phase("quantize"):
            if isinstance(row, Peer):
                stored = quantize_by_peer(pipe, row)
            else:
                stored = None
                quantize_pipeline(pipe, recipe=row.recipe, statistics=statistics, progress=False)
        pipe.to(self.settings.device)
        _, denoiser = find_denoiser(pipe)
        replayed = denoiser if self.settings.dtype == "float32" else InDtype(denoiser, DTYPES[self.settings.dtype])
        with self._phase("replay"):
            error = relative_error(reference.trajectory, replayed)
        with self._phase("generate"):
            run = generate(pipe, reference.inputs, self.settings.run(unit.seed))
        with self._phase("compare"):
            # Decoding in float16 may leave [0, 1] by a rounding.
            found = run.pictures.clamp(0, 1).to(self.settings.device)
            quality = paired_quality(reference.pictures.to(self.settings.device), found)
        return {
            "ratio_to_fp16": (half_precision_bytes(denoiser) if stored is None else stored) / reference.bytes,
            "denoiser_relative_error": error.overall,
            "psnr_db": float(quality.psnr.mean()),
            "ssim": float(quality.ssim.mean()),
        }

    def _statistics(self, unit: Unit, row: Row | Peer) -> PipelineStatistics | None:
        if isinstance(row, Peer):
            return None
        found: PipelineStatistics = self._prepared(
            Unit(unit.model, unit.seed, Shared.by(row, unit.seed)), self.settings.device if on_device(row) else "cpu"
        )
        return found

    def _copy(self, model: str, device: str) -> DiffusionPipeline:
        return copy.deepcopy(self._pipe(model)).to(device, DTYPES[self.settings.dtype])

    @functools.cache  # noqa: B019  # one bench a process, for as long as it lives
    def _pipe(self, model: str) -> DiffusionPipeline:
        pipe = load(self.settings.assets / model)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _prepared(self, unit: Unit, device: str) -> Any:
        """What a preparation left, made now if it is not there."""
        return self._load(self._prepare(unit), device)

    # Rows of both models alternate.
    @functools.lru_cache(maxsize=8)  # noqa: B019  # one bench a process
    def _load(self, path: Path, device: str) -> Any:
        return torch.load(path, map_location=device, weights_only=False, mmap=True)  # written by this script

    def _prepare(self, unit: Unit) -> Path:
        kind = "reference" if unit.row is None else "statistics"
        path = self.settings.work / f"{kind}-{unit.model}-{unit.key(self.settings)}.pt"
        if not path.is_file():
            part = path.with_suffix(f".{os.getpid()}.part")
            torch.save(self._make_reference(unit) if unit.row is None else self._make_statistics(unit), part)
            part.rename(path)  # whole or not at all: processes may be killed
        return path

    def _make_reference(self, unit: Unit) -> Reference:
        pipe, run = copy.deepcopy(self._pipe(unit.model)).to(self.settings.device), self.settings.run(unit.seed)
        inputs = inputs_of(pipe, self.settings)
        _, denoiser = find_denoiser(pipe)
        with record_denoiser(denoiser, replayed_rows(len(inputs), run)) as trajectory:
            full = generate(pipe, inputs, run)
        return Reference(inputs, full.pictures, trajectory, half_precision_bytes(denoiser))

    def _make_statistics(self, unit: Unit) -> PipelineStatistics:
        assert isinstance(unit.row, Shared)
        pipe = self._copy(unit.model, self.settings.device)
        return calibrate(pipe, unit.row.recipes, unit.row.calibration, progress=False)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
        self.phases[name] = time.perf_counter() - started


def on_device(row: Row | Peer) -> bool:
    """Whether the row is quantized on the device, or on the CPU and then moved there."""
    return isinstance(row, Peer) or learned(row.recipe)


def learned(recipe: Recipe) -> bool:
    """Whether a layer of it has one of the `LEARNED` roundings."""
    specs = [recipe.rounding, *(override.rounding for override in recipe.overrides)]
    return any(spec is not None and spec.name in LEARNED for spec in specs)


def quantize_by_peer(pipe: DiffusionPipeline, peer: Peer) -> int:
    """Quantize the denoiser as the peer does; returns the bytes that it stores."""
    name, denoiser = find_denoiser(pipe)
    stored = bytes_of(peer, denoiser)
    setattr(pipe, name, quantized(peer, denoiser))
    return stored


class InDtype(nn.Module):
    """A denoiser of another dtype on recorded float32 inputs."""

    def __init__(self, denoiser: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.denoiser, self.dtype = denoiser, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.denoiser(*map(self._cast, args), **{name: self._cast(value) for name, value in kwargs.items()})
        sample: Tensor = output[0] if isinstance(output, tuple) else output.sample
        return sample.float()

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def inputs_of(pipe: DiffusionPipeline, settings: Settings) -> list[Any]:
    """Held-out captions without repetition, or class labels with: there are fewer classes than pictures."""
    draw = random.Random(0)
    if hasattr(pipe, "tokenizer"):
        entries = json.loads((settings.assets / "emoji-heldout.json").read_text())
        return draw.sample([entry["caption"] for entry in entries], settings.count)
    return draw.choices(sorted(pipe.labels.values()), k=settings.count)
