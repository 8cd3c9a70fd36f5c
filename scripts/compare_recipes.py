"""Compare recipes on the shipped pipelines: the README's table, and `assets/benchmarks/recipes.json`.

    python scripts/compare_recipes.py

64 pictures a model (held-out captions of emoji-sd, class labels of emoji-dit), 20 steps, guidance 4, the same seeds as
the full-precision pictures they are compared with. Weights, where a row says so, are those of the `w4a8` row: the row
then shows what 8-bit activations cost, and nothing else. About 15 minutes on two cores.

Columns: bytes of everything the denoiser stores over those in float16; the denoiser's relative output error, replayed
on the inputs of the full-precision trajectory (the figure of least variance); PSNR and SSIM of the pictures with 95 %
bootstrap intervals; seconds to quantize, calibration included; seconds to generate over full precision's, float32.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
import platform
import random
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from qdiff import Calibration, Recipe, quantize_pipeline
from qdiff.demo.measure import DemoSettings, Run, generate, load, replayed_rows
from qdiff.evaluation import (
    Record,
    Report,
    half_precision_bytes,
    latent_errors,
    paired_quality,
    record_denoiser,
    relative_error,
)
from qdiff.plugin.structure import find_denoiser, quantization_of
from qdiff.recipe import MethodSpec

# 8-bit weights err little, so in these two rows activations decide.
W8A8 = Recipe.preset("w8a8").replace(transforms=())
STATIC, TEMPORAL = MethodSpec.of("static"), MethodSpec.of("temporal")
W4A8 = Recipe.preset("w4a8")
SAME_WEIGHTS = "w4a16, weights of w4a8"
RECIPES: dict[str, Recipe] = {
    "w4a8": W4A8,
    "w8a8": Recipe.preset("w8a8"),
    "w8a8, one static range a layer": W8A8.replace(name="w8a8-static", linear_range=STATIC, conv_range=STATIC),
    "w8a8, temporal ranges": W8A8.replace(name="w8a8-temporal", linear_range=TEMPORAL, conv_range=TEMPORAL),
    "naive": Recipe.preset("naive"),
}


def inputs_of(pipe: DiffusionPipeline, settings: DemoSettings) -> list[Any]:
    """Held-out captions without repetition, or class labels with: there are fewer classes than pictures."""
    draw = random.Random(settings.seed)
    if hasattr(pipe, "tokenizer"):
        entries = json.loads((settings.assets / "emoji-heldout.json").read_text())
        return draw.sample([entry["caption"] for entry in entries], settings.count)
    return draw.choices(sorted(pipe.labels.values()), k=settings.count)


def with_float_activations(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A copy of a quantized pipeline that keeps the weights, to the bit, and does not quantize activations."""
    _, denoiser = find_denoiser(pipe)
    denoiser = copy.deepcopy(denoiser)
    record = quantization_of(denoiser)
    assert record is not None
    for name, plan in record.plans.items():
        if plan.kind != "embedding":
            float_plan = dataclasses.replace(plan, activation_bits=16, range_mode="none")
            denoiser.get_submodule(name).plan = float_plan  # type: ignore[assignment]
    copied = type(pipe)(**{**pipe.components, find_denoiser(pipe)[0]: denoiser})
    copied.set_progress_bar_config(disable=True)
    return copied


class Comparison:
    """One model: its full-precision run, and the records of every variant measured against it."""

    def __init__(self, model: str, settings: DemoSettings) -> None:
        self.model, self.settings = model, settings
        pipe = self.fresh()
        self.inputs = inputs_of(pipe, settings)
        _, denoiser = find_denoiser(pipe)
        self.bytes = half_precision_bytes(denoiser)
        generate(pipe, self.inputs[:2], settings)  # warm-up: the first run pays for lazy imports and allocations
        self.full = generate(pipe, self.inputs, settings)
        rows = replayed_rows(settings.replayed, settings)
        with record_denoiser(denoiser, rows) as self.trajectory:
            generate(pipe, self.inputs[: settings.replayed], settings)
        self.records = [Record.exact("generate_seconds", self.full.seconds, model=model, recipe="full precision")]

    def fresh(self) -> DiffusionPipeline:
        pipe = load(self.settings.assets / self.model)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def quantized(self, recipe: Recipe) -> tuple[DiffusionPipeline, float]:
        pipe = self.fresh()
        started = time.perf_counter()
        quantize_pipeline(pipe, recipe=recipe, calibration=self.settings.calibration, progress=False)
        return pipe, time.perf_counter() - started

    def measure(self, label: str, pipe: DiffusionPipeline, quantize_seconds: float | None) -> None:
        _, denoiser = find_denoiser(pipe)
        run: Run = generate(pipe, self.inputs, self.settings)
        quality = paired_quality(self.full.pictures, run.pictures)
        tags = {"model": self.model, "recipe": label}
        self.records += [
            Record.exact("ratio_to_fp16", half_precision_bytes(denoiser) / self.bytes, **tags),
            Record.exact("denoiser_relative_error", relative_error(self.trajectory, denoiser).overall, **tags),
            Record.mean("psnr_db", quality.psnr.tolist(), **tags),
            Record.mean("ssim", quality.ssim.tolist(), **tags),
            Record.mean("final_latent_error", latent_errors(self.full.latents, run.latents)[-1].tolist(), **tags),
            Record.exact("generate_over_float32", run.seconds / self.full.seconds, **tags),
        ]
        if quantize_seconds is not None:
            self.records.append(Record.exact("quantize_seconds", quantize_seconds, **tags))
        print(self.row(label), flush=True)

    def row(self, label: str) -> str:
        found = {r.name: r for r in self.records if r.tags["recipe"] == label}
        psnr, ssim, quantize = found["psnr_db"], found["ssim"], found.get("quantize_seconds")
        cells = [
            f"{self.model}, {label}",
            f"{found['ratio_to_fp16'].value:.3f}",
            f"{100 * found['denoiser_relative_error'].value:.2f} %",
            f"{psnr.value:.1f} ({psnr.low:.1f} to {psnr.high:.1f})",
            f"{ssim.value:.3f} ({ssim.low:.3f} to {ssim.high:.3f})",
            f"{quantize.value:.0f}" if quantize else "",
            f"{found['generate_over_float32'].value:.2f}",
        ]
        return f"| {' | '.join(cells)} |"


HEADER = "| model, recipe | of fp16 | denoiser error | PSNR, dB | SSIM | quantize, s | generate / float32 |"


def compare(model: str, recipes: dict[str, Recipe], settings: DemoSettings) -> Comparison:
    comparison = Comparison(model, settings)
    for label, recipe in recipes.items():
        pipe, seconds = comparison.quantized(recipe)
        comparison.measure(label, pipe, seconds)
        if label == "w4a8":
            comparison.measure(SAME_WEIGHTS, with_float_activations(pipe), None)
    return comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--models", nargs="+", default=["emoji-sd", "emoji-dit"])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("assets/benchmarks/recipes.json"))
    args = parser.parse_args()
    settings = DemoSettings(args.assets, tuple(args.models), args.count, replayed=8, calibration=Calibration())
    print(HEADER + "\n|" + " --- |" * 7, flush=True)
    chosen = {label: RECIPES[label] for label in args.recipes}
    done: list[Comparison] = [compare(model, chosen, settings) for model in args.models]
    about = {
        "pictures": args.count,
        "steps": settings.steps,
        "guidance_scale": settings.guidance,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "date": datetime.date.today().isoformat(),
    }
    report = Report("recipes", tuple(record for c in done for record in c.records), about)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report.write(args.out)


if __name__ == "__main__":
    main()
