"""What quantization cost: picture quality, error along the trajectory, bytes, and reports of them.

    from qdiff.evaluation import evaluate
    report = evaluate("model", {"w4a8": "model-w4a8"}, "prompts.csv", out="out/evaluation")

`evaluate` does it all; the other names are its parts. Only `sources.py` knows how a pipeline is loaded: everything else
takes pictures, modules and callables, so it measures any pipeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdiff.evaluation.cost import half_precision_bytes, stored_bytes
from qdiff.evaluation.paired import PairedQuality, paired_quality
from qdiff.evaluation.report import Record, Report
from qdiff.evaluation.trajectory import (
    Trajectory,
    TrajectoryError,
    latent_errors,
    record_denoiser,
    record_latents,
    relative_error,
)

if TYPE_CHECKING:
    from qdiff.evaluation.run import evaluate

__all__ = [
    "PairedQuality",
    "Record",
    "Report",
    "Trajectory",
    "TrajectoryError",
    "evaluate",
    "half_precision_bytes",
    "latent_errors",
    "paired_quality",
    "record_denoiser",
    "record_latents",
    "relative_error",
    "stored_bytes",
]


def __getattr__(name: str) -> object:
    # On first use: it needs all that is in this package, and the rest of it does not.
    if name != "evaluate":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qdiff.evaluation.run import evaluate

    globals()[name] = evaluate
    return evaluate
