"""Runs a pipeline on calibration prompts, with its own scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from qdiff.calibration.prompts import BUILTIN_PROMPTS, builtin_labels
from qdiff.calibration.settings import Calibration

IMAGENET_CLASSES = 1000  # what class-conditional diffusers pipelines are trained on, where their config is silent


def run_pipeline(pipe: Any, calibration: Calibration) -> None:
    """Generate every calibration prompt once; the images are thrown away.

    pipe: a diffusers pipeline; it is called by its signature (`prompt`, else `class_labels`, else neither).
    Raises `ValueError` for prompts of a kind that the pipeline does not take.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    subject = next((name for name in ("prompt", "class_labels") if name in accepted), None)
    conditions = _conditions(pipe, calibration, subject)
    common = _common_arguments(calibration, accepted, subject)
    with _silent(pipe), torch.no_grad():
        for start in range(0, len(conditions), calibration.batch_size):
            batch = list(conditions[start : start + calibration.batch_size])
            seeds = range(calibration.seed + start, calibration.seed + start + len(batch))
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            batch_arguments = {subject: batch} if subject else {"batch_size": len(batch)}
            pipe(**batch_arguments, **common, generator=generators)


def _conditions(pipe: Any, calibration: Calibration, subject: str | None) -> Sequence[str | int | None]:
    prompts = calibration.prompts
    if subject == "class_labels":
        labels = builtin_labels(_known_labels(pipe)) if prompts is None else prompts
        return [label if isinstance(label, int) else pipe.get_label_ids([label])[0] for label in labels]
    if subject is None:
        return [None] * len(prompts or BUILTIN_PROMPTS)
    wrong = next((prompt for prompt in prompts or () if not isinstance(prompt, str)), None)
    if wrong is not None:
        raise ValueError(f"calibration prompts of a text pipeline must be strings: got {wrong!r}")
    return BUILTIN_PROMPTS if prompts is None else prompts


def _known_labels(pipe: Any) -> Sequence[int]:
    """The labels that have a name, or else all that the denoiser has an embedding for."""
    named = sorted(set((getattr(pipe, "labels", None) or {}).values()))
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    return named or range(int(config.get("num_embeds_ada_norm") or IMAGENET_CLASSES))


def _common_arguments(calibration: Calibration, accepted: Any, subject: str | None) -> dict[str, Any]:
    """Decoding to pixels teaches nothing about the denoiser: latents where the pipeline can stop there."""
    arguments: dict[str, Any] = {"num_inference_steps": calibration.steps}
    if "output_type" in accepted:
        arguments["output_type"] = "latent" if subject == "prompt" else "pt"
    if calibration.guidance_scale is not None and "guidance_scale" in accepted:
        arguments["guidance_scale"] = calibration.guidance_scale
    return arguments


@contextmanager
def _silent(pipe: Any) -> Iterator[None]:
    """The pipeline's own progress bars off, and as they were in the end."""
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    try:
        yield
    finally:
        pipe._progress_bar_config = bar
