from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor
from torch import nn

from qdiff import load, save, summary
from qdiff.methods.log2 import Log2
from qdiff.plugin.attention import QuantizedProbabilities, check_probabilities
from qdiff.plugin.structure import find_denoiser
from qdiff.recipe import MethodSpec, Recipe

LOG2 = Recipe.preset("w8a8").replace(probabilities=MethodSpec.of("log2", bits=4))


class Exact(Log2):
    def quantize(self, probabilities):
        return probabilities


def attentions(pipe):
    return [module for module in find_denoiser(pipe)[1].modules() if isinstance(module, Attention)]


def test_with_exact_probabilities_it_is_diffusers_own(tiny, generate):
    pipe = tiny()
    expected = generate(pipe)
    for module in attentions(pipe):
        assert type(module.processor) is AttnProcessor2_0
        module.processor = QuantizedProbabilities(Exact())
    torch.testing.assert_close(generate(pipe), expected, rtol=0, atol=1e-4)  # float32, in another order


@pytest.mark.parametrize("shape", [(2, 9, 32), (2, 32, 3, 3)])
def test_masks_and_images_and_residuals(shape):
    torch.manual_seed(0)
    attention = Attention(
        32,
        heads=4,
        dim_head=8,
        norm_num_groups=4,
        residual_connection=True,
        rescale_output_factor=2.0,
        qk_norm="layer_norm",
    )
    x, context = torch.randn(shape), torch.randn(2, 5, 32)
    mask = torch.zeros(2, 1, 5)
    mask[1, :, 3:] = -10_000.0
    with torch.no_grad():
        expected = attention(x, context, mask)
        attention.processor = QuantizedProbabilities(Exact())
        torch.testing.assert_close(attention(x, context, mask), expected, rtol=0, atol=1e-5)


def test_in_a_recipe_through_save_and_load(tiny, quantize, generate, tmp_path):
    plain, pipe = quantize(tiny(), recipe="w8a8"), quantize(tiny(), recipe=LOG2)
    pictures = generate(pipe)
    assert torch.isfinite(pictures).all()
    assert not torch.equal(pictures, generate(plain))
    line = f"probabilities of {len(attentions(pipe))} attention layers: Log2(bits=4)"
    assert summary(pipe).probabilities == line
    assert line in str(summary(pipe))
    assert summary(plain).probabilities == ""
    save(pipe, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert summary(loaded).probabilities == line
    assert torch.equal(generate(loaded), pictures)


def test_unknown_attention_is_named_and_nothing_changes(tiny_sd, quantize, snapshot):
    pipe = tiny_sd()
    attentions(pipe)[1].set_processor(SlicedAttnProcessor(1))
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=r"'down_blocks.*attn2' is Attention with SlicedAttnProcessor"):
        quantize(pipe, recipe=LOG2)
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (MethodSpec.of("log2"), "the Linear has no attention"),
        (MethodSpec.of("nearest"), "method 'nearest' is no Probabilities: use one of log2"),
        (MethodSpec.of("log2", bits=1), "log2.bits must be a whole number in 2 to 8: got 1"),
    ],
)
def test_what_cannot_be_is_said(spec, message):
    with pytest.raises(ValueError, match=message):
        check_probabilities(nn.Linear(2, 2), spec)
