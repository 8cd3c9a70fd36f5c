"""Generate in full precision and with each recipe, from the same seeds, and compare."""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from transformers.utils import logging as transformers_logging

from qdiff.calibration import Calibration
from qdiff.evaluation import (
    PairedQuality,
    Trajectory,
    TrajectoryError,
    half_precision_bytes,
    latent_errors,
    paired_quality,
    record_denoiser,
    record_latents,
    relative_error,
)
from qdiff.plugin.pipeline import quantize_pipeline
from qdiff.plugin.structure import find_denoiser

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

FULL = "full precision"
NAIVE = "naive"
DEFAULT = "w4a8"
RECIPES = (NAIVE, DEFAULT)
MODELS = ("emoji-sd", "emoji-dit")
HELD_OUT = "emoji-heldout.json"


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does.

    count: pictures a model.  replayed: pictures whose denoiser calls are recorded and replayed through the quantized
    denoisers (the relative error has little variance: four pictures times twenty steps settle its first two digits).
    calibration: of both recipes.
    """

    assets: Path
    models: tuple[str, ...] = MODELS
    count: int = 16
    steps: int = 20
    guidance: float = 4.0
    seed: int = 0
    replayed: int = 4
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        for name in ("count", "steps", "replayed"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more: got {getattr(self, name)}")
        for model in self.models:
            if not (self.assets / model / "model_index.json").is_file():
                raise FileNotFoundError(
                    f"no pipeline in {self.assets / model}: run the demo from a checkout of the project, or say where "
                    "its assets folder is (--assets)"
                )


@dataclass(frozen=True)
class Run:
    """One generation: pictures in [0, 1], the latents after each step, and the seconds it took."""

    pictures: Float[Tensor, "pictures 3 height width"]
    latents: Sequence[Tensor]
    seconds: float


@dataclass(frozen=True)
class Variant:
    """A quantized pipeline, measured against full precision. drift: relative error of the latents after each step."""

    recipe: str
    bytes: int
    run: Run
    quality: PairedQuality
    error: TrajectoryError
    drift: Float[Tensor, "steps pictures"]
    quantize_seconds: float


@dataclass(frozen=True)
class ModelResult:
    """Everything measured on one model. denoiser: its class's name.  bytes: of the original one, in half precision."""

    name: str
    denoiser: str
    captions: Sequence[str]
    bytes: int
    full: Run
    variants: Mapping[str, Variant]


class Progress:
    """Lines that say what is being done, with the seconds since the start."""

    def __init__(self, console: Console, started: float) -> None:
        self.console, self.started = console, started

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{time.perf_counter() - self.started:4.0f} s[/dim]  {text}", highlight=False)


def measure_model(name: str, settings: DemoSettings, progress: Progress) -> ModelResult:
    """Generate with one model in full precision and with each recipe, from the same seeds."""
    pipe = load(settings.assets / name)
    _, denoiser = find_denoiser(pipe)
    inputs = demo_inputs(pipe, settings)
    captions = list(inputs)
    progress.say(f"[bold]{name}[/bold]: {FULL}, {len(captions)} pictures, {settings.steps} steps")
    with record_denoiser(denoiser, rows=replayed_rows(len(inputs), settings)) as trajectory:
        full = generate(pipe, list(inputs.values()), settings)
    size = half_precision_bytes(denoiser)
    variants = {}
    for recipe in RECIPES:
        progress.say(f"[bold]{name}[/bold]: {recipe}, calibrating and quantizing")
        variants[recipe] = measure_variant(recipe, name, list(inputs.values()), full, trajectory, settings, progress)
        gc.collect()
    return ModelResult(name, type(denoiser).__name__, captions, size, full, variants)


def measure_variant(
    recipe: str,
    name: str,
    inputs: Sequence[str | int],
    full: Run,
    trajectory: Trajectory,
    settings: DemoSettings,
    progress: Progress,
) -> Variant:
    """Quantize a fresh copy of the model by one recipe, generate, and compare with the full-precision run."""
    pipe = load(settings.assets / name)
    started = time.perf_counter()
    quantize_pipeline(pipe, recipe=recipe, calibration=settings.calibration, progress=sys.stderr.isatty())
    seconds = time.perf_counter() - started
    _, denoiser = find_denoiser(pipe)
    progress.say(f"[bold]{name}[/bold]: {recipe}, {len(inputs)} pictures")
    run = generate(pipe, inputs, settings)
    return Variant(
        recipe=recipe,
        bytes=half_precision_bytes(denoiser),
        run=run,
        quality=paired_quality(full.pictures, run.pictures),
        error=relative_error(trajectory, denoiser),
        drift=latent_errors(full.latents, run.latents),
        quantize_seconds=seconds,
    )


def load(path: Path) -> DiffusionPipeline:
    """Load a pipeline to compute in float32: the CPU's own precision, so that full precision means it."""
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
    # Cast afterwards: the loading argument's name and its default for text encoders differ between versions.
    pipe = DiffusionPipeline.from_pretrained(str(path), local_files_only=True).to(torch.float32)
    pipe.set_progress_bar_config(leave=False, disable=not sys.stderr.isatty())
    return pipe


def demo_inputs(pipe: DiffusionPipeline, settings: DemoSettings) -> dict[str, str | int]:
    """Return `count` held-out captions or class labels, drawn at random and not picked, by the caption to show."""
    draw = random.Random(settings.seed)
    if hasattr(pipe, "tokenizer"):
        entries = json.loads((settings.assets / HELD_OUT).read_text(encoding="utf-8"))
        captions = [entry["caption"] for entry in entries]
        return {caption: caption for caption in draw.sample(captions, min(settings.count, len(captions)))}
    names: dict[int, str] = {}
    for label, index in getattr(pipe, "labels", {}).items():
        names[index] = f"{names[index]}, {label}" if index in names else label
    labels = names or {index: f"class {index}" for index in range(settings.count)}
    return {labels[index]: index for index in draw.sample(sorted(labels), min(settings.count, len(labels)))}


def replayed_rows(pictures: int, settings: DemoSettings) -> list[int]:
    """Return the rows of the first pictures in the denoiser's batch, which holds every picture twice when guided."""
    first = list(range(min(settings.replayed, pictures)))
    return first + [row + pictures for row in first] if settings.guidance > 1 else first


def generate(pipe: Any, inputs: Sequence[str | int], settings: DemoSettings) -> Run:
    """Generate a picture of each input, the i-th from seed + i, all in one batch."""
    generators = [torch.Generator().manual_seed(settings.seed + index) for index in range(len(inputs))]
    started = time.perf_counter()
    with record_latents(pipe.scheduler) as latents:
        pictures = pipe(
            list(inputs),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=generators,
            output_type="pt",
        ).images
    seconds = time.perf_counter() - started
    # The class-conditional pipeline steps its latents twice over; its first half are the pictures'.
    return Run(pictures.float().cpu(), [step[: len(inputs)] for step in latents], seconds)
