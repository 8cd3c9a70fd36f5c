"""One row on one model with one seed: quantize a copy, replay the trajectory, generate, compare."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from board.peers import Peer, bytes_of, quantized
from board.rows import Row
from qdiff import quantize_pipeline
from qdiff.demo.measure import DemoSettings, generate, load, replayed_rows
from qdiff.evaluation import Trajectory, half_precision_bytes, paired_quality, record_denoiser, relative_error
from qdiff.plugin.structure import find_denoiser

DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What is the same for all rows. dtype: what quantized denoisers compute in; the reference is always float32."""

    assets: Path
    work: Path
    count: int = 64
    steps: int = 20
    guidance: float = 4.0
    replayed: int = 8
    device: str = "cpu"
    dtype: str = "float32"

    def run(self, seed: int) -> DemoSettings:
        """Pictures of seed s start from noise 1000 (s + 1) + i, calibration's from 100 s + i: none in common."""
        return DemoSettings(self.assets, (), self.count, self.steps, self.guidance, 1000 * (seed + 1), self.replayed)


@dataclass(frozen=True)
class Unit:
    """What one process does at a time. row: None for the full-precision run that the others are compared with."""

    model: str
    seed: int
    row: Row | Peer | None

    def key(self, settings: Settings) -> str:
        """Changes with everything that the figures depend on but the code."""
        row = self.row
        what = {
            "model": self.model,
            "seed": self.seed,
            "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("assets", "work")},
            "recipe": row.recipe.to_dict() if isinstance(row, Row) else None,
            "calibration": dataclasses.asdict(row.calibration) if isinstance(row, Row) else None,
            "peer": dataclasses.asdict(row) if isinstance(row, Peer) else None,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Reference:
    """The full-precision run. trajectory: the denoiser's calls on the first pictures.  bytes: in float16."""

    inputs: list[Any]
    pictures: Tensor
    trajectory: Trajectory
    bytes: int


class Bench:
    """Measures units in one process: each pipeline is loaded once, and copied for a row."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True

    def measure(self, unit: Unit) -> dict[str, Any]:
        """The unit's figures as plain JSON values; {} for a reference, which is left in a file."""
        if unit.row is None:
            self._make_reference(unit.model, unit.seed)
            return {}
        reference = self._reference(unit.model, unit.seed)
        pipe = copy.deepcopy(self._pipe(unit.model)).to(DTYPES[self.settings.dtype])
        started = self._now()
        stored = self._quantize(pipe, unit)
        quantize_seconds = self._now() - started
        _, denoiser = find_denoiser(pipe)
        replayed = denoiser if self.settings.dtype == "float32" else InDtype(denoiser, DTYPES[self.settings.dtype])
        error = relative_error(reference.trajectory, replayed)
        run = generate(pipe, reference.inputs, self.settings.run(unit.seed))
        # Decoding in float16 may leave [0, 1] by a rounding.
        quality = paired_quality(reference.pictures, run.pictures.clamp(0, 1))
        return {
            "ratio_to_fp16": (half_precision_bytes(denoiser) if stored is None else stored) / reference.bytes,
            "denoiser_relative_error": error.overall,
            "psnr_db": float(quality.psnr.mean()),
            "ssim": float(quality.ssim.mean()),
            "quantize_seconds": quantize_seconds,
        }

    def _quantize(self, pipe: DiffusionPipeline, unit: Unit) -> int | None:
        """Quantize in place; the bytes that a peer stores, None for ours."""
        if isinstance(unit.row, Peer):
            name, denoiser = find_denoiser(pipe)
            stored = bytes_of(unit.row, denoiser)
            setattr(pipe, name, quantized(unit.row, denoiser))
            return stored
        assert unit.row is not None
        calibration = dataclasses.replace(unit.row.calibration, seed=100 * unit.seed)
        quantize_pipeline(pipe, recipe=unit.row.recipe, calibration=calibration, progress=False)
        return None

    @functools.cache  # noqa: B019  # one bench a process, for as long as it lives
    def _pipe(self, model: str) -> DiffusionPipeline:
        pipe = load(self.settings.assets / model).to(self.settings.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _path(self, model: str, seed: int) -> Path:
        return self.settings.work / f"reference-{model}-{Unit(model, seed, None).key(self.settings)}.pt"

    def _make_reference(self, model: str, seed: int) -> None:
        path, run = self._path(model, seed), self.settings.run(seed)
        if path.is_file():
            return
        pipe = self._pipe(model)
        inputs = inputs_of(pipe, self.settings)
        _, denoiser = find_denoiser(pipe)
        with record_denoiser(denoiser, replayed_rows(len(inputs), run)) as trajectory:
            full = generate(pipe, inputs, run)
        reference = Reference(inputs, full.pictures, trajectory, half_precision_bytes(denoiser))
        torch.save(reference, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)  # whole or not at all: processes may be killed

    @functools.lru_cache(maxsize=2)  # noqa: B019  # the same
    def _reference(self, model: str, seed: int) -> Reference:
        reference: Reference = torch.load(self._path(model, seed), weights_only=False)  # written by this script
        return reference

    def _now(self) -> float:
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


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
