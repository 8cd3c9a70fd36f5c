"""A quantized layer whose weight is still being chosen: in float arithmetic, which gradients pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.denoising import StepTracker
from qdiff.layers.quant_linear import FEW_ROWS
from qdiff.layers.quantized_weights import QuantizedWeights
from qdiff.numerics.first_token import same_token
from qdiff.numerics.gemm_layout import from_gemm
from qdiff.numerics.input_pipeline import InputPipeline
from qdiff.recipe import LayerPlan


class OpenLayer(nn.Module):
    """What the quantized layer of these numbers computes, but for the order of sums, with `matrix` for its weight.

    The gradient passes the rounding of activations as if it were not there, and ends where they are clipped. Products
    are in the input's dtype.

    Attributes:
        matrix: float32 [N, K], of the transformed input, in GEMM layout; it may require a gradient.
    """

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, plan: LayerPlan, weights: QuantizedWeights, tracker: StepTracker
    ) -> None:
        super().__init__()
        self.layer, self.plan, self.weights, self.tracker = layer, plan, weights, tracker
        self.pipeline = InputPipeline(weights.shift, weights.index, weights.smooth, weights.rotation)
        self.segments = self.pipeline.segments(plan.segments)
        self.matrix = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        weights, conv = self.weights, isinstance(self.layer, nn.Conv2d)
        inputs = self.pipeline.channels(x.movedim(1, -1) if conv else x)
        quantized = self._on_grid(inputs, x.numel() // x.shape[-1]).to(x.dtype)
        bias = self._bias(x.dtype)
        matrix = self.matrix.to(x.dtype)
        if isinstance(self.layer, nn.Conv2d):
            kernel = from_gemm(matrix, self.segments, self.layer.kernel_size)  # type: ignore[arg-type]  # two sizes
            return F.conv2d(quantized.movedim(-1, 1), kernel, bias, self.layer.stride, self.layer.padding)
        y = F.linear(quantized, matrix, bias)
        if weights.low_rank is not None:
            down, up = (part.to(x.dtype) for part in weights.low_rank)
            y = y + inputs.to(x.dtype) @ down.T @ up.T
        if weights.first_token is not None and x.dim() == 3 and x.shape[1]:
            token, product = weights.first_token
            product = product if self.layer.bias is None else product + self.layer.bias.float()
            first = torch.where(same_token(x[:, 0], token)[:, None], product.to(y.dtype), y[:, 0])
            y = torch.cat([first[:, None], y[:, 1:]], 1)
        return y

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        bias, change = self.layer.bias, self.weights.bias_change
        if change is None:
            return bias
        return (change if bias is None else change + bias.float()).to(dtype)

    def _on_grid(self, inputs: Tensor, rows: int) -> Tensor:
        """Transformed inputs [B, ..., C] where the activation range puts them, float32."""
        plan, levels = self.plan, self.plan.activation_levels
        if plan.range_mode == "none":
            return inputs
        if plan.range_mode == "dynamic":
            if plan.stored_bits == 4 and rows <= FEW_ROWS:
                return inputs
            largest = inputs.detach().abs().amax(-1, keepdim=True)
            step = torch.where(largest > 0, largest / levels, 1.0)
        else:
            step = self._given_steps(inputs)
        units = (inputs / step).clamp(-levels, levels)
        return (units + (units.round() - units).detach()) * step

    def _given_steps(self, inputs: Tensor) -> Tensor:
        table = self.weights.act_scales
        assert table is not None  # of static and temporal ranges
        batch = inputs.shape[0] if inputs.dim() > 1 else 1
        rows = table if self.plan.range_mode == "static" else self.tracker.resample(table, batch)
        widths = torch.tensor(self.segments, device=rows.device)
        channels = rows.repeat_interleave(widths, 1)
        return channels.view(len(rows), *[1] * (inputs.dim() - 2), -1) if inputs.dim() > 1 else channels[0]
