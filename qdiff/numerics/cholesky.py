"""The triangular factor of a second moment that may be singular."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def damped_upper_factor(hessian: Tensor, damping: float, what: str) -> Tensor:
    """V of H + d I = V V^T, V upper triangular: float [K, K].

    d is `damping`, and ten times as much again, with a warning, as long as the sum is singular to working precision.

    Args:
        hessian: float [K, K], positive semi-definite, of mean diagonal one. In place, H + d I is added up in it.
        damping: above 0.
        what: what the warning says is singular.

    Raises:
        ValueError: the Hessian has NaN or infinite values, which no damping mends.
    """
    tried = damping
    hessian.diagonal().add_(tried)
    while True:
        # Of H turned end for end: its lower factor, turned back, is the upper one.
        factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            return factor.flip(0, 1)
        if not torch.isfinite(hessian).all():
            raise ValueError(f"{what} must be finite: got NaN or infinite values; look for them in the layer's inputs")
        hessian.diagonal().add_(9 * tried)
        tried *= 10
        warnings.warn(
            f"{what} is singular; damped by {tried:g} of its mean diagonal instead of {damping:g}", stacklevel=3
        )
