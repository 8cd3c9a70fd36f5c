"""A linear layer with quantized weights and, by its plan, quantized activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qdiff.layers.quantized_weights import QuantizedWeights
from qdiff.layers.weight_buffers import WeightBuffers
from qdiff.ops import low_rank_down, quantize_per_sample, quantize_per_token, w4a8_linear, w4a16_linear, w8a8_linear
from qdiff.ops.w4a16_linear import float_weight

if TYPE_CHECKING:
    from qdiff.recipe import LayerPlan


class QuantLinear(WeightBuffers, nn.Linear):
    """`nn.Linear` on quantized numbers: with x_s = x * smooth, y = Q(x_s) @ Q(R).T + (x_s @ down.T) @ up.T + bias,
    where R = W / smooth - up @ down (SVDQuant, arXiv 2411.05007).

    The output has the input's dtype. Its buffers are listed in `WeightBuffers`.
    """

    def __init__(
        self, layer: nn.Linear, plan: LayerPlan, *, rank: int = 0, has_smooth: bool = False, scale_rows: int = 1
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would make float parameters
        self.in_features, self.out_features = layer.in_features, layer.out_features
        if plan.segments != (layer.in_features,):
            raise ValueError(
                f"{plan.name}: segments {plan.segments}, expected one of {layer.in_features} for a linear layer"
            )
        self._register(layer.out_features, layer.in_features, plan, layer, rank, has_smooth, scale_rows)

    @classmethod
    def empty(
        cls, layer: nn.Linear, plan: LayerPlan, rank: int = 0, has_smooth: bool = False, scale_rows: int = 1
    ) -> QuantLinear:
        """Every buffer at its final shape and dtype, uninitialized, to load a `state_dict` into.

        On the float layer's device, which may be "meta".

        Args:
            layer: the float layer, for its sizes, bias, dtype and device.
            plan: what is decided about it.
            rank: of the low-rank branch; 0 for none.
            has_smooth: whether there is a smoothing vector.
            scale_rows: T, rows of the activation scale table (1 when static; not looked at when dynamic or none).
        """
        return cls(layer, plan, rank=rank, has_smooth=has_smooth, scale_rows=scale_rows)

    @classmethod
    @torch.no_grad()
    def from_float(cls, layer: nn.Linear, plan: LayerPlan, weights: QuantizedWeights) -> QuantLinear:
        """The layer with these numbers; the float layer is not changed."""
        rank = 0 if weights.low_rank is None else weights.low_rank[0].shape[0]
        scale_rows = 1 if weights.act_scales is None else weights.act_scales.shape[0]
        quantized = cls(layer, plan, rank=rank, has_smooth=weights.smooth is not None, scale_rows=scale_rows)
        quantized._fill(weights, layer.bias)
        return quantized.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.plan.range_mode == "none":
            group_size, branch = self.plan.group_size, (self.down, self.up)
            return w4a16_linear(
                x, self.smooth, self.codes, self.multipliers, self.scale, group_size, self.bias, *branch
            )
        codes, scale = self._quantize(x)
        low = None if self.down is None else low_rank_down(x, self.smooth, self.down)
        if self.multipliers is None:
            return w8a8_linear(codes, scale, self.codes, self.scale, self.bias, low, self.up, x.dtype)
        group_size = self.plan.group_size
        return w4a8_linear(
            codes, scale, self.codes, self.multipliers, self.scale, group_size, self.bias, low, self.up, x.dtype
        )

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.plan.range_mode == "dynamic":
            codes, scale = quantize_per_token(x, self.smooth)
            return codes, scale.flatten()
        if x.dim() == 1:
            codes, scale = self._quantize(x[None])
            return codes[0], scale
        scale = self._input_scales(x.shape[0])
        return quantize_per_sample(x, scale, self.smooth, self.plan.segments, -1), scale.flatten()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float weight [out_features, in_features] applied to the raw input, made anew on each access."""
        matrix = float_weight(
            self.smooth, self.codes, self.multipliers, self.scale, self.plan.group_size, self.down, self.up
        )
        return matrix.to(self.compute_dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
            + self._describe()
        )
