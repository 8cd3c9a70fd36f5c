"""AdaQuant: weights and their scales are fitted to the layer's full-precision output, on its quantized inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
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
    """min over V and s of |X W^T - Q(X_q) Q_s(W + V)^T|^2, layer by layer, by straight-through gradients.

    AdaQuant (arXiv 2006.10518, equation 3), on inputs X_q that carry the quantization of all layers before ("sequential
    AdaQuant"), or on X itself. Unlike AdaRound, a weight may move by more than one step.

    What differs here: multipliers stay as first fitted, a scale a row is learned. The paper's third unknown, the step
    of the activations, is not learned: steps are the activation range's, which measures them on all inputs and not on
    some hundred rows, and mostly there is not one step to learn but one a token or a timestep; a rounding that wrote
    them too would take the range's place in the recipe. The bias is `bias_correction`'s. Rows of every timestep count
    alike. A quarter of the rows is not fitted to, and picks the best iteration, the start (nearest) among them. Adam
    goes without momentum: with it, codes go to and fro (error over nearest on emoji-sd's linear layers: 0.75, and 0.64
    without it).

    sequential:    needs "carried" of calibration: layers are quantized one block after the other.
    iterations:    the learning rate falls linearly to zero over them.
    learning_rate: of the weights, in steps of their grid; a hundredth of it for the logarithm of a scale.
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
        if inputs is None or len(inputs) < HELD_OUT:
            return grid.rounded(grid.nearest(state.weight))
        quantized = state.on_input_grid(inputs if arriving is None else arriving) * state.balance()
        target = (inputs * state.balance()) @ state.weight.T
        held_out = torch.arange(len(inputs), device=inputs.device) % HELD_OUT == 0
        fit = _Fit(state.weight, grid, shared_scale=state.plan.granularity == "tensor")
        best, least = fit.rounded(), fit.error(quantized[held_out], target[held_out])
        rows, wanted = quantized[~held_out], target[~held_out]
        draw = torch.Generator().manual_seed(0)
        for iteration in range(self.iterations):
            batch = torch.randperm(len(rows), generator=draw)[:BATCH_ROWS].to(rows.device)
            fit.step(rows[batch], wanted[batch], self.learning_rate * (1 - iteration / self.iterations))
            if (iteration + 1) % CHECK_EVERY == 0 or iteration + 1 == self.iterations:
                error = fit.error(quantized[held_out], target[held_out])
                if error < least:
                    best, least = fit.rounded(), error
        return best


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

    def step(self, rows: Float[Tensor, "R K"], wanted: Float[Tensor, "R N"], rate: float) -> None:
        """The gradient passes rounding as if it were not there, and ends where codes are clipped."""
        codes = self.codes()
        steps = self.steps * self.growth.exp()
        gradient = ((rows @ (steps * codes).T - wanted / self.unit).T @ rows) * steps
        scale_gradient = (gradient * codes).sum(1, keepdim=True)
        if self.shared_scale:
            scale_gradient = scale_gradient.sum(0, keepdim=True).expand_as(scale_gradient)
        inside = (self.levels >= self.grid.low - 0.5) & (self.levels <= self.grid.high + 0.5)
        self.levels -= rate * self.squares[0].normalized(gradient * inside)
        self.growth -= rate / 100 * self.squares[1].normalized(scale_gradient)


class _MeanSquare:
    """Adam's (arXiv 1412.6980, algorithm 1) running mean of squared gradients, started without bias."""

    def __init__(self, like: Tensor) -> None:
        self.square, self.count = torch.zeros_like(like), 0

    def normalized(self, gradient: Tensor) -> Tensor:
        """The gradient over its root mean square."""
        self.count += 1
        self.square.lerp_(gradient.square(), 1 - DECAY)
        return gradient / (self.square / (1 - DECAY**self.count)).sqrt_().add_(FLOOR)
