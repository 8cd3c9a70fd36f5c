import copy

import pytest
import torch
from torch import nn

from qdiff.denoising import StepTracker
from qdiff.layers import LayerSizes, QuantConv2d, QuantEmbedding, QuantizedWeights, QuantLinear, stored_bytes
from qdiff.numerics.packing import expand_weight


class Denoiser(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, sample, timestep):
        return self.layer(sample)


def test_stored_bytes_counts_each_tensor_once():
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    module[1].bias = module[0].weight  # shared
    assert stored_bytes(module) == 4 * (3 * 5 + 5 + 5 * 3)
    module.register_buffer("extra", torch.zeros(7, dtype=torch.uint8))
    assert stored_bytes(module) == 4 * (3 * 5 + 5 + 5 * 3) + 7


def integers(layer):
    """The integer weights that a layer's buffers stand for."""
    return expand_weight(layer.codes, layer.multipliers, layer.codebook, layer.storage_block)


@pytest.mark.parametrize(("group_size", "block"), [(64, 32), (32, 32), (96, 32), (16, 16), (48, 16)])
def test_groups_are_stored_as_blocks_of_at_most_32(make_plan, quantize, group_size, block):
    linear, plan = nn.Linear(576, 8), make_plan("linear", (576,), group_size=group_size)
    weights = quantize(linear.weight, plan)
    layer = QuantLinear.from_float(linear, plan, weights)
    assert layer.storage_block == block
    assert layer.multipliers.shape == (8, 576 // block // 2)
    assert f"int4/{group_size}" in repr(layer)
    expected = weights.codes_q.long() * weights.multipliers.long().repeat_interleave(group_size, dim=1)
    assert torch.equal(integers(layer).long(), expected)


def test_a_convolution_is_stored_in_blocks_that_cross_no_tap(make_plan, quantize):
    conv, plan = nn.Conv2d(96, 8, 3), make_plan("conv2d", (32, 64), mode="static", group_size=32)
    weights = quantize(conv.weight, plan, act_scales=torch.ones(1, 2))
    layer = QuantConv2d.from_float(conv, plan, weights)
    assert layer.multipliers.shape == (8, (27 + 1) // 2)
    expected = weights.codes_q.long() * weights.multipliers.long().repeat_interleave(32, dim=1)
    assert torch.equal(integers(layer).long(), expected)


LAYERS = {
    "linear": (QuantLinear, lambda: nn.Linear(64, 8), (64,), "dynamic", (17, 64)),
    "linear, 16-bit activations": (QuantLinear, lambda: nn.Linear(64, 8), (64,), "none", (3, 64)),
    "convolution": (QuantConv2d, lambda: nn.Conv2d(64, 8, 3), (32, 32), "static", (2, 64, 5, 5)),
    "convolution, 16-bit activations": (QuantConv2d, lambda: nn.Conv2d(64, 8, 3), (64,), "none", (2, 64, 5, 5)),
    "embedding": (QuantEmbedding, lambda: nn.Embedding(8, 64), (64,), "none", None),
}


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_a_codebook_in_place_of_multipliers(make_plan, case):
    """The layer with a codebook is the one whose codes are the codebook's entries in 8 bits, and keeps its state."""
    kind, make, segments, mode, shape = case
    name = {QuantLinear: "linear", QuantConv2d: "conv2d", QuantEmbedding: "embedding"}[kind]
    layer = make()
    n, k = layer.weight.shape[0], layer.weight[0].numel()
    u, codebook = torch.randint(0, 16, (n, k), dtype=torch.int8), torch.randint(-127, 128, (n, 16), dtype=torch.int8)
    scale, scales = torch.rand(n) / 500, torch.full((1, len(segments)), 0.02) if mode == "static" else None
    four = kind.from_float(
        layer,
        make_plan(name, segments, 4, mode, 32),
        QuantizedWeights(u, None, scale, act_scales=scales, codebook=codebook),
    )
    eight = kind.from_float(
        layer,
        make_plan(name, segments, 8, mode),
        QuantizedWeights(codebook.gather(1, u.long()), None, scale, act_scales=scales),
    )
    x = torch.randint(0, 8, (5,)) if shape is None else torch.randn(shape)
    assert four.multipliers is None
    assert four.codebook.dtype == torch.int8
    assert torch.equal(four.weight, eight.weight)
    assert torch.equal(four(x), eight(x))
    empty = kind.empty(layer, four.plan, LayerSizes(has_codebook=True))
    empty.load_state_dict(four.state_dict(), strict=True, assign=True)
    assert torch.equal(empty(x), four(x))


def test_codebooks_that_do_not_fit(make_plan):
    layer, codes, scale = nn.Linear(64, 8), torch.zeros(8, 64, dtype=torch.int8), torch.ones(8)
    book = torch.zeros(8, 16, dtype=torch.int8)

    def build(bits=4, **changes):
        fields = {"codes_q": codes, "multipliers": None, "scale": scale, "codebook": book} | changes
        return QuantLinear.from_float(layer, make_plan("linear", (64,), bits), QuantizedWeights(**fields))

    build()
    with pytest.raises(ValueError, match=r"block\.layer: .*codebook"):
        build(bits=8)
    with pytest.raises(ValueError, match=r"block\.layer: codebook"):
        build(codebook=book[:, :15])
    with pytest.raises(ValueError, match=r"block\.layer: multipliers"):
        build(multipliers=torch.ones(8, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="q"):
        build(codes_q=codes + 16)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float32, torch.float16), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_a_branch_is_stored_in_the_dtype_it_is_computed_in(make_plan, quantize, dtype, stored):
    linear, plan = nn.Linear(16, 8).to(dtype), make_plan("linear", (16,))
    branch = (torch.randn(2, 16), torch.randn(8, 2))
    layer = QuantLinear.from_float(linear, plan, quantize(linear.weight, plan, low_rank=branch))
    assert (layer.down.dtype, layer.up.dtype) == (stored, stored)
    assert torch.equal(layer.down, branch[0].to(stored))


def test_a_deep_copy_of_a_denoiser_keeps_layers_and_tracker_together(make_plan, quantize):
    linear, plan = nn.Linear(16, 8), make_plan("linear", (16,), 8, "temporal")
    table = torch.tensor([[6 / 127], [1e3]])
    layer = QuantLinear.from_float(linear, plan, quantize(linear.weight, plan, act_scales=table))
    layer.tracker = StepTracker((1, 999))
    original = Denoiser(layer)
    layer.tracker.attach(original)
    x = torch.randn(2, 16)
    fine, coarse = original(x, 1), original(x, 999)
    assert not torch.equal(fine, coarse)
    duplicate = copy.deepcopy(original)
    assert torch.equal(duplicate(x, 1), fine)
    assert torch.equal(original.layer(x), coarse)  # still at its own last timestep
