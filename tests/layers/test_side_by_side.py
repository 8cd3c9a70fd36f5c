"""Layers whose weights lie side by side: one product for several, and what becomes of it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle

import pytest
import torch
from torch import nn

from qdiff.layers import LayerSizes, QuantizedWeights, QuantLinear, stored_bytes
from qdiff.layers.side_by_side import _known, lay_side_by_side, side_by_side
from qdiff.ops import quantize_per_token

K, N = 64, 48


@pytest.fixture
def make_layer(make_plan, quantize):
    """Factory of layers of random weights."""

    def make(bias=True, features=N, codebook=False, smoothed=False, activation_bits=None, **options):
        linear, plan = nn.Linear(K, features, bias=bias), make_plan("linear", (K,), group_size=32, **options)
        if activation_bits is not None:
            plan = dataclasses.replace(plan, activation_bits=activation_bits)
        weights = quantize(linear.weight, plan, torch.rand(K) + 0.5 if smoothed else None)
        if codebook:
            codes = torch.randint(0, 16, (features, K), dtype=torch.int8)
            table = torch.randint(-127, 128, (features, 16), dtype=torch.int8)
            weights = QuantizedWeights(codes, None, weights.scale, codebook=table)
        return QuantLinear.from_float(linear, plan, weights)

    return make


@pytest.fixture
def layers(make_layer):
    """Three that are alike."""
    return [make_layer() for _ in range(3)]


def laid_out(layers):
    lay_side_by_side(layers)
    return side_by_side(layers)


def tokens(rows=40):
    return torch.randn(2, rows, K)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"bits": 8}, {"codebook": True}], ids=str)
def test_is_the_layers_one_after_the_other(options, make_layer):
    layers, x = [make_layer(**options) for _ in range(3)], tokens()
    codes, scale, _ = quantize_per_token(x, None, None)
    expected = [one.forward_quantized(codes, scale, torch.float32) for one in layers]
    called = [one(x) for one in layers]
    stored = [stored_bytes(one) for one in layers]
    assert side_by_side(layers) is None
    whole = laid_out(layers)
    assert laid_out(layers) is whole
    assert torch.equal(whole.forward_quantized(codes, scale, torch.float32), torch.cat(expected, dim=-1))
    assert torch.equal(whole(x), torch.cat(called, dim=-1))
    # The layers are what they were, and store what the whole one stores.
    assert all(torch.equal(one(x), y) for one, y in zip(layers, called))
    assert [stored_bytes(one) for one in layers] == stored
    memory = whole.codes.untyped_storage().data_ptr()
    assert all(one.codes.untyped_storage().data_ptr() == memory for one in layers)


@pytest.mark.parametrize(
    "other",
    [
        {"bits": 8},
        {"bias": False},
        {"codebook": True},
        {"features": 32},
        {"smoothed": True},
        {"activation_bits": 6},
        {"mode": "none"},
    ],
    ids=str,
)
def test_layers_that_are_not_alike(other, make_layer):
    layers = [make_layer(), make_layer(**other)]
    before = [one.codes for one in layers]
    assert laid_out(layers) is None
    assert all(one.codes is codes for one, codes in zip(layers, before))


def test_modules_that_are_something_else(make_layer):
    layers = [make_layer(), nn.Sequential(make_layer())]
    lay_side_by_side(layers)
    assert layers[0].codes._base is None


def test_rows_that_would_not_be_aligned(make_layer):
    assert laid_out([make_layer(features=24), make_layer(features=24)]) is None


def test_some_of_the_layers(layers):
    laid_out(layers)
    assert side_by_side(layers[:2]) is None
    assert side_by_side(layers[1:]) is None


def test_what_is_loaded_into_a_layer(layers, make_layer):
    x, whole, other = tokens(), laid_out(layers), make_layer()
    layers[1].load_state_dict(other.state_dict())
    assert side_by_side(layers) is whole
    assert torch.equal(whole(x).chunk(3, dim=-1)[1], other(x))


MOVES = {
    "codes": lambda one: one._buffers.update(codes=one.codes.clone()),
    "scale": lambda one: setattr(one, "scale", one.scale * 2),
    "bias": lambda one: one.half() and one.float(),
    "assigned": lambda one: one.load_state_dict(copy.deepcopy(one.state_dict()), assign=True),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("which", [0, 2])
def test_buffers_that_are_replaced(move, which, layers):
    x = tokens()
    laid_out(layers)
    move(layers[which])
    assert side_by_side(layers) is None
    assert torch.equal(laid_out(layers)(x), torch.cat([one(x) for one in layers], dim=-1))


@pytest.mark.parametrize("name", ["codes", "multipliers", "scale", "bias"])
@pytest.mark.parametrize("which", [0, 2])
def test_buffers_whose_data_are_swapped(name, which, layers, make_layer):
    """As offloading does: the tensor stays, and its values are elsewhere."""
    x, before = tokens(), len(_known)
    laid_out(layers)
    other = make_layer()
    getattr(layers[which], name).data = getattr(other, name)
    assert side_by_side(layers) is None
    assert len(_known) == before  # nothing holds what the layers no longer have
    assert torch.equal(laid_out(layers)(x), torch.cat([one(x) for one in layers], dim=-1))


def test_goes_with_the_layers(make_layer):
    before = len(_known)
    layers = [make_layer() for _ in range(3)]
    laid_out(layers)
    assert len(_known) == before + 1
    # As where layers move to another device: nothing may hold what they had.
    layers[0]._buffers["codes"] = layers[0].codes.clone()
    gc.collect()
    assert len(_known) == before
    laid_out(layers)
    del layers
    gc.collect()
    assert len(_known) == before


def test_copies_are_layers_of_their_own(layers):
    x = tokens()
    expected = laid_out(layers)(x)
    for copied in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert side_by_side(copied) is None
        assert torch.equal(laid_out(copied)(x), expected)
        copied[0].codes.zero_()
        assert torch.equal(side_by_side(layers)(x), expected)


def test_layers_laid_out_in_inference_mode_can_be_loaded_into(layers, make_layer):
    with torch.inference_mode():
        assert laid_out(layers) is not None
    layers[0].load_state_dict(make_layer().state_dict())
    assert not any(buffer.is_inference() for one in layers for buffer in one.buffers())


def test_a_compiler_sees_the_layers(layers, monkeypatch):
    assert laid_out(layers) is not None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert side_by_side(layers) is None


def test_layers_without_numbers_yet(make_plan):
    linear = nn.Linear(K, N, device="meta")
    layers = [QuantLinear.empty(linear, make_plan("linear", (K,), group_size=32), LayerSizes()) for _ in range(2)]
    assert laid_out(layers) is None
