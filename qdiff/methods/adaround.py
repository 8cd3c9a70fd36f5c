"""AdaRound: every weight is rounded up or down as the layer's output wants it, not to the nearest."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff.methods.contract import RoundedWeight, Rounding
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState
from qdiff.methods.weight_grid import WeightGrid, quick_nearest

# Of the rectified sigmoid (equation 23), and of the regularizer's annealing (equation 24).
ZETA, GAMMA = 1.1, -0.1
BETA_START, BETA_END = 20.0, 2.0
# Adam's. Its steps are the same for every scale of the loss.
LEARNING_RATE = 0.1
MEAN_DECAY, SQUARE_DECAY = 0.9, 0.999


@register("adaround")
@dataclass(frozen=True)
class AdaRound(Rounding):
    """Learns for every weight whether to round it up or down.

    AdaRound (arXiv 2004.10568, equations 21 to 25): over a continuous V,

        min  E ||W x - W~ x^||^2 + lambda f(V),     x^ the input as quantized
        W~ = s clip(floor(W / s) + h(V), low, high),     h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
        f(V) = sum 1 - |2 h(V) - 1|^beta

    f is left out at first, then beta falls from 20 to 2, which drives every h to 0 or 1.

    What differs: the expectation is exact, not of a minibatch: with H = E x x^T over all calibration inputs, every
    timestep counting alike, and the error of quantized activations independent of the input, of variance D,
    E ||W x - W~ x^||^2 = tr(W H W^T - 2 W H W~^T + W~ (H + D) W~^T). So a few hundred full steps of Adam do. H is
    shrunk towards its diagonal. The loss of a row is relative to that of its nearest codes, which are kept where they
    are the better; the layer's activation function is not looked at.

    BRECQ (arXiv 2102.05426) reconstructs the output of a block of layers at once, errors weighted by squared gradients.
    A method sees one layer here, and there a fixed weight for each output changes nothing: rows of W~ do not share a
    term, so that each row's optimum is the same for every weight. Only gradients sample by sample would change it.

    iterations:      steps of Adam.
    regularization:  lambda, over the mean share of a weight in the loss of nearest codes.
    warm_start:      fraction of the steps before f counts.
    shrinkage:       share of H's off-diagonal part that is not believed: inputs of few prompts are correlated in ways
                     that those of others are not.
    Law: without statistics the codes are the nearest; a row's loss is never above that of its nearest codes.
    """

    iterations: int = 300
    regularization: float = 10.0
    warm_start: float = 0.2
    shrinkage: float = 0.2

    def __post_init__(self) -> None:
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"adaround.iterations must be a whole number of at least 1: got {self.iterations!r}")
        if isinstance(self.regularization, bool) or not 0 < self.regularization < math.inf:
            raise ValueError(f"adaround.regularization must be a positive number: got {self.regularization!r}")
        for name in ("warm_start", "shrinkage"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value < 1:
                raise ValueError(f"adaround.{name} must be in [0, 1): got {value!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian", "samples"})

    def preview(self, state: LayerState) -> RoundedWeight:
        return quick_nearest(state)

    def round(self, state: LayerState) -> RoundedWeight:
        hessian = state.hessian()
        grid = WeightGrid.fit(state.plan, state.weight, None if hessian is None else hessian.diagonal())
        nearest = grid.nearest(state.weight)
        if hessian is None:
            return grid.rounded(nearest)
        _warn_of_few_rows(state)
        loss = OutputLoss.of(state, hessian.lerp(hessian.diagonal().diag(), self.shrinkage))
        steps = grid.steps(state.weight.shape[1])
        learned = self._learned_codes(loss, steps, nearest.float(), grid)
        better = loss(learned * steps) < loss(nearest * steps)
        return grid.rounded(torch.where(better[:, None], learned.to(torch.int8), nearest))

    def _learned_codes(
        self, loss: OutputLoss, steps: Float[Tensor, "N K"], nearest: Float[Tensor, "N K"], grid: WeightGrid
    ) -> Float[Tensor, "N K"]:
        ratio = loss.weight / steps
        floor = ratio.floor()
        # h(V) = the fraction that floor left: the weight as it is.
        v = ((ratio - floor - GAMMA) / (ZETA - GAMMA)).logit_()
        per_weight = steps / loss.share(nearest * steps)
        mean, square = torch.zeros_like(v), torch.zeros_like(v)
        for step in range(1, self.iterations + 1):
            sigmoid = v.sigmoid()
            h = (sigmoid * (ZETA - GAMMA) + GAMMA).clamp_(0, 1)
            codes = floor + h
            inside = (codes >= grid.low) & (codes <= grid.high)
            slope = loss.gradient(codes.clamp_(grid.low, grid.high) * steps).mul_(per_weight).mul_(inside)
            slope.add_(self._pull(h, step))
            slope.mul_((h > 0) & (h < 1)).mul_(sigmoid).mul_(1 - sigmoid)  # of h; a constant factor is nothing to Adam
            mean.lerp_(slope, 1 - MEAN_DECAY)
            square.lerp_(slope.square_(), 1 - SQUARE_DECAY)
            root = (square / (1 - SQUARE_DECAY**step)).sqrt_().add_(1e-12)
            v.addcdiv_(mean, root, value=-LEARNING_RATE / (1 - MEAN_DECAY**step))
        return (floor + (v >= 0)).clamp_(grid.low, grid.high)

    def _pull(self, h: Float[Tensor, "N K"], step: int) -> Float[Tensor, "N K"] | float:
        """The regularizer's slope by h: towards 0 or 1, whichever is nearer."""
        progress = (step / self.iterations - self.warm_start) / (1 - self.warm_start)
        if progress <= 0:
            return 0.0
        beta = BETA_END + (BETA_START - BETA_END) * (1 + math.cos(math.pi * progress)) / 2
        side = 2 * h - 1
        return side.abs().pow_(beta - 1).copysign_(side).mul_(-2 * beta * self.regularization)


@dataclass(frozen=True)
class OutputLoss:
    """E (w x - q x^)^2 for every row w of the weight and q of the rounded one, a quadratic function of q.

    weight:  float32 [N, K].  target: W H.  curvature: H + D.
    """

    weight: Float[Tensor, "N K"]
    target: Float[Tensor, "N K"]
    curvature: Float[Tensor, "K K"]

    @classmethod
    def of(cls, state: LayerState, hessian: Float[Tensor, "K K"]) -> OutputLoss:
        """H on the scale of one, whatever the activations' is."""
        mean = hessian.diagonal().mean()
        scale = torch.where(mean > 0, 1 / mean, 1.0)
        hessian = hessian * scale
        curvature = hessian
        inputs, quantized = state.inputs(), state.quantized_inputs()
        if inputs is not None and quantized is not None:
            noise = ((quantized - inputs) * state.balance()).square().mean(0)
            curvature = hessian + (noise * scale).diag()
        return cls(state.weight, state.weight @ hessian, curvature)

    def __call__(self, rounded: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
        """The loss of every row."""
        whole = (self.target * self.weight).sum(1)
        return (rounded * (rounded @ self.curvature - 2 * self.target)).sum(1) + whole

    def gradient(self, rounded: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
        return (rounded @ self.curvature).sub_(self.target).mul_(2)

    def share(self, nearest: Float[Tensor, "N K"]) -> Float[Tensor, "N 1"]:
        """A weight's mean part in the loss of the nearest codes; a little more than nothing for rows that have none."""
        least = 1e-6 * (self.target * self.weight).sum(1)
        share = torch.maximum(self(nearest), least)[:, None] / self.weight.shape[1]
        return torch.where(share > 0, share, 1.0)


def _warn_of_few_rows(state: LayerState) -> None:
    moments = state.statistics and state.statistics.moments
    if moments and moments.rows < len(moments.mean):
        warnings.warn(
            f"adaround: calibration saw {moments.rows} rows of layer {state.plan.name!r}, fewer than its "
            f"{len(moments.mean)} inputs; the codes may suit no others: calibrate on more prompts or steps",
            stacklevel=3,
        )
