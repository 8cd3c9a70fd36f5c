"""A text that all blocks of a transformer read: quantized once a call, and in every call."""

from __future__ import annotations

import threading

import pytest
import torch

from qdiff.layers import QuantLinear
from qdiff.ops import quantize_per_token
from qdiff.plugin import text_codes
from qdiff.plugin.text_codes import quantized_once


@pytest.fixture
def quantizations(monkeypatch) -> list[torch.Tensor]:
    """The tensors that were quantized as a text."""
    seen = []

    def and_tell(x, *rest):
        seen.append(x)
        return quantize_per_token(x, *rest)

    monkeypatch.setattr(text_codes, "quantize_per_token", and_tell)
    return seen


def codes_of(text):
    return text_codes.text_codes(text)[0]


def test_once_inside_and_each_time_outside(quantizations):
    text, other = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    with quantized_once():
        first = codes_of(text)
        assert codes_of(text) is first
        assert torch.equal(codes_of(other), quantize_per_token(other, None, None)[0])
        assert codes_of(text) is first
    assert len(quantizations) == 2
    assert torch.equal(codes_of(text), codes_of(text))
    assert len(quantizations) == 4
    with quantized_once():
        assert codes_of(text) is not first
    assert len(quantizations) == 5


@pytest.mark.parametrize("inference", [False, True])
def test_a_text_that_changes(inference, quantizations):
    with torch.inference_mode(inference):
        text = torch.randn(2, 9, 32)
        with quantized_once():
            codes_of(text)
        text.neg_()
        with quantized_once():
            assert torch.equal(codes_of(text), quantize_per_token(text, None, None)[0])
            if not inference:  # such tensors do not say that they changed
                text.neg_()
                assert torch.equal(codes_of(text), quantize_per_token(text, None, None)[0])


def test_another_thread_has_its_own(quantizations):
    text, found = torch.randn(2, 9, 32), []
    with quantized_once():
        first = codes_of(text)
        thread = threading.Thread(target=lambda: found.append(codes_of(text)))
        thread.start()
        thread.join()
    assert found[0] is not first


def test_an_error_leaves_nothing():
    def fail():
        with quantized_once():
            codes_of(torch.randn(2, 9, 32))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert text_codes._texts.known is None


def test_in_a_denoiser(quantized_sd, generate, quantizations, monkeypatch):
    pipe = quantized_sd()
    models = [module for module in pipe.unet.modules() if type(module).__name__ == "Transformer2DModel"]
    images = generate(pipe)
    calls, before = [], len(quantizations)
    for model in models:
        model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(generate(pipe), images)
    assert 0 < len(quantizations) - before == len(calls)
    monkeypatch.setattr(QuantLinear, "takes_codes_of", lambda layer, x: False)
    assert torch.equal(generate(pipe), images)
