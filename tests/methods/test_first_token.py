from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qdiff.calibration import LayerStatistics, collect
from qdiff.layers import LayerSizes, QuantLinear
from qdiff.methods import quantize_layer
from qdiff.methods.first_token import FirstToken
from qdiff.methods.quantize import prepare
from qdiff.methods.shift import Shift
from qdiff.methods.smoothing import Smoothing
from qdiff.recipe import MethodSpec, WeightSpec

NEEDS = {"samples", "histograms", "hessian", "first_token"}
STATIC = {"linear_range": MethodSpec.of("static"), "weight": WeightSpec(8, -1, "channel")}


class TwoReaders(nn.Module):
    """Keys and values of one text: `calls` gives it at each timestep."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_k, self.to_v = nn.Linear(64, 48), nn.Linear(64, 48)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.to_k(sample) + self.to_v(sample)


def texts(seed: int = 0, first: Tensor | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    calls = [torch.randn(4, 9, 64, generator=generator) for _ in range(3)]
    for x in calls:
        if first is not None:
            x[:, 0] = first
    return calls


def outlier() -> Tensor:
    return 100 * torch.randn(64, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def statistics_of(model: nn.Module, calls: list[Tensor], needs: set[str] = NEEDS) -> dict[str, LayerStatistics]:
    def run() -> None:
        for timestep, x in zip((1.0, 500.0, 900.0), calls):
            model(x, torch.tensor(timestep))

    return dict(collect(run, model, {"to_k": model.to_k, "to_v": model.to_v}, needs, progress=False).layers)


def test_statistics_are_those_of_the_other_tokens():
    model, calls = TwoReaders(), texts(first=outlier())
    apart = statistics_of(model, calls)["to_k"]
    others = statistics_of(model, [x[:, 1:] for x in calls], NEEDS - {"first_token"})["to_k"]
    assert torch.equal(apart.first_token, calls[0][0, 0])
    assert torch.equal(apart.channel_absmax, others.channel_absmax)
    assert torch.equal(apart.histograms.counts, others.histograms.counts)
    assert torch.equal(apart.samples.values, others.samples.values)
    assert torch.equal(apart.moments.gram, others.moments.gram)


def test_readers_of_one_text_still_share_its_moments():
    layers = statistics_of(TwoReaders(), texts(first=outlier()))
    assert layers["to_k"].moments.gram is layers["to_v"].moments.gram


def test_a_first_token_that_changes_is_a_token_like_any():
    model, calls = TwoReaders(), texts(first=outlier())
    calls[2][1, 0] *= 2
    layer = statistics_of(model, calls)["to_k"]
    assert layer.first_token is None
    # What had been left out by then is in the exact maximum again.
    expected = torch.stack([x.abs().amax((0, 1)) for x in calls])
    torch.testing.assert_close(layer.channel_absmax.amax(0), expected.amax(0))
    assert statistics_of(model, texts())["to_k"].first_token is None


def test_inputs_without_tokens_have_no_first(linear):
    model = TwoReaders()
    assert statistics_of(model, [x[:, 3] for x in texts()])["to_k"].first_token is None
    assert statistics_of(model, [x[:, :1] for x in texts()])["to_k"].first_token is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("extra", [(), ("smoothing", "hadamard"), ("shift",), ("bias_correction",)], ids=str)
def test_the_first_output_is_exact_and_the_others_are_no_worse(bench, bias, extra):
    model = TwoReaders()
    model.to_k.bias = model.to_k.bias if bias else None
    calls = texts(first=outlier())
    errors = {}
    for transforms in ((), ("first_token", *extra)):
        needs = NEEDS if transforms else NEEDS - {"first_token"}
        plan = bench.plan(model.to_k, transforms=tuple(map(MethodSpec, transforms)), **STATIC)
        weights = quantize_layer(plan, model.to_k, statistics_of(model, calls, needs)["to_k"])
        quantized = QuantLinear.from_float(model.to_k, plan, weights)
        x = texts(seed=1, first=outlier())[0]
        with torch.no_grad():
            got, expected = quantized(x), model.to_k(x)
        errors[transforms] = float((got - expected)[:, 1:].norm() / expected[:, 1:].norm())
    torch.testing.assert_close(got[:, 0], expected[:, 0], rtol=1e-4, atol=1e-3)
    # One static step for all tokens: without the outlier it is a hundredth.
    assert errors[("first_token", *extra)] < 0.1 * errors[()]


def test_another_first_token_is_computed_as_any(bench):
    model = TwoReaders()
    plan = bench.plan(model.to_k, transforms=(MethodSpec("first_token"),), **STATIC)
    statistics = statistics_of(model, texts(first=outlier()))["to_k"]
    quantized = QuantLinear.from_float(model.to_k, plan, quantize_layer(plan, model.to_k, statistics))
    assert "first token apart" in repr(quantized)
    x = texts(seed=1)[0]  # first tokens as the others are
    x[1, 0] = outlier() * 1.001  # but one, up to rounding
    with torch.no_grad():
        got, expected = quantized(x), model.to_k(x)
    assert float((got - expected).norm() / expected.norm()) < 0.02
    torch.testing.assert_close(got[1, 0], model.to_k(outlier()), rtol=1e-4, atol=1e-3)
    empty = QuantLinear.empty(model.to_k, plan, LayerSizes.of_layer(quantized))
    empty.load_state_dict(quantized.state_dict(), strict=True, assign=True)
    with torch.no_grad():
        assert torch.equal(empty(x), got)
        assert torch.equal(torch.compile(quantized, fullgraph=True, backend="eager")(x), got)
        assert quantized.half()(x.half()).dtype == torch.float16
        assert quantized(x[:, :0].half()).shape == (4, 0, 48)
        assert quantized(x[0].half()).shape == (9, 48)


def test_layers_without_one_are_left_alone(bench, layer):
    statistics = bench.statistics(layer, bench.inputs(layer)).layers["layer"]
    state = prepare(bench.plan(layer), layer, statistics)
    FirstToken().apply(state)
    assert state.first_token is None


def test_the_product_is_of_the_raw_weight(bench):
    model = TwoReaders()
    state = prepare(bench.plan(model.to_k), model.to_k, statistics_of(model, texts(first=outlier()))["to_k"])
    for transform in (Shift(), Smoothing(0.5), FirstToken()):
        transform.apply(state)
    torch.testing.assert_close(state.first_token[1], model.to_k.weight.detach() @ outlier(), rtol=1e-3, atol=1e-2)
