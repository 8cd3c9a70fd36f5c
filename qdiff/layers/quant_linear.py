"""A linear layer with quantized weights and, by its plan, quantized activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qdiff.layers.quantized_weights import NO_SIZES, LayerSizes, QuantizedWeights
from qdiff.layers.weight_buffers import WeightBuffers
from qdiff.numerics.first_token import same_token
from qdiff.ops import low_rank_down, quantize_per_sample, quantize_per_token, w4a8_linear, w4a16_linear, w8a8_linear

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

    def __init__(self, layer: nn.Linear, plan: LayerPlan, sizes: LayerSizes) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would make float parameters
        self.in_features, self.out_features = layer.in_features, layer.out_features
        if plan.segments != (layer.in_features,):
            raise ValueError(
                f"{plan.name}: segments {plan.segments}, expected one of {layer.in_features} for a linear layer"
            )
        self._register(layer.out_features, 1, plan, layer, sizes)

    @classmethod
    def empty(cls, layer: nn.Linear, plan: LayerPlan, sizes: LayerSizes = NO_SIZES) -> QuantLinear:
        """Every buffer at its final shape and dtype, uninitialized, to load a `state_dict` into.

        On the float layer's device, which may be "meta".

        Args:
            layer: the float layer, for its sizes, bias, dtype and device.
            plan: what is decided about it.
            sizes: of the buffers that the plan leaves open.
        """
        return cls(layer, plan, sizes)

    @classmethod
    @torch.no_grad()
    def from_float(cls, layer: nn.Linear, plan: LayerPlan, weights: QuantizedWeights) -> QuantLinear:
        """The layer with these numbers; the float layer is not changed."""
        quantized = cls.empty(layer, plan, LayerSizes.of_weights(weights, layer.bias))
        quantized._fill(weights, layer.bias)
        return quantized.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self._product(x)
        if self.first_input is not None and self.first_output is not None and x.dim() == 3 and x.shape[1]:
            known = same_token(x[:, 0], self.first_input)[:, None]
            y[:, 0] = torch.where(known, self.first_output.to(y.dtype), y[:, 0])
        return y

    def _product(self, x: Tensor) -> Tensor:
        packed = (self.codes, self.multipliers, self.codebook, self.scale, self.storage_block)
        few = self.plan.range_mode == "dynamic" and self.plan.stored_bits == 4 and x.numel() <= FEW_ROWS * x.shape[-1]
        if few or self.plan.range_mode == "none":
            inputs, smooth = self._transformed(x, -1)
            return w4a16_linear(inputs.to(x.dtype), smooth, *packed, self.bias, self.down, self.up)
        codes, scale, low = self._quantize(x)
        if self.plan.stored_bits == 8:
            return w8a8_linear(codes, scale, self.codes, self.scale, self.bias, low, self.up, None, x.dtype)
        return w4a8_linear(codes, scale, *packed, self.bias, low, self.up, None, x.dtype)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The codes, their scales [R], and what the branch reads if there is one."""
        dtype, levels = x.dtype, self.plan.activation_levels
        x, smooth = self._transformed(x, -1)
        if self.plan.range_mode == "dynamic":
            codes, scale, low = quantize_per_token(x, smooth, self.down, levels)
            return codes, scale.flatten(), None if self.down is None else low.to(dtype)
        branch = None if self.down is None else low_rank_down(x.to(dtype), smooth, self.down)
        batched = x if x.dim() > 1 else x[None]
        scale = self._input_scales(batched.shape[0])
        codes = quantize_per_sample(batched, scale, smooth, self.segments, -1, levels)
        return codes.view(x.shape), scale.flatten(), branch

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float weight [out_features, in_features] applied to the raw input, made anew on each access."""
        return self._float_matrix(1).to(self.compute_dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
            + self._describe()
        )
