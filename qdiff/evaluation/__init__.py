"""What quantization cost: picture quality, error along the trajectory, bytes, and reports of them.

Nothing here knows a pipeline's class: it takes pictures, modules and callables, so it measures any pipeline.
"""

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

__all__ = [
    "PairedQuality",
    "Record",
    "Report",
    "Trajectory",
    "TrajectoryError",
    "half_precision_bytes",
    "latent_errors",
    "paired_quality",
    "record_denoiser",
    "record_latents",
    "relative_error",
    "stored_bytes",
]
