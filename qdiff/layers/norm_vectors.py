"""A norm's weight and bias, for operators that do its work."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def norm_vectors(norm: nn.Module) -> list[Tensor | None]:
    """Its weight and its bias, detached: calls with what wants a gradient take a longer way."""
    return [None if vector is None else vector.detach() for vector in norm._parameters.values()]


def has_vectors_of(norm: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the norm has no weight, or one of this dtype."""
    weight = norm._parameters["weight"]  # an attribute would take ten times as long
    return weight is None or weight.dtype == dtype
