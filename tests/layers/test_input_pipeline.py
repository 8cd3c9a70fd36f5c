"""Layers whose input is shifted, split or rotated before it is quantized."""

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdiff.denoising import StepTracker
from qdiff.layers import LayerSizes, QuantConv2d, QuantEmbedding, QuantizedWeights, QuantLinear, stored_bytes
from qdiff.numerics.gemm_layout import to_gemm
from qdiff.numerics.input_pipeline import rotate

C, WIDE, N, BLOCK = 24, 32, 40, 8
STEPS = [{"shift"}, {"index"}, {"rotation"}, {"smooth", "rotation"}, {"shift", "index", "smooth", "rotation"}]
MODES = ["dynamic", "static", "temporal", "none"]


def parts(steps, taps, float_weight, segments=(C,)):
    """The steps' tensors, and the weight [N, K'] that undoes them, made step by step."""
    matrix = to_gemm(float_weight.detach().float(), segments).unflatten(1, (taps, -1))
    found = dict.fromkeys(("shift", "index", "smooth", "rotation", "bias_change"))
    if "shift" in steps:
        found["shift"] = torch.randn(C) / 3
        found["bias_change"] = (matrix.sum(1) * found["shift"]).sum(1)
    if "index" in steps:
        counts = torch.tensor([2] * (WIDE - C) + [1] * (2 * C - WIDE))
        found["index"] = torch.arange(C).repeat_interleave(counts)
        matrix = (matrix / counts)[..., found["index"]]
    if "smooth" in steps:
        found["smooth"] = torch.rand(matrix.shape[2]) + 0.5
        matrix = matrix / found["smooth"]
    matrix = matrix.flatten(1)
    if "rotation" in steps:
        found["rotation"] = (torch.randint(0, 2, (BLOCK,)) * 2 - 1).to(torch.int8)
        matrix = rotate(matrix, found["rotation"])
    return found, matrix


@pytest.fixture
def build(make_plan, quantize):
    """Factory of a float layer and its quantized stand-in: of a linear layer or, with a kernel, a convolution."""

    def make(steps, mode="dynamic", bits=8, kernel=0, bias=True, rank=0, padding=None, dtype=torch.float32):
        taps = max(1, kernel**2)
        if kernel:
            padding = (0 if "shift" in steps else kernel // 2) if padding is None else padding
            layer = nn.Conv2d(C, N, kernel, padding=padding, bias=bias).to(dtype)
        else:
            layer = nn.Linear(C, N, bias=bias).to(dtype)
        plan = make_plan("conv2d" if kernel else "linear", (C,), bits, mode)
        found, matrix = parts(steps, taps, layer.weight)
        # half: what is stored is what was taken off
        low_rank = (
            (torch.randn(rank, matrix.shape[1]).half().float() / 8, torch.randn(N, rank).half().float() / 8)
            if rank
            else None
        )
        rows = {"static": 1, "temporal": 2}.get(mode)
        scales = None if rows is None else torch.full((rows, 1), 6 / 127)
        segments = (matrix.shape[1] // taps,)
        inner = quantize(
            matrix,
            dataclasses.replace(plan, kind="linear", segments=(matrix.shape[1],), range_mode="none"),
            None,
            low_rank,
        )
        weights = dataclasses.replace(inner, act_scales=scales, **found)
        assert sum(segments) in (C, WIDE)
        quantized = (QuantConv2d if kernel else QuantLinear).from_float(layer, plan, weights)
        quantized.tracker = StepTracker((1.0, 999.0))
        quantized.tracker.set(500, 1)
        return layer, quantized

    return make


def input_of(kernel):
    return (torch.randn(2, C, 6, 5) if kernel else torch.randn(3, 9, C)).clamp(-3, 3)


def distance(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: "+".join(sorted(steps)))
@pytest.mark.parametrize(
    ("mode", "kernel"), [pair for pair in itertools.product(MODES, (0, 1, 3)) if pair[0] != "dynamic" or not pair[1]]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_computes_what_the_float_layer_does(build, steps, mode, kernel, bits):
    layer, quantized = build(steps, mode, bits, kernel)
    x = input_of(kernel)
    # 8 bits of weights and activations lose about 1 % together; groups of 8 in 4 bits about 6 %.
    assert distance(quantized(x), layer(x)) < (0.12 if bits == 4 else 0.03)
    assert distance(quantized.weight, layer.weight) < (0.12 if bits == 4 else 0.02)
    assert quantized.weight.shape == layer.weight.shape
    own = F.conv2d(x, quantized.weight, None, layer.stride, layer.padding) if kernel else F.linear(x, quantized.weight)
    if "shift" in steps:
        return  # the weight acts on x - shift: its own error is not in the bias
    own = own + (quantized.bias[:, None, None] if kernel else quantized.bias)
    assert distance(quantized(x), own) < (1e-5 if mode == "none" else 0.03)


@pytest.mark.parametrize("mode", ["dynamic", "static", "none"])
def test_a_low_rank_branch_reads_the_transformed_input(build, mode):
    layer, quantized = build({"shift", "index", "smooth", "rotation"}, mode, rank=3)
    x = input_of(0)
    assert distance(quantized(x), layer(x)) < 0.03
    assert quantized.down.shape == (3, WIDE)


@pytest.mark.parametrize("kernel", [0, 1])
def test_a_shift_makes_a_bias(build, kernel):
    layer, quantized = build({"shift"}, "static", kernel=kernel, bias=False)
    assert layer.bias is None
    x = input_of(kernel)
    assert distance(quantized(x), layer(x)) < 0.03


@pytest.mark.parametrize("kernel", [0, 3])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_empty_layer_takes_the_state_strictly(build, kernel, device):
    steps = {"index", "smooth", "rotation"} if kernel else {"shift", "index", "smooth", "rotation"}
    layer, quantized = build(steps, "temporal", 4, kernel, bias=False)
    empty = type(quantized).empty(layer.to(device), quantized.plan, LayerSizes.of_layer(quantized))
    empty.load_state_dict(quantized.state_dict(), strict=True, assign=True)
    empty.tracker = quantized.tracker
    x = input_of(kernel)
    assert torch.equal(empty(x), quantized(x))
    for copied in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(copied(x), quantized(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_halves_keep_the_pipelines_numbers(build, dtype, mode):
    _, quantized = build({"shift", "index", "smooth", "rotation"}, mode, rank=2)
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    x = input_of(0)
    full = quantized(x)
    result = quantized.to(dtype)(x.to(dtype))
    assert result.dtype == dtype
    assert distance(result.float(), full) < 0.03
    for name in ("shift", "index", "smooth", "rotation"):
        assert torch.equal(quantized.state_dict()[name], before[name])


def test_the_state_and_what_it_says(build):
    _, quantized = build({"shift", "index", "smooth", "rotation"}, "static", 4)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in quantized.state_dict().items()}
    assert shapes["shift"] == (torch.float32, (C,))
    assert shapes["index"] == (torch.int64, (WIDE,))
    assert shapes["smooth"] == (torch.float32, (WIDE,))
    assert shapes["rotation"] == (torch.int8, (BLOCK,))
    assert shapes["codes"] == (torch.uint8, (N, WIDE // 2))
    assert "shifted, channels=32, rotation=8" in repr(quantized)
    assert (quantized.in_features, quantized.segments) == (C, (WIDE,))
    assert stored_bytes(quantized) == N * (WIDE // 2 + 2 + 4 + 4) + 4 * C + 8 * WIDE + 4 * WIDE + BLOCK + 4


def test_padding_stays_zero(build):
    layer, quantized = build({"smooth", "rotation"}, "static", kernel=3)
    zeros = torch.zeros(1, C, 4, 4)
    torch.testing.assert_close(quantized(zeros), layer(zeros))


def test_compiles_without_a_break(build):
    for mode, kernel in (("dynamic", 0), ("static", 3)):
        _, quantized = build({"index", "smooth", "rotation"}, mode, kernel=kernel)
        x = input_of(kernel)
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), quantized(x))


def test_what_does_not_fit(build, make_plan, quantize):
    with pytest.raises(ValueError, match="shift is given, expected None with padding"):
        build({"shift"}, "static", kernel=3, padding=1)
    conv, linear = nn.Conv2d(C, N, 3), nn.Linear(C, N)
    with pytest.raises(ValueError, match="index is given for 2 segments"):
        QuantConv2d.empty(conv, make_plan("conv2d", (8, 16), mode="static"), LayerSizes(split_channels=32))
    with pytest.raises(ValueError, match="index has 28 channels, expected a multiple of 8"):
        QuantLinear.empty(linear, make_plan("linear", (C,)), LayerSizes(split_channels=28))
    for signs in (12, 16):
        with pytest.raises(ValueError, match="power of two that divides"):
            QuantLinear.empty(linear, make_plan("linear", (C,)), LayerSizes(rotation=signs))
    table = nn.Embedding(30, C)
    plan = make_plan("embedding", (C,), mode="none")
    codes = quantize(table.weight, plan)
    for change in (
        {"shift": torch.zeros(C)},
        {"rotation": torch.ones(8, dtype=torch.int8)},
        {"bias_change": torch.zeros(30)},
    ):
        with pytest.raises(ValueError, match="nothing but a codebook for an embedding"):
            QuantEmbedding.from_float(table, plan, dataclasses.replace(codes, **change))
    assert isinstance(codes, QuantizedWeights)
