"""Attention of diffusers with quantized probabilities: a processor that takes the place of the usual one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from qdiff.methods import resolve
from qdiff.methods.contract import Probabilities
from qdiff.recipe import MethodSpec

# What `QuantizedProbabilities` computes, and no more: others rotate, join texts, or normalize as it would not.
_KNOWN = (AttnProcessor, AttnProcessor2_0)


@dataclass(frozen=True)
class QuantizedProbabilities:
    """softmax(Q K^T / sqrt(d)) V with the method's quantizer around the softmax; else as diffusers' `AttnProcessor2_0`.

    Probabilities are made explicitly, in float32: [batch, heads, queries, keys].
    """

    method: Probabilities

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_size = hidden_states.shape[2:] if hidden_states.ndim == 4 else None
        if image_size is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        scores = (query.float() @ key.float().transpose(-1, -2)) * query.shape[-1] ** -0.5
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
            scores += mask.view(len(context), attn.heads, -1, mask.shape[-1])
        probabilities = self.method.quantize(scores.softmax(-1))

        mixed = (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[1](attn.to_out[0](mixed))
        if image_size is not None:
            out = out.transpose(-1, -2).unflatten(-1, image_size)
        return (out + residual if attn.residual_connection else out) / attn.rescale_output_factor


def check_probabilities(denoiser: nn.Module, spec: MethodSpec | None) -> None:
    """Refuse a denoiser whose attention cannot be given the method.

    Raises:
        ValueError: an unknown method or option, no attention, or attention of another kind, which is named.
    """
    if spec is None:
        return
    resolve(spec, Probabilities)  # type: ignore[type-abstract]
    attentions = _attentions(denoiser)
    for name, module in attentions.items():
        if not isinstance(module, Attention) or type(module.processor) not in _KNOWN:
            raise ValueError(
                f"probabilities {spec.name!r} know attention with AttnProcessor2_0 only: {name!r} is "
                f"{type(module).__name__} with {type(module.processor).__name__}; leave `probabilities` out"
            )
    if not attentions:
        raise ValueError(f"probabilities {spec.name!r}: the {type(denoiser).__name__} has no attention; leave it out")


def quantize_probabilities(denoiser: nn.Module, spec: MethodSpec | None) -> None:
    """Put the method into every attention of a denoiser that `check_probabilities` found fit."""
    if spec is not None:
        processor = QuantizedProbabilities(resolve(spec, Probabilities))  # type: ignore[type-abstract]
        for module in _attentions(denoiser).values():
            module.processor = processor


def describe_probabilities(denoiser: nn.Module) -> str:
    """What the attention of a denoiser does with its probabilities now; empty where nothing."""
    methods = [
        module.processor.method
        for module in _attentions(denoiser).values()
        if isinstance(module.processor, QuantizedProbabilities)
    ]
    return f"probabilities of {len(methods)} attention layers: {methods[0]}" if methods else ""


def _attentions(denoiser: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in denoiser.named_modules() if hasattr(module, "processor")}
