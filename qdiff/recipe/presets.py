"""The recipes that have a name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qdiff.recipe.recipe import Recipe
from qdiff.recipe.specs import LayerOverride, MethodSpec, WeightSpec

# First and last layers of the UNets and DiTs of diffusers: they see pixels or latents and cost few bytes. Measured on
# emoji-dit: `proj_out_2` alone at 4 bits costs 6 % of denoiser error, with 0.05 % of the weights.
DEFAULT_KEEP = ("conv_in", "conv_out", "pos_embed.proj", "x_embedder", "proj_out", "proj_out_2")

_NEAREST, _UNSEARCHED = MethodSpec.of("nearest"), MethodSpec.of("nearest", search=False)
_EIGHT_BIT = WeightSpec(bits=8, group_size=-1, granularity="channel")

# Embeddings of time, text and sizes that all blocks share: they are few.
_TIME_EMBEDDINGS = ("*time_embedding*", "adaln_single*", "time_text_embed*", "time_embed*")
# Layers that see the timestep and nothing else.
_OF_TIME_ALONE = ("*time_embedding*", "*timestep_embedder*", "*time_emb_proj")
# Of UNets, what the residual stream passes through on its way up and cross-attention's values; of transformers, values,
# the first layer of every feed-forward and tables of classes. Measured with each layer alone at 4 bits (GPTQ): these
# make 55 % of the squared denoiser error of emoji-sd with a fifth of its weights, and 65 % of emoji-dit's with two
# fifths. Embeddings of time make less than 0.1 % once they are rounded on all timesteps.
_SENSITIVE = (
    "*attentions.*.proj_in",
    "*attentions.*.proj_out",
    "*.conv_shortcut",
    "*upsamplers.*.conv",
    "up_blocks.*.conv2",
    "*attn2.to_v",
    "*attn2.to_out.0",
    "transformer_blocks.*.to_v",
    "transformer_blocks.*.to_out.0",
    "transformer_blocks.*.ff.net.0.proj",
    "*class_embedder*",
    "adaln_single*",
    "time_text_embed*",
    "time_embed.*",
)

DEFAULT_OVERRIDES = tuple(LayerOverride(pattern, weight=_EIGHT_BIT) for pattern in _SENSITIVE)

_W4A8 = Recipe(
    name="w4a8",
    rounding=MethodSpec.of("gptq"),
    linear_range=MethodSpec.of("dynamic"),
    conv_range=MethodSpec.of("temporal"),
    keep=DEFAULT_KEEP,
    overrides=DEFAULT_OVERRIDES,
    all_timesteps=_OF_TIME_ALONE,
)

# What every preset that shows one method starts from: weights in groups of 32, activations by token and by timestep,
# rounding to nearest, the shared embeddings of time at 8 bits.
_TIME_8 = tuple(LayerOverride(pattern, weight=_EIGHT_BIT, rounding=_NEAREST) for pattern in _TIME_EMBEDDINGS)
_PLAIN = Recipe(name="plain", keep=DEFAULT_KEEP, overrides=_TIME_8)
_CHANNEL = WeightSpec(4, 32, "channel")
_MINMAX, _MSE, _TDQ = MethodSpec.of("static", estimator="minmax"), MethodSpec.of("static"), MethodSpec.of("tdq")


def _presets() -> Iterator[Recipe]:
    yield _W4A8
    yield _W4A8.replace(name="w4a8-static", conv_range=_MSE)
    yield _W4A8.replace(name="w4a16", activation_bits=16)
    smoothing = (MethodSpec.of("smoothing", alpha=0.5),)
    yield _W4A8.replace(
        name="w8a8", weight=_EIGHT_BIT, rounding=_NEAREST, transforms=smoothing, overrides=(), all_timesteps=()
    )
    # The baseline of Table 1: min-max everywhere, one scale a tensor.
    yield _PLAIN.replace(
        name="naive",
        weight=WeightSpec(4, 64, "tensor"),
        rounding=_UNSEARCHED,
        linear_range=_MINMAX,
        conv_range=_MINMAX,
        split_skips=False,
    )
    # Group-wise weights and token-wise activations, without the distillation (ZeroQuant, arXiv 2206.01861).
    yield _PLAIN.replace(name="zeroquant", rounding=_UNSEARCHED, conv_range=_MINMAX, split_skips=False)
    yield _PLAIN.replace(name="gptq", rounding=MethodSpec.of("gptq"))
    yield _PLAIN.replace(name="adaround", rounding=MethodSpec.of("adaround"))
    # The same, and then block after block (arXiv 2102.05426).
    yield _PLAIN.replace(name="brecq", rounding=MethodSpec.of("adaround", block_iterations=40))
    yield _PLAIN.replace(name="adaquant", rounding=MethodSpec.of("adaquant"))
    yield _PLAIN.replace(name="lq-nets", weight=_CHANNEL, rounding=MethodSpec.of("lq_nets"))
    yield _PLAIN.replace(name="awq", transforms=(MethodSpec.of("awq"),))
    yield _PLAIN.replace(name="ocs", transforms=(MethodSpec.of("channel_splitting"),))
    yield _PLAIN.replace(name="smoothquant", transforms=(MethodSpec.of("smoothquant", alpha=0.5),))
    branch = (MethodSpec.of("smoothing"), MethodSpec.of("low_rank", rank=32, min_gain=0.0))
    yield _PLAIN.replace(name="svdquant", transforms=branch, rounding=MethodSpec.of("gptq"))
    # A scale a channel, AdaRound, split skips, calibration at every c-th step (arXiv 2302.04304).
    yield _PLAIN.replace(
        name="q-diffusion",
        weight=_CHANNEL,
        rounding=MethodSpec.of("adaround"),
        linear_range=_MSE,
        conv_range=_MSE,
        sampling="uniform",
    )
    # Calibration at normally distributed timesteps, ranges by squared error (arXiv 2211.15736).
    yield _PLAIN.replace(
        name="ptq4dm",
        weight=_CHANNEL,
        linear_range=_MSE,
        conv_range=_MSE,
        split_skips=False,
        sampling="normal",
    )
    yield _PLAIN.replace(name="tdq", linear_range=_TDQ, conv_range=_TDQ)
    # Embeddings of time rounded on all timesteps (arXiv 2311.16503), otherwise as "gptq".
    yield _PLAIN.replace(
        name="tfmq-dm",
        rounding=MethodSpec.of("gptq"),
        overrides=(),
        all_timesteps=_OF_TIME_ALONE,
    )


PRESETS: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _presets()}
