"""Transformers of images that keep channels-last order: what they read and what they leave are views of tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from qdiff.layers import QuantLinear
from qdiff.plugin.plain import are_plain, is_inference
from qdiff.plugin.text_codes import quantized_once


class FusedTransformer2D(Transformer2DModel):
    """diffusers' model, whose blocks share a text's codes, and whose end leaves an image in the order in which it came.

    diffusers copies the image into the other order and adds the residual to that. The last layer adds it instead, if it
    is one of ours that nobody listens to: rounded together with its product and not once more.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        with quantized_once():
            return super().forward(*args, **kwargs)

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if not residual.is_contiguous(memory_format=torch.channels_last):
            return super()._get_output_for_continuous_inputs(  # type: ignore[no-any-return]
                hidden_states, residual, batch_size, height, width, inner_dim
            )

        def image_of(tokens: Tensor) -> Tensor:
            return tokens.reshape(batch_size, height, width, tokens.shape[-1]).permute(0, 3, 1, 2)

        layer: Any = self.proj_out
        if not self.use_linear_projection:
            return layer(image_of(hidden_states)) + residual  # type: ignore[no-any-return]
        if type(layer) is QuantLinear and are_plain(layer) and is_inference(residual):
            tokens = residual.permute(0, 2, 3, 1).reshape(batch_size, height * width, residual.shape[1])
            if hidden_states.dtype == residual.dtype and layer.out_features == tokens.shape[-1]:
                return image_of(layer.forward_activated(hidden_states, "none", tokens))
        return image_of(layer(hidden_states)) + residual
