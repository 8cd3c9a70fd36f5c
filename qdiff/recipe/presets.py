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

# Embeddings of the timestep that all blocks share. Those that a DiT repeats in every block are 8 % of its weights, and
# at 4 bits make 1 % of its squared error: they are as the other layers.
_TIME_EMBEDDINGS = ("*time_embedding*", "adaln_single*", "time_text_embed*", "time_embed*")
# What the residual stream passes through, and the values of attention. With each kind of layer alone at 4 bits, these
# make half of the squared denoiser error of emoji-sd with a sixth of its weights, and a fifth of emoji-dit's with a
# twelfth.
_SENSITIVE = (
    "*attentions.*.proj_in",
    "*attentions.*.proj_out",
    "*.conv_shortcut",
    "*samplers.*.conv",
    "*.to_v",
    "*.to_out.0",
    "proj_out_1",
)
# What a low-rank branch takes from these does not show in the denoiser's output (measured on emoji-dit).
_WITHOUT_BRANCH = ("*.norm1.linear", "transformer_blocks.*timestep_embedder*")

DEFAULT_OVERRIDES = (
    *(LayerOverride(pattern, weight=_EIGHT_BIT, transforms=()) for pattern in (*_TIME_EMBEDDINGS, *_SENSITIVE)),
    *(LayerOverride(pattern, transforms=()) for pattern in _WITHOUT_BRANCH),
)

_W4A8 = Recipe(
    name="w4a8",
    transforms=(MethodSpec.of("smoothing"), MethodSpec.of("low_rank", budget=0.05, min_gain=0.1)),
    rounding=MethodSpec.of("nearest"),
    linear_range=MethodSpec.of("dynamic"),
    conv_range=MethodSpec.of("temporal"),
    keep=DEFAULT_KEEP,
    overrides=DEFAULT_OVERRIDES,
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
    yield _W4A8.replace(name="w8a8", weight=_EIGHT_BIT, rounding=_NEAREST, transforms=smoothing, overrides=())
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
        all_timesteps=(*_TIME_EMBEDDINGS, "*time_emb_proj"),
    )


PRESETS: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _presets()}
