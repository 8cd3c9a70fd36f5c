"""Transformer blocks whose norms quantize: all layers after a norm read the codes of one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from qdiff.layers import QuantLinear
from qdiff.layers.norm_vectors import has_vectors_of, norm_vectors
from qdiff.layers.quant_linear import FEW_ROWS
from qdiff.layers.side_by_side import lay_side_by_side, side_by_side
from qdiff.ops import quantize_layer_norm
from qdiff.plugin.fused_feed_forward import FusedFeedForward
from qdiff.plugin.plain import are_plain, drops_nothing, is_inference
from qdiff.plugin.text_codes import text_codes

_Codes = tuple[Tensor, Tensor]  # and their scales

# What diffusers' UNets hand every block; of these, this kind looks at the last alone.
_KNOWN = ("timestep", "class_labels", "added_cond_kwargs", "encoder_hidden_states")

# Modules that some attentions have beside the four layers.
_ADDED = {"spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross"}


class FusedTransformerBlock(BasicTransformerBlock):
    """diffusers' block of self-attention, attention to a text and a feed-forward, each after a layer norm.

    A norm makes the codes that the layers after it multiply, and the layer before a residual adds it, rounded together
    with its product and not once more. Where anybody could see what is left out (a hook, a wrapped layer, an attention
    processor of another kind, a mask, a gradient, autocast), it computes as diffusers does.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        context = kwargs.get("encoder_hidden_states")
        unknown = args or any(not _is_nothing(value) for name, value in kwargs.items() if name not in _KNOWN)
        own: dict[str, Any] = self._modules  # of which attributes would take ten times as long
        if unknown or not self._fuses(own, hidden_states, context):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        x = _attend(own["attn1"], _quantized(own["norm1"], hidden_states), None, hidden_states)
        if "attn2" in own:
            x = _attend(own["attn2"], _quantized(own["norm2"], x), context, x)
        return own["ff"].forward_quantized(*_quantized(own["norm3"], x), x)  # type: ignore[no-any-return]

    def lay_out(self) -> None:
        """Make one product of the layers of an attention that have one input, where they are alike."""
        for name, attention in self._modules.items():
            if name in ("attn1", "attn2") and type(attention) is Attention:
                layers = (attention.to_k, attention.to_v)
                lay_side_by_side(layers if attention.is_cross_attention else (attention.to_q, *layers))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FusedTransformerBlock:
        super()._apply(fn, recurse)
        self.lay_out()
        return self

    def _fuses(self, own: dict[str, Any], x: Tensor, context: Tensor | None) -> bool:
        if not is_inference(x) or x.dim() != 3 or x.shape[0] * x.shape[1] <= FEW_ROWS:
            return False
        if self.norm_type != "layer_norm" or self.only_cross_attention or self._chunk_size is not None:
            return False
        ff = own["ff"]
        if (
            self.pos_embed is not None
            or type(ff) is not FusedFeedForward
            or not are_plain(ff)
            or not ff.takes_quantized
        ):
            return False
        second = "attn2" not in own or (_is_norm(own["norm2"], x) and _is_attention(own["attn2"], context))
        return second and _is_norm(own["norm1"], x) and _is_norm(own["norm3"], x) and _is_attention(own["attn1"], None)


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, dict) and not value)


def _quantized(norm: nn.LayerNorm, x: Tensor) -> _Codes:
    codes, scale = quantize_layer_norm(x, *norm_vectors(norm), norm.eps, None)
    return codes, scale


def _attend(attention: Attention, tokens: _Codes, context: Tensor | None, residual: Tensor) -> Tensor:
    """residual + the attention of tokens to a context, or to themselves, as `AttnProcessor2_0` computes it."""
    own: dict[str, Any] = attention._modules
    batch, heads, dtype = residual.shape[0], attention.heads, residual.dtype
    others = own["to_k"], own["to_v"]
    if context is None:
        query, key, value = _products((own["to_q"], *others), tokens, dtype)
    else:
        query = own["to_q"].forward_quantized(*tokens, dtype)
        if all(layer.takes_codes_of(context) for layer in others):
            key, value = _products(others, text_codes(context), context.dtype)
        else:
            key, value = (layer(context) for layer in others)
    parts: Any = [part.view(batch, -1, heads, part.shape[-1] // heads).transpose(1, 2) for part in (query, key, value)]
    mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(query.shape)
    return own["to_out"]._modules["0"].forward_activated(mixed, "none", residual)  # type: ignore[no-any-return]


def _products(layers: Sequence[QuantLinear], tokens: _Codes, dtype: torch.dtype) -> Sequence[Tensor]:
    """What each layer makes of the same tokens: in one product where their weights lie side by side."""
    whole = side_by_side(layers)
    if whole is None:
        return [layer.forward_quantized(*tokens, dtype) for layer in layers]
    return whole.forward_quantized(*tokens, dtype).chunk(len(layers), dim=-1)


def _is_norm(module: nn.Module, x: Tensor) -> bool:
    same = type(module) is nn.LayerNorm and module.normalized_shape == x.shape[-1:]
    return same and has_vectors_of(module, x.dtype) and are_plain(module)


def _is_attention(module: nn.Module, context: Tensor | None) -> bool:
    """Whether this is nothing but four layers of ours and scaled dot products."""
    if type(module) is not Attention or type(module.processor) is not AttnProcessor2_0:
        return False
    if module.residual_connection or module.rescale_output_factor != 1 or _ADDED & module._modules.keys():
        return False
    own: dict[str, Any] = module._modules
    query, key, value, (out, *rest) = own["to_q"], own["to_k"], own["to_v"], own["to_out"]._modules.values()
    if len(rest) != 1 or not drops_nothing(rest[0]) or not are_plain(module, query, key, value, out, *rest):
        return False
    if any(type(layer) is not QuantLinear for layer in (query, key, value, out)) or not query.takes_quantized:
        return False
    return context is not None or (key.takes_quantized and value.takes_quantized)
