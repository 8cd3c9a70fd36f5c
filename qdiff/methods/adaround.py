"""AdaRound: every weight is rounded up or down as the layer's output wants it, not to the nearest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qdiff.methods.contract import RoundedWeight, Rounding
from qdiff.methods.registry import register
from qdiff.methods.state import LayerState
from qdiff.methods.weight_grid import WeightGrid, quick_nearest
from qdiff.numerics.soft_rounding import SoftRounding

# Adam's, of V.
LEARNING_RATE = 0.2


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
    are the better; in the end each row's scale is fitted by least squares; the layer's activation function is not
    looked at.

    Error of a layer's output over that of nearest, W4A8, on 8 captions and classes that calibration did not see, mean
    over layers: 0.64 on emoji-sd (every third layer) and 0.71 on emoji-dit (all 46), where GPTQ has 0.62 and 0.67. A
    weight moves by less than a step, which binds where inputs are few-dimensional, as embeddings of time are.

    With block_iterations the layers of a block are learned further together, for the block's output, errors weighted by
    squared gradients: BRECQ (arXiv 2102.05426), see `qdiff.plugin.block_rounding`. Within one layer such weights would
    change nothing: rows of W~ do not share a term.

    iterations:      steps of Adam.
    regularization:  lambda, over the mean share of a weight in the loss of nearest codes.
    warm_start:      fraction of the steps before f counts.
    shrinkage:       share of H's off-diagonal part that is not believed: inputs of few prompts are correlated in ways
                     that those of others are not.
    block_iterations:  steps of Adam for a block; 0: none. More need "carried" of calibration: blocks come one after
                     the other.
    Law: without statistics the codes are the nearest; a row's loss is never above that of its nearest codes.
    """

    iterations: int = 300
    regularization: float = 30.0
    warm_start: float = 0.2
    shrinkage: float = 0.2
    block_iterations: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"adaround.iterations must be a whole number of at least 1: got {self.iterations!r}")
        if isinstance(self.regularization, bool) or not 0 < self.regularization < math.inf:
            raise ValueError(f"adaround.regularization must be a positive number: got {self.regularization!r}")
        steps = self.block_iterations
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"adaround.block_iterations must be a whole number, 0 or more: got {steps!r}")
        for name in ("warm_start", "shrinkage"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value < 1:
                raise ValueError(f"adaround.{name} must be in [0, 1): got {value!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian", "samples", "carried"} if self.block_iterations else {"hessian", "samples"})

    @property
    def block_steps(self) -> int:
        return self.block_iterations

    def preview(self, state: LayerState) -> RoundedWeight:
        return quick_nearest(state)

    def round(self, state: LayerState) -> RoundedWeight:
        hessian = state.hessian()
        grid = WeightGrid.fit(state.plan, state.weight, None if hessian is None else hessian.diagonal())
        nearest = grid.nearest(state.weight)
        if hessian is None:
            return grid.rounded(nearest)
        loss = OutputLoss.of(state, hessian.lerp(hessian.diagonal().diag(), self.shrinkage))
        steps = grid.steps(state.weight.shape[1])
        learned = self._learned_codes(loss, steps, nearest.float(), grid)
        better = loss(learned * steps) < loss(nearest * steps)
        codes = torch.where(better[:, None], learned.to(torch.int8), nearest)
        if state.plan.granularity != "tensor":
            grid = grid.rescaled(loss.ratios(codes * steps))
        return grid.rounded(codes)

    def _learned_codes(
        self, loss: OutputLoss, steps: Float[Tensor, "N K"], nearest: Float[Tensor, "N K"], grid: WeightGrid
    ) -> Float[Tensor, "N K"]:
        ratio = loss.weight / steps
        floor = ratio.floor()
        # At first, the fraction that floor left: the weight as it is.
        rounding = SoftRounding(ratio - floor, self.iterations, self.regularization, self.warm_start, LEARNING_RATE)
        per_weight = steps / loss.share(nearest * steps)
        for _ in range(self.iterations):
            codes = floor + rounding.h
            inside = (codes >= grid.low) & (codes <= grid.high)
            slope = loss.gradient(codes.clamp_(grid.low, grid.high) * steps)
            rounding.step(slope.mul_(per_weight).mul_(inside))
        return (floor + rounding.up()).clamp_(grid.low, grid.high)


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

    def ratios(self, rounded: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
        """What to multiply each row by for the least loss: positive."""
        square = ((rounded @ self.curvature) * rounded).sum(1)
        ratio = (self.target * rounded).sum(1) / square
        return torch.where((square > 0) & (ratio > 0), ratio, 1.0)

    def share(self, nearest: Float[Tensor, "N K"]) -> Float[Tensor, "N 1"]:
        """A weight's mean part in the loss of the nearest codes; a little more than nothing for rows that have none."""
        least = 1e-6 * (self.target * self.weight).sum(1)
        share = torch.maximum(self(nearest), least)[:, None] / self.weight.shape[1]
        return torch.where(share > 0, share, 1.0)
