"""The work sheet of one layer: what methods read and write between the float layer and its integer form."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff.calibration import LayerStatistics
from qdiff.calibration.bounds import ACTIVATION_LEVELS, activation_bounds
from qdiff.methods.contract import ActivationRange, RoundedWeight, Rounding
from qdiff.numerics.gemm_layout import channels_to_gemm
from qdiff.recipe import LayerPlan


class LowRankBranch(NamedTuple):
    """Adds up @ down to the rounded weight. down: float32 [r, K], of the smoothed input.  up: float32 [N, r]."""

    down: Float[Tensor, "r K"]
    up: Float[Tensor, "N r"]


@dataclasses.dataclass
class LayerState:
    """One layer, in GEMM layout (K = segment, tap, channel), being transformed and rounded.

    weight:      float32 [N, K], what is left to round: smoothed, the low-rank branch taken off.
    taps:        kernel positions of a convolution; 1 otherwise.
    statistics:  of the layer's *raw* input; None where it was not calibrated.
    rounding, range:  the methods that come after the transforms, so that a transform can try candidates with them.
    smooth:      float32 [C] or None: x * smooth is what is quantized; `weight` already holds the inverse.
    low_rank:    the branch, of the smoothed input, or None.
    branch_dtype:  that a branch will be stored in.
    """

    plan: LayerPlan
    weight: Float[Tensor, "N K"]
    taps: int
    rounding: Rounding
    range: ActivationRange | None = None
    statistics: LayerStatistics | None = None
    smooth: Float[Tensor, " C"] | None = None
    low_rank: LowRankBranch | None = None
    branch_dtype: torch.dtype = torch.float16
    _balance: Float[Tensor, "R 1"] | None = dataclasses.field(default=None, repr=False)
    _raw_inputs: Float[Tensor, "R K"] | None = dataclasses.field(default=None, repr=False)

    @property
    def channels(self) -> int:
        """Input channels C; K = C * taps."""
        return sum(self.plan.segments)

    def along_k(self, per_channel: Float[Tensor, " C"]) -> Float[Tensor, " K"]:
        """A value a channel, repeated over the taps in the order of the weight's input axis."""
        return channels_to_gemm(per_channel, self.plan.segments, self.taps)

    def per_channel(self, along_k: Float[Tensor, "... K"]) -> Float[Tensor, "... C taps"]:
        """The inverse view of an input axis: what belongs to each channel, over the taps."""
        parts = along_k.split([channels * self.taps for channels in self.plan.segments], -1)
        return torch.cat([part.unflatten(-1, (self.taps, -1)).transpose(-1, -2) for part in parts], -2)

    def inputs(self) -> Float[Tensor, "R K"] | None:
        """The calibration samples as the layer multiplies them: smoothed, not quantized; None where there are none."""
        if self.statistics is None or self.statistics.samples is None:
            return None
        if self._raw_inputs is None:
            self._raw_inputs = self.statistics.samples.gemm(self.plan.segments)
        return self._raw_inputs if self.smooth is None else self._raw_inputs * self.along_k(self.smooth)

    def quantized_inputs(self) -> Float[Tensor, "R K"] | None:
        """The same on the int8 grid that the activation range gives now; as they are where activations stay 16-bit."""
        inputs = self.inputs()
        if inputs is None or self.range is None:
            return inputs
        step = self._input_steps(inputs)
        return (inputs / step).round_().clamp_(-ACTIVATION_LEVELS, ACTIVATION_LEVELS).mul_(step)

    def _input_steps(self, inputs: Float[Tensor, "R K"]) -> Float[Tensor, "R K_or_1"]:
        table = None if self.range is None else self.range.scales(self)
        if table is None or self.statistics is None or self.statistics.samples is None:
            largest = inputs.abs().amax(1, keepdim=True)
            return torch.where(largest > 0, largest / ACTIVATION_LEVELS, 1.0)
        rows = table.expand(len(self.statistics.timesteps), -1)[self.statistics.samples.timesteps]
        widths = torch.tensor([channels * self.taps for channels in self.plan.segments], device=rows.device)
        return rows.repeat_interleave(widths, 1)

    def measured_steps(self, estimator: str, percentile: float, per_timestep: bool) -> Float[Tensor, "rows S"]:
        """bound / 127 of the smoothed input, [T, S] or [1, S]; errors count as the weight amplifies them."""
        if self.statistics is None:
            raise ValueError(f"{self.plan.name}: a measured activation range needs calibration statistics")
        gain = self.per_channel(self.weight.square().sum(0)).sum(1)
        bounds = activation_bounds(
            self.statistics, self.plan.segments, estimator, per_timestep, self.smooth, gain, percentile
        )
        return torch.where(bounds > 0, bounds / ACTIVATION_LEVELS, 1.0)

    def importance(self) -> Float[Tensor, " K"] | None:
        """Mean square of every (smoothed) input: what a squared error of its weights costs; None without samples.

        Every timestep counts alike, however large its activations: see `balance`.
        """
        inputs = self.inputs()
        return None if inputs is None else (inputs * self.balance()).square().mean(0)

    def balance(self) -> Float[Tensor, "R 1"]:
        """One over the root mean square of the raw input at each sample's timestep.

        The sampler adds up the relative errors of all steps: one with large activations must not drown the others.
        """
        if self.statistics is None or self.statistics.samples is None:
            raise ValueError(f"{self.plan.name}: no calibration samples to balance")
        if self._balance is None:
            energy = self.statistics.samples.values.float().square().mean((1, 2))
            of_row = self.statistics.samples.timesteps
            steps = len(self.statistics.timesteps)
            sums = torch.zeros(steps, device=energy.device).index_add_(0, of_row, energy)
            mean = sums / of_row.bincount(minlength=steps).clamp_min(1)
            self._balance = torch.where(mean > 0, mean.rsqrt(), 1.0)[of_row, None]
        return self._balance

    def output_error(self, rounded: RoundedWeight) -> float:
        """Relative squared error of the layer's output on the samples, activations quantized as they will be.

        Without samples: the relative squared error of the weight. The low-rank branch sees unquantized inputs.
        """
        inputs, quantized = self.inputs(), self.quantized_inputs()
        if inputs is None or quantized is None:
            error, whole = self.weight - rounded.dequantize(), self.whole_weight()
        else:
            inputs, quantized = inputs * self.balance(), quantized * self.balance()
            error = inputs @ self.weight.T - quantized @ rounded.dequantize().T
            whole = inputs @ self.whole_weight().T
        return float(error.square().sum() / whole.square().sum().clamp_min(torch.finfo(torch.float32).tiny))

    def whole_weight(self) -> Float[Tensor, "N K"]:
        """The smoothed weight with the low-rank branch put back."""
        return self.weight if self.low_rank is None else self.weight + self.low_rank.up @ self.low_rank.down

    def with_weight(self, weight: Float[Tensor, "N K"], **changes: object) -> LayerState:
        """A candidate: the same layer with another weight to round (and, say, another `smooth`)."""
        return dataclasses.replace(self, weight=weight, **changes)  # type: ignore[arg-type]

    def some_rows(self, count: int) -> LayerState:
        """The layer with at most `count` of its output rows, evenly spaced: cheap to try candidates on."""
        rows = len(self.weight)
        if rows <= count:
            return self.with_weight(self.weight)
        chosen = torch.arange(count, device=self.weight.device) * rows // count
        branch = self.low_rank and LowRankBranch(self.low_rank.down, self.low_rank.up[chosen])
        return self.with_weight(self.weight[chosen], low_rank=branch)
