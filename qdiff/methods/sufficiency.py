"""Whether calibration saw enough for what the methods of a recipe make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qdiff.calibration import Statistics
from qdiff.methods.registry import methods_of
from qdiff.recipe import LayerPlan

# Rows of a layer's input below which an output error says little: fewer than the least width of a group of weights.
LEAST_ROWS = 16


def shortages(plans: Mapping[str, LayerPlan], statistics: Statistics) -> list[str]:
    """A sentence for each way in which the statistics fall short, with the numbers; none where they do not."""
    found = []
    rows = {
        name: len(layer.samples.timesteps)
        for name, layer in statistics.layers.items()
        if name in plans and layer.samples is not None
    }
    if few := [name for name, count in rows.items() if count < LEAST_ROWS]:
        least = min(rows[name] for name in few)
        found.append(
            f"too few calibration samples: {_named(few)} saw as few as {least} rows of input, at least {LEAST_ROWS} "
            "are needed; calibrate with more prompts or steps"
        )
    moments = {
        name: layer.moments for name, layer in statistics.layers.items() if name in plans and layer.moments is not None
    }
    if singular := [name for name, moment in moments.items() if moment.rows < len(moment.mean)]:
        found.append(
            f"too few calibration samples: {_named(singular)} saw fewer rows of input than it has columns, and a "
            "Hessian of these is singular but for its damping; calibrate with more prompts or steps"
        )
    seen = len(statistics.timesteps)
    ranges = {name: methods_of(plan)[2] for name, plan in plans.items()}
    wanted = {name: range_.least_timesteps for name, range_ in ranges.items() if range_ is not None}
    if short := [name for name, count in wanted.items() if count > seen]:
        most = max(wanted[name] for name in short)
        found.append(
            f"too few calibrated timesteps: the activation range of {_named(short)} asks for {most}, {seen} were seen; "
            "calibrate with more steps"
        )
    return found


def _named(layers: Sequence[str]) -> str:
    more = len(layers) - 3
    return ", ".join(layers[:3]) + (f" and {more} more layers" if more > 0 else "")
