"""An activation step that a small network computes from the timestep, learned by reconstruction, kept as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qdiff.calibration.bounds import Estimator
from qdiff.calibration.histogram import TensorHistogram
from qdiff.methods.contract import ActivationRange
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState

FREQUENCIES = 32  # a sine and a cosine of each: 64 features
LONGEST_PERIOD = 10_000.0
HIDDEN_LAYERS, WIDTH = 3, 64
# softplus of it is 1.
UNIT = math.log(math.e - 1)


@register("tdq")
@dataclass(frozen=True)
class TDQ(ActivationRange):
    """s(t) = softplus(MLP(enc(t))), enc(t) = (sin(t / P^(i/d)), cos(t / P^(i/d))) for i < d: one network a quantizer.

    The TDQ module of Temporal Dynamic Quantization (arXiv 2306.02316): three ReLU layers 64 wide on the paper's
    geometric Fourier encoding of t, as in the authors' code. The network is trained by reconstruction, with the
    gradient of LSQ (arXiv 1902.08153, equation 3) for the step; in use it is a table of its values at the calibrated
    timesteps, at no cost.

    Differences: s(t) is learned in units of the static step, where it starts (the paper sets the last bias to that
    step; here the last weights are zero too, so that the start is exact); for the first half it is led to the measured
    step of each timestep, because the gradient of the error alone stays near the static one; t runs from 0 to 1000 over
    the calibrated range, whatever the scheduler's units; what is reconstructed is the layer's own input, each error
    weighted as the layer's weight amplifies it, and each timestep by its relative error, where the paper trains all
    layers towards their output. The input is that of the measured histograms: few samples miss the outliers (on
    emoji-dit with 6-bit activations, a table learned from samples was worse than a static step). No dropout: the table
    is read where it was trained.

    iterations, learning_rate:  of Adam; the rate falls to zero along half a cosine.
    Law: never worse than the static step on what was measured.
    """

    mode: ClassVar[str] = "temporal"
    iterations: int = 150
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"tdq.iterations must be a positive whole number: got {self.iterations!r}")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"tdq.learning_rate must be in (0, 1]: got {self.learning_rate!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"absmax", "histograms"})

    def scales(self, state: LayerState) -> Float[Tensor, "T S"]:
        levels, table = state.plan.activation_levels, state.measured_steps(Estimator("mse"), per_timestep=False)[0]
        histograms, columns = state.input_histograms(per_timestep=True), []
        timesteps, measured = state.calibrated().timesteps.cpu(), self.preview(state).cpu().unbind(1)
        for histogram, start, target in zip(histograms, table.cpu(), measured):
            problem = Reconstruction.of(histogram, start, levels)
            columns.append(start * self._learn(problem, timesteps, target / start))
        return torch.stack(columns, 1).to(state.weight.device)

    def preview(self, state: LayerState) -> Float[Tensor, "T S"]:
        """The measured table: what the network comes close to."""
        return state.measured_steps(Estimator("mse"), per_timestep=True)

    def _learn(
        self, problem: Reconstruction, timesteps: Float[Tensor, " T"], measured: Float[Tensor, " T"]
    ) -> Float[Tensor, " T"]:
        features, network = encoded(timesteps), _network()
        optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.iterations)
        best, least = torch.ones_like(timesteps), math.inf
        for iteration in range(self.iterations):
            with torch.enable_grad():
                steps = network(features)[:, 0]
            found = steps.detach()
            error, gradient = problem.error(found)
            if float(error) < least:
                best, least = found.clone(), float(error)
            if 2 * iteration < self.iterations:
                gradient = (found / measured).log() / found  # of half the squared distance of the logarithms
            optimizer.zero_grad()
            steps.backward(gradient)
            optimizer.step()
            schedule.step()
        last = network(features)[:, 0].detach()
        return last if float(problem.error(last)[0]) < least else best


@dataclass(frozen=True)
class Reconstruction:
    """The relative error of quantizing a measured input, in units of a step.

    edges: float32 [bins + 1], ascending, of |x|.  weights: float32 [T, bins], divided by each timestep's energy.
    """

    edges: Float[Tensor, " edges"]
    weights: Float[Tensor, "T bins"]
    levels: int

    @classmethod
    def of(cls, histogram: TensorHistogram, unit: Float[Tensor, ""], levels: int) -> Reconstruction:
        energy = histogram.mean_square() * histogram.weights.sum(1) / unit.square()
        weights = histogram.weights / (len(energy) * torch.where(energy > 0, energy, 1.0))[:, None]
        return cls(histogram.edges() / unit, weights, levels)

    def error(self, steps: Float[Tensor, " T"]) -> tuple[Float[Tensor, ""], Float[Tensor, " T"]]:
        """sum w (Q(x; s) - x)^2 with a step s a timestep, and LSQ's gradient of it, integrated over the bins.

        d Q / d s = round(u) - u inside the range, with u = |x| / s, and the largest code, L, outside. The integrals up
        to u are of (round(u) - u)^2 inside, and of u - L and (u - L)^2 outside.
        """
        u = self.edges / steps[:, None]
        inside, outside = u.clamp(max=self.levels), (u - self.levels).clamp_min_(0)
        code = inside.round()
        rounding = (code / 12 + (inside - code).pow_(3) / 3).diff(dim=1)
        clipping, slope = (outside.pow(3) / 3).diff(dim=1), (outside.square() / 2).diff(dim=1)
        weights = self.weights * steps[:, None] / u.diff(dim=1)
        error = (weights * (rounding + clipping)).sum(1) * steps
        return error.sum(), 2 * (weights * (rounding - self.levels * slope)).sum(1)


def encoded(timesteps: Float[Tensor, " T"]) -> Float[Tensor, "T features"]:
    """enc(t), t from 0 to 1000 over the timesteps."""
    span = (timesteps[-1] - timesteps[0]).clamp_min(torch.finfo(torch.float32).tiny)
    t = 1000 * (timesteps - timesteps[0]) / span
    periods = LONGEST_PERIOD ** (torch.arange(FREQUENCIES, device=t.device) / FREQUENCIES)
    angles = t[:, None] / periods
    return torch.cat([angles.sin(), angles.cos()], 1)


def _network() -> nn.Sequential:
    """He's initialization but for the last layer, whose output is 1 at first."""
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for width in [2 * FREQUENCIES] + [WIDTH] * (HIDDEN_LAYERS - 1):
        hidden = nn.Linear(width, WIDTH)
        nn.init.kaiming_normal_(hidden.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(hidden.bias)
        layers += [hidden, nn.ReLU()]
    last = nn.Linear(WIDTH, 1)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, UNIT)
    return nn.Sequential(*layers, last, nn.Softplus())
