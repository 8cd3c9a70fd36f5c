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


# Of so few rows (embeddings of time and text, modulations) reading the weights is all the work. 4-bit weights save
# that; 8-bit activations would save nothing, so these stay as they are, on every device.
FEW_ROWS = 16


class QuantLinear(WeightBuffers, nn.Linear):
    """`nn.Linear` on quantized numbers: with x_s = x * smooth, y = Q(x_s) @ Q(R).T + (x_s @ down.T) @ up.T + bias,
    where R = W / smooth - up @ down (SVDQuant, arXiv 2411.05007).

    The output has the input's dtype. Its buffers are listed in `WeightBuffers`.
    """

    def __init__(
        self,
        layer: nn.Linear,
        plan: LayerPlan,
        *,
        rank: int = 0,
        has_smooth: bool = False,
        scale_rows: int = 1,
        has_codebook: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would make float parameters
        self.in_features, self.out_features = layer.in_features, layer.out_features
        if plan.segments != (layer.in_features,):
            raise ValueError(
                f"{plan.name}: segments {plan.segments}, expected one of {layer.in_features} for a linear layer"
            )
        options = (rank, has_smooth, scale_rows, has_codebook)
        self._register(layer.out_features, layer.in_features, plan, layer, *options)

    @classmethod
    def empty(
        cls,
        layer: nn.Linear,
        plan: LayerPlan,
        rank: int = 0,
        has_smooth: bool = False,
        scale_rows: int = 1,
        has_codebook: bool = False,
    ) -> QuantLinear:
        """Every buffer at its final shape and dtype, uninitialized, to load a `state_dict` into.

        On the float layer's device, which may be "meta".

        Args:
            layer: the float layer, for its sizes, bias, dtype and device.
            plan: what is decided about it.
            rank: of the low-rank branch; 0 for none.
            has_smooth: whether there is a smoothing vector.
            scale_rows: T, rows of the activation scale table (1 when static; not looked at when dynamic or none).
            has_codebook: whether 4-bit codes are looked up in a codebook.
        """
        return cls(layer, plan, rank=rank, has_smooth=has_smooth, scale_rows=scale_rows, has_codebook=has_codebook)

    @classmethod
    @torch.no_grad()
    def from_float(cls, layer: nn.Linear, plan: LayerPlan, weights: QuantizedWeights) -> QuantLinear:
        """The layer with these numbers; the float layer is not changed."""
        rank = 0 if weights.low_rank is None else weights.low_rank[0].shape[0]
        scale_rows = 1 if weights.act_scales is None else weights.act_scales.shape[0]
        has_smooth, has_codebook = weights.smooth is not None, weights.codebook is not None
        quantized = cls.empty(layer, plan, rank, has_smooth, scale_rows, has_codebook)
        quantized._fill(weights, layer.bias)
        return quantized.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        packed = (self.codes, self.multipliers, self.codebook, self.scale, self.storage_block)
        few = self.plan.range_mode == "dynamic" and self.plan.weight_bits == 4 and x.numel() <= FEW_ROWS * x.shape[-1]
        if few or self.plan.range_mode == "none":
            return w4a16_linear(x, self.smooth, *packed, self.bias, self.down, self.up)
        codes, scale, low = self._quantize(x)
        if self.plan.weight_bits == 8:
            return w8a8_linear(codes, scale, self.codes, self.scale, self.bias, low, self.up, None, x.dtype)
        return w4a8_linear(codes, scale, *packed, self.bias, low, self.up, None, x.dtype)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The codes, their scales [R], and what the branch reads if there is one."""
        if self.plan.range_mode == "dynamic":
            codes, scale, low = quantize_per_token(x, self.smooth, self.down)
            return codes, scale.flatten(), None if self.down is None else low
        low = None if self.down is None else low_rank_down(x, self.smooth, self.down)
        batched = x if x.dim() > 1 else x[None]
        scale = self._input_scales(batched.shape[0])
        codes = quantize_per_sample(batched, scale, self.smooth, self.plan.segments, -1)
        return codes.view(x.shape), scale.flatten(), low

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float weight [out_features, in_features] applied to the raw input, made anew on each access."""
        packed = (self.codes, self.multipliers, self.codebook, self.scale, self.storage_block)
        matrix = float_weight(self.smooth, *packed, self.down, self.up)
        return matrix.to(self.compute_dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
            + self._describe()
        )
