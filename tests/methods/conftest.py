"""Float layers with the statistics of known inputs, for tests of every method."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from qdiff.calibration import Statistics, collect
from qdiff.methods import range_mode
from qdiff.recipe import LayerPlan, MethodSpec, Recipe, WeightSpec

TIMESTEPS = (100.0, 500.0, 900.0)


class OneLayer(nn.Module):
    """A denoiser of one layer, which sees its input as it is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(sample)


def inputs_of(layer: nn.Module, outliers: float = 1.0, growth: float = 1.0) -> list[Tensor]:
    """One input a timestep; every 16th channel is `outliers` times larger, and each step `growth` times the last."""
    generator = torch.Generator().manual_seed(1)
    conv = isinstance(layer, nn.Conv2d)
    channels = layer.in_channels if conv else layer.in_features
    gain = torch.ones(channels)
    gain[::16] = outliers
    shape = (4, channels, 8, 8) if conv else (4, 64, channels)
    gain = gain[:, None, None] if conv else gain
    return [torch.randn(shape, generator=generator) * gain * growth**step for step in range(len(TIMESTEPS))]


def statistics_of(
    layer: nn.Module, inputs: list[Tensor], needs: Collection[str] = ("samples", "histograms")
) -> Statistics:
    denoiser = OneLayer(layer)

    def run() -> None:
        for timestep, x in zip(TIMESTEPS, inputs):
            denoiser(x, torch.tensor(timestep))

    with torch.no_grad():
        return collect(run, denoiser, {"layer": layer}, needs, progress=False)


def plan_of(layer: nn.Module, segments: tuple[int, ...] | None = None, **changes: object) -> LayerPlan:
    """The default recipe's plan, to nearest, in groups of 16; `changes` are fields of a recipe."""
    kind = {nn.Linear: "linear", nn.Conv2d: "conv2d", nn.Embedding: "embedding"}[type(layer)]
    nearest = MethodSpec.of("nearest")
    fields = {"rounding": nearest, "weight": WeightSpec(4, 16), "overrides": (), **changes}
    recipe = Recipe.preset("w4a8").replace(**fields)
    return recipe.plan("layer", kind, segments or (layer.weight.shape[1],), range_mode)


@pytest.fixture
def bench() -> SimpleNamespace:
    """The functions above."""
    return SimpleNamespace(inputs=inputs_of, statistics=statistics_of, plan=plan_of, timesteps=TIMESTEPS)


def linear(outputs: int = 48, inputs: int = 64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


def conv(outputs: int = 24, inputs: int = 32, kernel: int = 3) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


@pytest.fixture(params=[linear, conv], ids=["linear", "conv2d"])
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return request.param()


@pytest.fixture(name="linear")
def linear_layer() -> nn.Linear:
    return linear()


@pytest.fixture(name="conv")
def conv_layer() -> nn.Conv2d:
    return conv()
