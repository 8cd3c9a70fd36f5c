"""Runs the pipeline itself on a few prompts and remembers, per layer and timestep, what its inputs look like."""

from qdiff.calibration.collector import NEEDS, collect
from qdiff.calibration.settings import Calibration
from qdiff.calibration.statistics import LayerStatistics, Moments, Samples, Statistics
from qdiff.calibration.trajectory import run_pipeline

__all__ = ["NEEDS", "Calibration", "LayerStatistics", "Moments", "Samples", "Statistics", "collect", "run_pipeline"]
