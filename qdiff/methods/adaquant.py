"""AdaQuant: weights and the steps of both grids are fitted to the layer's full-precision output."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from qdiff.methods.contract import RoundedWeight, Rounding
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState
from qdiff.methods.weight_grid import WeightGrid, quick_nearest

# Of the samples' rows: one in this many is not fitted to, and says which iteration was the best.
HELD_OUT = 4
# Iterations between two looks at those.
CHECK_EVERY = 20
BATCH_ROWS = 64
# Adam's; the floor of the denominator only keeps zeros from being divided by.
DECAY, FLOOR = 0.99, 1e-18


@register("adaquant")
@dataclass(frozen=True)
class AdaQuant(Rounding):
    """min over V, s and r of |X W^T - Q_r(X) Q_s(W + V)^T|^2, layer by layer, by straight-through gradients.

    AdaQuant (arXiv 2006.10518), its layer-wise calibration, on inputs X that carry the quantization of all layers
    before ("sequential AdaQuant"), or on those of the full-precision denoiser. Unlike AdaRound, a weight may move by
    more than one step.

    What differs here: the full-precision layer that is followed has the inputs as they arrive too, where the paper's
    has those of the full-precision denoiser. Of what arrives wrong few rows show little but noise, and layers that
    learn to make up for it do so for the pictures of calibration alone (the denoiser's error on others over that of
    nearest: with the paper's target 1.05 on emoji-sd and 0.94 on emoji-dit, with this one 0.84 and 0.82). Multipliers
    stay as first fitted, a scale a row is learned. r is a factor on the steps of a measured activation range, one for
    each channel segment, at first one. A range measured anew for every token has none. The bias is `bias_correction`'s.
    Rows of every timestep count alike. A quarter of the rows is not fitted to, and picks the best iteration, the start
    (nearest) among them. Adam goes without momentum: with it, codes go to and fro (error over nearest on emoji-sd's
    linear layers: 0.75, and 0.64 without it).

    Error of a layer alone over that of nearest, W4A8, on captions and classes that calibration did not see, mean
    over layers: 0.58 on emoji-sd (11) and 0.71 on emoji-dit (9). r has little part in it where the range already is
    that of least squared error: with r over without, 0.99 to 1.03 for 8-bit activations, and 0.98 to 1.00 for 6-bit
    ones. It narrows a range that is too wide.

    sequential:    needs "carried" of calibration: layers are quantized one block after the other.
    iterations:    the learning rate falls linearly to zero over them.
    learning_rate: of the weights, in steps of their grid, and of r's logarithm; a hundredth of it for a scale's.
    Law: on the rows held out, never worse than nearest.
    """

    sequential: bool = True
    iterations: int = 200
    learning_rate: float = 0.005

    def __post_init__(self) -> None:
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"adaquant.iterations must be a positive integer: got {self.iterations!r}")
        if isinstance(self.learning_rate, bool) or not 0 < self.learning_rate <= 1:
            raise ValueError(f"adaquant.learning_rate must be in (0, 1]: got {self.learning_rate!r}")
        if not isinstance(self.sequential, bool):
            raise ValueError(f"adaquant.sequential must be true or false: got {self.sequential!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"samples", "carried"} if self.sequential else {"samples"})

    def preview(self, state: LayerState) -> RoundedWeight:
        return quick_nearest(state)

    def round(self, state: LayerState) -> RoundedWeight:
        grid = WeightGrid.fit(state.plan, state.weight, state.importance())
        inputs, arriving = state.inputs(), state.carried_inputs()
        inputs = inputs if arriving is None else arriving
        if inputs is None or len(inputs) < HELD_OUT:
            return grid.rounded(grid.nearest(state.weight))
        target = (inputs * state.balance()) @ state.weight.T
        rows = _Rows(state, inputs)
        place = torch.arange(len(inputs), device=inputs.device)
        held_out, fitted = place[place % HELD_OUT == 0], place[place % HELD_OUT != 0]
        fit = _Fit(state.weight, grid, shared_scale=state.plan.granularity == "tensor")

        def error() -> float:
            return fit.error(rows.quantized(held_out), target[held_out])

        best, least = rows.fitted_to(fit.rounded()), error()
        draw = torch.Generator().manual_seed(0)
        for iteration in range(self.iterations):
            batch = fitted[torch.randperm(len(fitted), generator=draw)[:BATCH_ROWS].to(fitted.device)]
            rate = self.learning_rate * (1 - iteration / self.iterations)
            slope = fit.step(rows.quantized(batch), target[batch], rate, rows.learned)
            if slope is not None:
                rows.step(batch, slope, rate)
            if (iteration + 1) % CHECK_EVERY == 0 or iteration + 1 == self.iterations:
                now = error()
                if now < least:
                    best, least = rows.fitted_to(fit.rounded()), now
        return best


class _Rows:
    """The layer's inputs as it multiplies them; the trained numbers are the logarithms of r, [S].

    learned: whether they are, which takes a measured range.
    """

    def __init__(self, state: LayerState, inputs: Float[Tensor, "R K"]) -> None:
        self.learned = state.range is not None and state.range.mode != "dynamic"
        self.state, self.inputs, self.balance = state, inputs, state.balance()
        self.steps = state.input_steps(inputs) if self.learned else None
        self.fixed = None if self.learned else state.on_input_grid(inputs) * self.balance
        self.growth = inputs.new_zeros(len(state.segments))
        self.square = _MeanSquare(self.growth)

    def quantized(self, chosen: Int64[Tensor, " r"]) -> Float[Tensor, "r K"]:
        """These rows, every timestep counting alike."""
        if self.fixed is not None:
            return self.fixed[chosen]
        steps, _, codes = self._on_grid(chosen)
        return steps * codes * self.balance[chosen]

    def step(self, chosen: Int64[Tensor, " r"], slope: Float[Tensor, "r K"], rate: float) -> None:
        """slope: of the loss by `quantized`. That of `quantized` by r is LSQ's (arXiv 1902.08153, equation 3)."""
        steps, units, codes = self._on_grid(chosen)
        clipped = units.abs() > self.state.plan.activation_levels
        by_growth = steps * torch.where(clipped, codes, codes - units) * self.balance[chosen]
        parts = (slope * by_growth).split(self.state.widths, 1)
        self.growth -= rate * self.square.normalized(torch.stack([part.sum() for part in parts]))

    def fitted_to(self, rounded: RoundedWeight) -> RoundedWeight:
        """The weight with the steps that it goes with."""
        return dataclasses.replace(rounded, step_ratio=self.growth.exp()) if self.learned else rounded

    def _on_grid(self, chosen: Int64[Tensor, " r"]) -> tuple[Tensor, Tensor, Tensor]:
        """The steps of these rows, the rows in units of them, and their codes, each [r, K]."""
        assert self.steps is not None  # learned
        steps = self.steps[chosen] * self.state.along_segments(self.growth.exp())
        units, levels = self.inputs[chosen] / steps, self.state.plan.activation_levels
        return steps, units, units.round().clamp_(-levels, levels)


class _Fit:
    """The trained numbers: the weight in steps of its grid [N, K], and the logarithm of each scale's change [N, 1]."""

    def __init__(self, weight: Float[Tensor, "N K"], grid: WeightGrid, shared_scale: bool) -> None:
        self.grid, self.shared_scale = grid, shared_scale
        steps = grid.steps(weight.shape[1])
        self.unit = steps.mean()  # trained in units of it, lest squared gradients of small weights vanish
        self.steps = steps / self.unit
        self.levels = weight / steps
        self.growth = torch.zeros_like(weight[:, :1])
        self.squares = [_MeanSquare(self.levels), _MeanSquare(self.growth)]

    def codes(self) -> Float[Tensor, "N K"]:
        return self.levels.round().clamp_(self.grid.low, self.grid.high)

    def rounded(self) -> RoundedWeight:
        return self.grid.rescaled(self.growth.exp()[:, 0]).rounded(self.codes().to(torch.int8))

    def error(self, rows: Float[Tensor, "R K"], wanted: Float[Tensor, "R N"]) -> float:
        """Squared, of the layer's output."""
        return float((rows @ self.rounded().dequantize().T - wanted).square().sum())

    def step(
        self, rows: Float[Tensor, "R K"], wanted: Float[Tensor, "R N"], rate: float, by_rows: bool
    ) -> Float[Tensor, "R K"] | None:
        """The gradient passes rounding as if it were not there, and ends where codes are clipped.

        Gives the gradient by the rows, up to a factor, where it is asked for.
        """
        codes = self.codes()
        steps = self.steps * self.growth.exp()
        matrix = steps * codes
        error = rows @ matrix.T - wanted / self.unit
        gradient = (error.T @ rows) * steps
        scale_gradient = (gradient * codes).sum(1, keepdim=True)
        if self.shared_scale:
            scale_gradient = scale_gradient.sum(0, keepdim=True).expand_as(scale_gradient)
        inside = (self.levels >= self.grid.low - 0.5) & (self.levels <= self.grid.high + 0.5)
        self.levels -= rate * self.squares[0].normalized(gradient * inside)
        self.growth -= rate / 100 * self.squares[1].normalized(scale_gradient)
        return error @ matrix if by_rows else None


class _MeanSquare:
    """Adam's (arXiv 1412.6980, algorithm 1) running mean of squared gradients, started without bias."""

    def __init__(self, like: Tensor) -> None:
        self.square, self.count = torch.zeros_like(like), 0

    def normalized(self, gradient: Tensor) -> Tensor:
        """The gradient over its root mean square."""
        self.count += 1
        self.square.lerp_(gradient.square(), 1 - DECAY)
        return gradient / (self.square / (1 - DECAY**self.count)).sqrt_().add_(FLOOR)
