"""The work sheet of one layer: what methods read and write between the float layer and its integer form."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor

from qdiff.calibration import LayerStatistics
from qdiff.calibration.bounds import Estimator
from qdiff.calibration.histogram import TensorHistogram, rows_histogram
from qdiff.methods.contract import ActivationRange, RoundedWeight, Rounding
from qdiff.numerics.gemm_layout import channels_to_gemm
from qdiff.numerics.input_pipeline import InputPipeline
from qdiff.recipe import LayerPlan


class LowRankBranch(NamedTuple):
    """Adds up @ down to the rounded weight. down: float32 [r, K], of the smoothed input.  up: float32 [N, r]."""

    down: Float[Tensor, "r K"]
    up: Float[Tensor, "N r"]


@dataclasses.dataclass
class LayerState:
    """One layer, in GEMM layout (K = segment, tap, channel), being transformed and rounded.

    What is quantized of the input x is x_s = rotate((x - shift)[index] * smooth), see `qdiff.numerics.input_pipeline`.

    weight:      float32 [N, K], what is left to round: of x_s, the low-rank branch taken off.
    taps:        kernel positions of a convolution; 1 otherwise.
    padded:      whether it is a convolution that pads its input with zeros.
    statistics:  of the layer's *raw* input; None where it was not calibrated.
    rounding, range:  the methods that come after the transforms, so that a transform can try candidates with them.
    shift, index, smooth, rotation:  float32 [C], int64 [C'], float32 [C'] and int8 [b], or None; `weight` already
                 holds their inverse, and `bias_change` the shift's part.
    bias_change: float32 [N] or None: added to the layer's bias.
    low_rank:    the branch, of x_s, or None.
    first_token: (x_0 float32 [C], W x_0 float32 [N]) of a first token that is kept apart, or None.
    branch_dtype:  that a branch will be stored in.
    """

    plan: LayerPlan
    weight: Float[Tensor, "N K"]
    taps: int
    rounding: Rounding
    padded: bool = False
    range: ActivationRange | None = None
    statistics: LayerStatistics | None = None
    shift: Float[Tensor, " C"] | None = None
    index: Int64[Tensor, " C'"] | None = None
    smooth: Float[Tensor, " C'"] | None = None
    rotation: Int8[Tensor, " b"] | None = None
    bias_change: Float[Tensor, " N"] | None = None
    low_rank: LowRankBranch | None = None
    first_token: tuple[Float[Tensor, " C"], Float[Tensor, " N"]] | None = None
    branch_dtype: torch.dtype = torch.float16
    _balance: Float[Tensor, "R 1"] | None = dataclasses.field(default=None, repr=False)
    _raw_inputs: Float[Tensor, "R K"] | None = dataclasses.field(default=None, repr=False)
    _histograms: tuple[Sequence[object], list[TensorHistogram]] | None = dataclasses.field(default=None, repr=False)

    @property
    def pipeline(self) -> InputPipeline:
        """From the raw input to what is quantized."""
        return InputPipeline(self.shift, self.index, self.smooth, self.rotation)

    @property
    def segments(self) -> tuple[int, ...]:
        """Channel counts with an activation scale each, of what is quantized."""
        return self.pipeline.segments(self.plan.segments)

    @property
    def channels(self) -> int:
        """Channels C of what is quantized; K = C * taps."""
        return sum(self.segments)

    @property
    def widths(self) -> list[int]:
        """Inputs of a weight row that belong to each segment; they add up to K."""
        return [channels * self.taps for channels in self.segments]

    def along_k(self, per_channel: Float[Tensor, " C"]) -> Float[Tensor, " K"]:
        """A value a channel, repeated over the taps in the order of the weight's input axis."""
        return channels_to_gemm(per_channel, self.segments, self.taps)

    def per_channel(self, along_k: Float[Tensor, "... K"]) -> Float[Tensor, "... C taps"]:
        """The inverse view of an input axis: what belongs to each channel, over the taps."""
        parts = along_k.split(self.widths, -1)
        return torch.cat([part.unflatten(-1, (self.taps, -1)).transpose(-1, -2) for part in parts], -2)

    def transform_inputs(self, rows: Float[Tensor, "R K_raw"], shifted: bool = True) -> Float[Tensor, "R K"]:
        """Raw inputs as the layer multiplies them: an affine map, or its linear part with `shifted` off."""
        return self.pipeline.rows(rows, self.plan.segments, self.taps, shifted)

    def raw_weight(self) -> Float[Tensor, "N K_raw"]:
        """The weight, branch and all, that acts on the raw input."""
        return self.pipeline.fold(self.whole_weight(), self.plan.segments, self.taps)

    def add_bias(self, change: Float[Tensor, " N"]) -> None:
        """Change the layer's bias by so much more."""
        self.bias_change = change if self.bias_change is None else self.bias_change + change

    def raw_inputs(self) -> Float[Tensor, "R K_raw"] | None:
        """The calibration samples, float32; None where there are none."""
        if self.statistics is None or self.statistics.samples is None:
            return None
        if self._raw_inputs is None:
            self._raw_inputs = self.statistics.samples.gemm(self.plan.segments)
        return self._raw_inputs

    def inputs(self) -> Float[Tensor, "R K"] | None:
        """The calibration samples as the layer multiplies them: transformed, not quantized; None without samples."""
        rows = self.raw_inputs()
        return None if rows is None else self.transform_inputs(rows)

    def quantized_inputs(self, ratio: Float[Tensor, " S"] | None = None) -> Float[Tensor, "R K"] | None:
        """The same on the int8 grid that the activation range gives now; as they are where activations stay 16-bit.

        ratio: of the grid's steps, `RoundedWeight.step_ratio`.
        """
        inputs = self.inputs()
        return None if inputs is None else self.on_input_grid(inputs, ratio)

    def carried_inputs(self) -> Float[Tensor, "R K"] | None:
        """The rows of `inputs` as they arrive when the layers before are quantized; None where not collected."""
        if self.statistics is None or self.statistics.carried is None:
            return None
        return self.transform_inputs(self.statistics.carried.gemm(self.plan.segments))

    def on_input_grid(
        self, inputs: Float[Tensor, "R K"], ratio: Float[Tensor, " S"] | None = None
    ) -> Float[Tensor, "R K"]:
        """Transformed rows, one for each sample, on the grid of the activation range; as they are without one."""
        if self.range is None:
            return inputs
        step = self.input_steps(inputs)
        if ratio is not None:
            step = step * self.along_segments(ratio)
        return (inputs / step).round_().clamp_(-self.plan.activation_levels, self.plan.activation_levels).mul_(step)

    def input_steps(self, inputs: Float[Tensor, "R K"]) -> Float[Tensor, "R K_or_1"]:
        """The step of the grid that each input of each row meets."""
        table = None if self.range is None else self.range.preview(self)
        if table is None or self.statistics is None or self.statistics.samples is None:
            largest = inputs.abs().amax(1, keepdim=True)
            return torch.where(largest > 0, largest / self.plan.activation_levels, 1.0)
        rows = table.expand(len(self.statistics.timesteps), -1)[self.statistics.samples.timesteps]
        return self.along_segments(rows)

    def along_segments(self, per_segment: Float[Tensor, "... S"]) -> Float[Tensor, "... K"]:
        """A value a channel segment, repeated over its inputs."""
        return per_segment.repeat_interleave(torch.tensor(self.widths, device=per_segment.device), -1)

    def input_histograms(self, per_timestep: bool) -> list[TensorHistogram]:
        """Of |x_s|, for every segment; its rows are the timesteps, or one for all; on the CPU.

        A channel counts as much as the weight amplifies its errors. Where x_s is more than a multiple of x, channel by
        channel, it is that of the samples.
        """
        # The rounding and then the range ask for the same; nobody changes a tensor of the state in place.
        of = (per_timestep, self.statistics, self.weight, self.shift, self.index, self.smooth, self.rotation)
        if self._histograms is None or any(one is not other for one, other in zip(self._histograms[0], of)):
            self._histograms = of, self._measured_histograms(per_timestep)
        return self._histograms[1]

    def _measured_histograms(self, per_timestep: bool) -> list[TensorHistogram]:
        statistics = self.calibrated()
        if self.shift is None and self.index is None and self.rotation is None:
            gain = self.per_channel(self.weight.square().sum(0)).sum(1)
            ends = list(itertools.accumulate(self.segments))
            parts = [slice(end - channels, end) for end, channels in zip(ends, self.segments)]
            return [statistics.histogram(part, self.smooth, gain, per_timestep) for part in parts]
        inputs = self.inputs()
        if inputs is None or statistics.samples is None:
            raise ValueError(
                f"{self.plan.name}: the range of a shifted, split or rotated input is measured on samples, and "
                "calibration kept none; a method before it must name 'samples' in `needs`"
            )
        of_row = statistics.samples.timesteps.cpu()
        rows, table_rows = (of_row, len(statistics.timesteps)) if per_timestep else (torch.zeros_like(of_row), 1)
        gains = self.weight.square().sum(0).cpu().split(self.widths)
        parts_of_inputs = inputs.cpu().split(self.widths, 1)
        return [rows_histogram(part, rows, table_rows, gain) for part, gain in zip(parts_of_inputs, gains)]

    def measured_steps(self, estimator: Estimator, per_timestep: bool) -> Float[Tensor, "rows S"]:
        """bound / levels of x_s, [T, S] or [1, S]; errors count as the weight amplifies them."""
        statistics, levels = self.calibrated(), self.plan.activation_levels
        if estimator.name == "minmax" and self.shift is None and self.index is None and self.rotation is None:
            bounds = statistics.absmax(self.segments, self.smooth)  # needs no histogram
            bounds = bounds if per_timestep else bounds.amax(0, keepdim=True)
        else:
            bounds = torch.stack([estimator.bound(part, levels) for part in self.input_histograms(per_timestep)], 1)
        return torch.where(bounds > 0, bounds / levels, 1.0).to(self.weight.device)

    def calibrated(self) -> LayerStatistics:
        """The statistics; raises `ValueError` where there are none."""
        if self.statistics is None:
            raise ValueError(f"{self.plan.name}: a measured activation range needs calibration statistics")
        return self.statistics

    def importance(self) -> Float[Tensor, " K"] | None:
        """Mean square of every (smoothed) input: what a squared error of its weights costs; None without samples.

        Every timestep counts alike, however large its activations: see `balance`.
        """
        inputs = self.inputs()
        return None if inputs is None else (inputs * self.balance()).square().mean(0)

    def hessian(self) -> Float[Tensor, "K K"] | None:
        """E[b^2 x_s x_s^T], the second moment of what the layer multiplies, every timestep counting alike.

        Half the second derivative of the layer's squared output error by a row of its weight. None where calibration
        kept no moments.
        """
        if self.statistics is None or self.statistics.moments is None:
            return None
        moments = self.statistics.moments.gemm(self.plan.segments)
        # x_s = T x + c: both sides of the moment take T, and what c adds follows from the mean.
        halfway = self.transform_inputs(moments.gram, shifted=False).T
        hessian = self.transform_inputs(halfway, shifted=False)
        if self.shift is None:
            return hessian
        offset = self.transform_inputs(torch.zeros_like(moments.mean)[None])[0]
        mean = self.transform_inputs(moments.mean[None], shifted=False)[0]
        cross = torch.outer(mean, offset)
        return hessian + cross + cross.T + moments.weight * torch.outer(offset, offset)

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
        inputs, quantized = self.inputs(), self.quantized_inputs(rounded.step_ratio)
        if inputs is None or quantized is None:
            error, whole = self.weight - rounded.dequantize(), self.whole_weight()
        else:
            inputs, quantized = inputs * self.balance(), quantized * self.balance()
            error = inputs @ self.weight.T - quantized @ rounded.dequantize().T
            raw = self.raw_inputs()
            if self.shift is None or raw is None:
                whole = inputs @ self.whole_weight().T
            else:  # in proportion to the same output, whatever the shift
                whole = (raw * self.balance()) @ self.raw_weight().T
        return float(error.square().sum() / whole.square().sum().clamp_min(torch.finfo(torch.float32).tiny))

    def whole_weight(self) -> Float[Tensor, "N K"]:
        """The weight of x_s with the low-rank branch put back."""
        return self.weight if self.low_rank is None else self.weight + self.low_rank.up @ self.low_rank.down

    def with_weight(self, weight: Float[Tensor, "N K"], **changes: object) -> LayerState:
        """A candidate: the same layer with another weight to round (and, say, another `smooth`)."""
        return dataclasses.replace(self, weight=weight, **changes)  # type: ignore[arg-type]

    def some_rows(self, count: int) -> LayerState:
        """The layer with at most `count` of its output rows, evenly spaced: cheap to try candidates on.

        Its `bias_change` is None.
        """
        rows = len(self.weight)
        if rows <= count:
            return self.with_weight(self.weight, bias_change=None)
        chosen = torch.arange(count, device=self.weight.device) * rows // count
        branch = self.low_rank and LowRankBranch(self.low_rank.down, self.low_rank.up[chosen])
        return self.with_weight(self.weight[chosen], low_rank=branch, bias_change=None)
