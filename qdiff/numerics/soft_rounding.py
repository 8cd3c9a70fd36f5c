"""AdaRound's relaxation of a choice: every weight is rounded up or down, and in between while that is being learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of the rectified sigmoid (arXiv 2004.10568, equation 23), and of the regularizer's annealing (equation 24).
ZETA, GAMMA = 1.1, -0.1
BETA_START, BETA_END = 20.0, 2.0
# Adam's. Its steps are the same for every scale of the loss.
MEAN_DECAY, SQUARE_DECAY = 0.9, 0.999


class SoftRounding:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), how far up each weight is rounded, and Adam's steps of V.

    AdaRound (arXiv 2004.10568): the loss is joined by lambda f(V), f(V) = sum 1 - |2 h(V) - 1|^beta. f is left out at
    first, then beta falls from 20 to 2, which drives every h to 0 or 1.

    Attributes:
        v, h: float32, of any shape.
    """

    def __init__(
        self, start: Tensor, steps: int, regularization: float, warm_start: float, learning_rate: float
    ) -> None:
        """
        Args:
            start: h to begin with, float in [0, 1].
            steps: of Adam, in all.
            regularization: lambda, in units of the loss.
            warm_start: fraction of the steps before f counts.
            learning_rate: Adam's, of V.
        """
        self.v = ((start.float() - GAMMA) / (ZETA - GAMMA)).logit_()
        self._steps, self._regularization, self._warm_start = steps, regularization, warm_start
        self._learning_rate = learning_rate
        self._taken = 0
        self._mean, self._square = torch.zeros_like(self.v), torch.zeros_like(self.v)
        self.h = self._rectified()

    def _rectified(self) -> Tensor:
        self._sigmoid = self.v.sigmoid()
        return (self._sigmoid * (ZETA - GAMMA) + GAMMA).clamp_(0, 1)

    def up(self) -> Tensor:
        """Whether each weight is rounded up, as things stand: bool."""
        return self.v >= 0

    def step(self, slope: Tensor) -> None:
        """One of Adam's. slope: of the loss by h; written over."""
        self._taken += 1
        slope.add_(self._pull())
        # By V now; a constant factor is nothing to Adam.
        slope.mul_((self.h > 0) & (self.h < 1)).mul_(self._sigmoid).mul_(1 - self._sigmoid)
        self._mean.lerp_(slope, 1 - MEAN_DECAY)
        self._square.lerp_(slope.square_(), 1 - SQUARE_DECAY)
        root = (self._square / (1 - SQUARE_DECAY**self._taken)).sqrt_().add_(1e-12)
        self.v.addcdiv_(self._mean, root, value=-self._learning_rate / (1 - MEAN_DECAY**self._taken))
        self.h = self._rectified()

    def _pull(self) -> Tensor | float:
        """The regularizer's slope by h: towards 0 or 1, whichever is nearer."""
        progress = (self._taken / self._steps - self._warm_start) / (1 - self._warm_start)
        if progress <= 0:
            return 0.0
        beta = BETA_END + (BETA_START - BETA_END) * (1 + math.cos(math.pi * progress)) / 2
        side = 2 * self.h - 1
        return side.abs().pow_(beta - 1).copysign_(side).mul_(-2 * beta * self._regularization)
