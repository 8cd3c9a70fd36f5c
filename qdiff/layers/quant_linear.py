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
        first, product = self._buffers["first_input"], self._buffers["first_output"]
        if first is not None and product is not None and x.dim() == 3 and x.shape[1]:
            known = same_token(x[:, 0], first)[:, None]
            y[:, 0] = torch.where(known, product.to(y.dtype), y[:, 0])
        return y

    def _product(self, x: Tensor) -> Tensor:
        own, mode, dtype = self._buffers, self.plan.range_mode, x.dtype
        weights, bias, up = (own["codes"], own["multipliers"], own["codebook"], own["scale"]), own["bias"], own["up"]
        four_bit = self.plan.stored_bits == 4
        if mode == "none" or (mode == "dynamic" and four_bit and x.numel() <= FEW_ROWS * x.shape[-1]):
            inputs, smooth = self._transformed(x, -1)
            inputs = inputs if inputs.dtype == dtype else inputs.to(dtype)
            return w4a16_linear(inputs, smooth, *weights, self.storage_block, bias, own["down"], up)
        codes, scale, low = self._quantize(x)
        if four_bit:
            return w4a8_linear(codes, scale, *weights, self.storage_block, bias, low, up, None, dtype)
        return w8a8_linear(codes, scale, own["codes"], own["scale"], bias, low, up, None, dtype)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The codes, their scales, and what the branch reads if there is one."""
        dtype, down = x.dtype, self._buffers["down"]
        x, smooth = self._transformed(x, -1)
        if self.plan.range_mode == "dynamic":
            codes, scale, low = quantize_per_token(x, smooth, down, self._levels)
            if down is None:
                return codes, scale, None
            return codes, scale, low if low.dtype == dtype else low.to(dtype)
        branch = None if down is None else low_rank_down(x.to(dtype), smooth, down)
        batched = x if x.dim() > 1 else x[None]
        scale = self._input_scales(batched.shape[0])
        codes = quantize_per_sample(batched, scale, smooth, self.segments, -1, self._levels)
        return codes if x.dim() > 1 else codes[0], scale.flatten(), branch

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float weight [out_features, in_features] applied to the raw input, made anew on each access."""
        return self._float_matrix(1).to(self.compute_dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
            + self._describe()
        )
