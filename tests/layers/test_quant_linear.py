import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qdiff.denoising import StepTracker
from qdiff.layers import LayerSizes, QuantizedWeights, QuantLinear, stored_bytes

MODES = ["dynamic", "static", "temporal", "none"]
GRID = (1.0, 500.0, 999.0)


@pytest.fixture
def build(make_plan, quantize):
    """Factory of a float layer and its quantized stand-in; the activation scales cover normal inputs."""

    def make(bits=4, mode="dynamic", smoothed=False, rank=0, bias=True, k=48, n=40):
        layer, plan = nn.Linear(k, n, bias=bias), make_plan("linear", (k,), bits, mode)
        smooth = torch.rand(k) + 0.5 if smoothed else None
        low_rank = (torch.randn(rank, k).half().float() / 9, torch.randn(n, rank).half().float() / 9) if rank else None
        rows = {"static": 1, "temporal": len(GRID)}.get(mode)
        act_scales = None if rows is None else torch.full((rows, 1), 6 / 127)
        quantized = QuantLinear.from_float(layer, plan, quantize(layer.weight, plan, smooth, low_rank, act_scales))
        quantized.tracker = StepTracker(GRID)
        quantized.tracker.set(500, 1)
        return layer, quantized

    return make


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("smoothed", "rank", "bias"), [(False, 0, False), (True, 0, True), (True, 3, True), (False, 3, True)]
)
def test_is_the_float_product_with_its_own_weight_up_to_activation_rounding(build, bits, mode, smoothed, rank, bias):
    layer, quantized = build(bits, mode, smoothed, rank, bias)
    x = torch.randn(2, 9, 48).clamp(-3, 3)
    expected = F.linear(x, quantized.weight, layer.bias)
    # Of 127 steps for a largest value of 2 to 6, rounding loses 0.3 steps rms: 6 / 127 * 0.3 of unit variance.
    allowed = 1e-6 if mode == "none" else 0.02
    assert float((quantized(x) - expected).norm() / expected.norm()) < allowed
    # 4-bit groups of 8 lose about 6 % of the weight, 8 bits 0.5 %.
    assert float((quantized.weight - layer.weight).norm() / layer.weight.norm()) < (0.1 if bits == 4 else 0.02)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(48,), (1, 48), (5, 48), (2, 3, 48), (2, 2, 3, 48), (0, 48)], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_input_shape(build, bits, mode, shape):
    _, quantized = build(bits, mode, rank=2)
    x = torch.randn(shape)
    assert quantized(x).shape == (*shape[:-1], 40)


@pytest.mark.parametrize("mode", MODES)
def test_strided_inputs(build, mode):
    _, quantized = build(mode=mode, rank=2, smoothed=True)
    x = torch.randn(48, 9, 4).permute(2, 1, 0)[::2]
    torch.testing.assert_close(quantized(x), quantized(x.contiguous()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_output_has_the_inputs_dtype(build, mode, dtype):
    _, quantized = build(mode=mode, rank=2, smoothed=True)
    x = torch.randn(3, 48)
    result = quantized.to(dtype)(x.to(dtype))
    assert result.dtype == dtype
    full = quantized.float()(x)
    assert float((result.float() - full).norm() / full.norm()) < 0.02


def test_temporal_scales_follow_the_timestep(build):
    layer, quantized = build(mode="temporal", bits=8)
    quantized.act_scales.copy_(torch.tensor([[1e-6], [6 / 127], [1e3]]))
    x = torch.randn(4, 48)
    quantized.tracker.set(torch.tensor([1, 500, 500, 999]), 4)
    result, expected = quantized(x), layer(x)
    torch.testing.assert_close(result[1:3], expected[1:3], rtol=0, atol=0.1)
    torch.testing.assert_close(result[3], layer.bias)  # steps of 1000: every code is 0
    assert float((result[0] - layer.bias).abs().max()) < 1e-2  # everything saturates at 127e-6


@pytest.mark.parametrize(
    "state_dict_changes", [{}, {"rank": 3}, {"smoothed": True}, {"mode": "temporal"}, {"bits": 8}], ids=str
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_empty_layer_takes_the_state_strictly(build, state_dict_changes, device):
    layer, quantized = build(**state_dict_changes)
    empty = QuantLinear.empty(layer.to(device), quantized.plan, LayerSizes.of_layer(quantized))
    empty.load_state_dict(quantized.state_dict(), strict=True, assign=True)
    empty.tracker = quantized.tracker
    x = torch.randn(3, 48)
    assert torch.equal(empty(x), quantized(x))
    assert not list(quantized.parameters())


def test_the_state_is_plain_tensors_of_the_documented_dtypes(build):
    _, quantized = build(mode="temporal", smoothed=True, rank=3)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in quantized.state_dict().items()}
    assert shapes == {
        "codes": (torch.uint8, (40, 24)),
        "multipliers": (torch.uint8, (40, 3)),
        "scale": (torch.float32, (40,)),
        "bias": (torch.float32, (40,)),
        "smooth": (torch.float32, (48,)),
        "down": (torch.float16, (3, 48)),
        "up": (torch.float16, (40, 3)),
        "act_scales": (torch.float32, (3, 1)),
    }
    assert stored_bytes(quantized) == 40 * 24 + 40 * 3 + 4 * (40 + 40 + 48 + 3) + 2 * 3 * (48 + 40)


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16).float()])
def test_conversions_leave_the_numbers_alone_and_convert_the_bias(build, change):
    _, quantized = build(mode="temporal", smoothed=True, rank=3)
    quantized.scale.mul_(1 + 1e-7)
    before = copy.deepcopy(quantized.state_dict())
    change(quantized)
    for name, tensor in quantized.state_dict().items():
        if name != "bias":
            assert torch.equal(tensor, before[name])
            assert tensor.dtype == before[name].dtype
    assert quantized.weight.dtype == quantized.bias.dtype == quantized.compute_dtype


def test_the_weights_dtype_follows_conversions_without_a_bias(build):
    _, quantized = build(bias=False)
    assert quantized.half().weight.dtype == torch.float16
    assert quantized.to("meta").weight.device.type == "meta"


def test_is_a_linear_layer_to_others(build):
    layer, quantized = build()
    assert isinstance(quantized, nn.Linear)
    assert (quantized.in_features, quantized.out_features) == (48, 40)
    assert quantized.weight.shape == layer.weight.shape
    assert "int4/8" in repr(quantized)
    assert "dynamic" in repr(quantized)


def test_a_float_layer_is_not_changed(build, make_plan, quantize):
    layer = nn.Linear(48, 40).eval()
    before = copy.deepcopy(layer.state_dict())
    plan = make_plan("linear", (48,))
    quantized = QuantLinear.from_float(layer, plan, quantize(layer.weight, plan))
    quantized.bias.zero_()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert not quantized.training


def test_one_multiplier_column_stands_for_all_groups(make_plan, quantize):
    layer, plan = nn.Linear(48, 40), make_plan("linear", (48,))
    weights = quantize(layer.weight, plan)
    ones, column = torch.ones(40, 6, dtype=torch.uint8), torch.ones(40, 1, dtype=torch.uint8)
    first, second = (
        QuantLinear.from_float(layer, plan, type(weights)(weights.codes_q, multipliers, weights.scale))
        for multipliers in (ones, column)
    )
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8])
def test_few_rows_of_four_bit_weights_keep_their_activations(build, bits, mode):
    _, quantized = build(bits, mode, smoothed=True, rank=2)
    x = torch.randn(17, 48)

    def distance(y):
        expected = F.linear(x[: len(y)], quantized.weight, quantized.bias)
        return float((y - expected).norm() / expected.norm())

    kept = mode == "none" or (mode == "dynamic" and bits == 4)
    for few in (quantized(x[:16]), quantized(x[:16].view(2, 8, 48)).flatten(0, 1)):
        assert (distance(few) < 1e-6) == kept
    assert (distance(quantized(x)) < 1e-6) == (mode == "none")


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += [function.name()] * (function.namespace == "qdiff")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("bits", [4, 8])
def test_a_call_with_a_scale_a_token_is_one_operator(build, bits):
    _, quantized = build(bits, "dynamic", smoothed=True, rank=2)
    with Operators() as operators:
        quantized(torch.randn(17, 48))
    assert operators.seen == ["qdiff::dynamic_linear"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [4, 8])
def test_compiles_whole(build, bits, mode):
    torch.compiler.reset()
    _, quantized = build(bits, mode, smoothed=True, rank=2)
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    for rows in (15, 17, 18, 19):
        x = torch.randn(rows, 48)
        assert torch.equal(compiled(x), quantized(x))


def test_zeros_and_outliers_give_finite_outputs(build):
    for mode in MODES:
        layer, quantized = build(mode=mode, rank=2, smoothed=True)
        torch.testing.assert_close(quantized(torch.zeros(20, 48)), layer.bias.expand(20, 40), rtol=0, atol=0)
        x = torch.randn(20, 48)
        x[0, 0] = 1e4
        assert torch.isfinite(quantized(x)).all()


def test_a_zero_weight(make_plan, quantize):
    layer, plan = nn.Linear(48, 40), make_plan("linear", (48,))
    nn.init.zeros_(layer.weight)
    quantized = QuantLinear.from_float(layer, plan, quantize(layer.weight, plan))
    assert torch.equal(quantized(torch.randn(3, 48)), layer.bias.expand(3, 40))


def test_temporal_scales_need_a_timestep(build):
    _, quantized = build(mode="temporal")
    quantized.tracker = None
    with pytest.raises(RuntimeError, match=r"block\.layer: .*StepTracker"):
        quantized(torch.randn(2, 48))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("multipliers", None),
        ("multipliers", torch.ones(40, 5, dtype=torch.uint8)),
        ("scale", torch.ones(39)),
        ("codes_q", torch.zeros(40, 40, dtype=torch.int8)),
        ("act_scales", torch.ones(1, 1)),
    ],
    ids=["no multipliers", "multipliers", "scale", "codes", "scales of a dynamic layer"],
)
def test_numbers_that_do_not_fit_the_plan(make_plan, quantize, field, value):
    layer, plan = nn.Linear(48, 40), make_plan("linear", (48,))
    weights = vars(quantize(layer.weight, plan)) | {field: value}
    with pytest.raises(ValueError, match=r"block\.layer: "):
        QuantLinear.from_float(layer, plan, QuantizedWeights(**weights))


def test_segments_are_for_convolutions(make_plan):
    with pytest.raises(ValueError, match="segments"):
        QuantLinear.empty(nn.Linear(48, 40), make_plan("linear", (16, 32)))
