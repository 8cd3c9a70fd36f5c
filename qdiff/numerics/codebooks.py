"""Levels of a row's own choosing: the 16-entry int8 codebook of the 4-bit format.

    w[n, k] ~ scale[n] * codebook[n, code[n, k]]

Whoever learns levels alternates between the cells of given levels and levels for given cells. In one dimension the
cells are intervals, so on a sorted row every sum over a cell is a difference of two prefix sums: an iteration costs a
search for the cells' borders, whatever the row's length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qdiff.numerics.cholesky import damped_upper_factor
from qdiff.recipe import LayerPlan

ENTRIES = 16
_LARGEST = 127
# Added to the diagonal of a second moment, over its mean, before it is factored: GPTQ's.
_DAMPING = 0.01
# Share of its off-diagonal part that is not believed. Measured on inputs of other prompts, 16 of them calibrated on: a
# layer of emoji-sd's middle block, where one prompt gives few distinct inputs, gains 17 % of the error's norm, others
# lose 1 % at most.
_SHRINKAGE = 0.2


def check_levels(method: str, plan: LayerPlan) -> None:
    """Raise `ValueError` for a plan whose weights cannot have levels of their row's own."""
    if plan.weight_bits > 4:
        raise ValueError(
            f"{plan.name}: {method} learns at most {ENTRIES} levels, of 4 bits: got weight_bits={plan.weight_bits}; "
            "round this layer with 'nearest', or give it fewer bits"
        )
    if plan.granularity == "tensor":
        raise ValueError(
            f"{plan.name}: {method} learns levels for every row: got granularity='tensor'; use 'channel' or 'group'"
        )


class SortedRows(NamedTuple):
    """The rows of a matrix, ready for sums over intervals.

    Attributes:
        values: float32 [N, K], ascending along K, divided by `peaks`.
        sums: float64 [3, N, K + 1], prefix sums of importance, importance * value and importance * value^2.
        peaks: float32 [N], the largest magnitude of each row, 1 for rows of zeros.
    """

    values: Tensor
    sums: Tensor
    peaks: Tensor

    @classmethod
    def of(cls, w: Tensor, importance: Tensor | None = None) -> SortedRows:
        """Of a float matrix [N, K], each input weighted by importance [K] >= 0 (ones where None or all zero)."""
        peaks = w.float().abs().amax(1)
        peaks = torch.where(peaks > 0, peaks, 1.0)
        values, order = (w.float() / peaks[:, None]).sort(1)
        weights = torch.ones_like(values) if importance is None else importance.float()[order]
        # Relative to the mean, so that no scale of the inputs leaves float64; a row of no importance counts evenly.
        total = weights.sum(1, keepdim=True)
        weights = torch.where(total > 0, weights / total, 1 / w.shape[1]).double()
        moments = torch.stack([weights, weights * values, weights * values.double().square()])
        return cls(values, torch.nn.functional.pad(moments.cumsum(-1), (1, 0)), peaks)

    def cells(self, levels: Tensor) -> Tensor:
        """Sums of importance, of importance * value and of importance * value^2 over every level's nearest values.

        levels: float32 [N, ..., L], ascending.  Returns: float64 [3, N, ..., L].
        """
        middles = ((levels[..., 1:] + levels[..., :-1]) / 2).flatten(1)
        borders = torch.searchsorted(self.values, middles).view(*levels.shape[:-1], -1)
        ends = torch.nn.functional.pad(borders, (0, 1), value=self.values.shape[1])
        reached = self.sums.gather(2, ends.flatten(1).expand(3, -1, -1)).view(3, *levels.shape)
        return reached.diff(dim=-1, prepend=torch.zeros_like(reached[..., :1]))

    def error(self, levels: Tensor) -> Tensor:
        """Mean weighted squared distance of a row's values to their nearest level: [N, ..., L] to float64 [N, ...]."""
        weight, first, second = self.cells(levels)
        level = levels.double()
        return (second - 2 * level * first + level.square() * weight).sum(-1)

    def rms(self) -> Tensor:
        """Weighted root mean square of every row, float64 [N]."""
        return self.sums[2, :, -1].sqrt()

    def companded(self, count: int) -> Tensor:
        """Where the best levels are about to lie, were there many: their density is the cube root of the values'
        (Panter and Dite, 1951). float32 [N, count], ascending.
        """
        gaps = self.values.double().diff(dim=1)
        weight = self.sums[0].diff(dim=1)
        # density^(1/3) * gap, the density between two neighbours being their mean weight over their gap.
        mass = ((weight[:, 1:] + weight[:, :-1]) / 2).pow(1 / 3) * gaps.pow(2 / 3)
        reached = torch.nn.functional.pad(mass.cumsum(1), (1, 0))
        shares = (torch.arange(count, device=reached.device) + 0.5) / count
        chosen = torch.searchsorted(reached, shares * reached[:, -1:])
        return self.values.gather(1, chosen.clamp_max(self.values.shape[1] - 1))


def to_codebook(levels: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor]:
    """Levels float [N, L <= 16], in units of `peaks` [N], to a codebook int8 [N, 16] and its scale float32 [N].

    The largest level becomes 127. Entries that are not used repeat the last.
    """
    largest = levels.abs().amax(1, keepdim=True)
    integers = (levels / torch.where(largest > 0, largest, 1.0) * _LARGEST).round().to(torch.int8)
    codebook = torch.cat([integers, integers[:, -1:].expand(-1, ENTRIES - levels.shape[1])], 1)
    scale = torch.where(largest[:, 0] > 0, largest[:, 0] * peaks / _LARGEST, 1.0)
    return codebook, scale.clamp_min(torch.finfo(torch.float32).tiny)


def nearest_entries(w: Tensor, codebook: Tensor, scale: Tensor) -> Tensor:
    """The index of the entry nearest to each weight: int8 [N, K].

    codebook: int8 [N, L], the entries in use, ascending.
    """
    entries = codebook.float()
    borders = (entries[:, 1:] + entries[:, :-1]) / 2
    return torch.searchsorted(borders, (w.float() / scale[:, None]).contiguous()).to(torch.int8)


def compensated_entries(w: Tensor, codebook: Tensor, scale: Tensor, hessian: Tensor, layer: str) -> Tensor:
    """Entries chosen one input after the other, each making up for the errors of those before: int8 [N, K].

    GPTQ's error feedback (arXiv 2210.17323, equations 2 and 3) with a codebook for its grid. With H = V V^T, V upper
    triangular, the target of input j is w_j + sum_{i<j} e_i V_ij / V_jj (arXiv 2507.18553). Inputs go by falling H_jj.
    H is damped, and shrunk towards its diagonal.

    codebook: int8 [N, L], ascending.  hessian: float [K, K], second moment of the inputs.  layer: its name, for a
    warning where the Hessian is singular.
    """
    mean = hessian.diagonal().mean()
    hessian = hessian.lerp(hessian.diagonal().diag(), _SHRINKAGE)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    ordered = hessian[order][:, order] / torch.where(mean > 0, mean, 1.0)
    factor = damped_upper_factor(ordered, _DAMPING, f"{layer}: the inputs' second moment")
    feedback = factor / factor.diagonal()
    values = codebook * scale[:, None]
    borders = (values[:, 1:] + values[:, :-1]) / 2
    # Transposed: an input's weights are then one row of memory.
    target = w.float().T[order].contiguous()
    errors = torch.empty_like(target)
    codes = torch.empty(target.shape, dtype=torch.int8, device=w.device)
    for j in range(len(target)):
        wanted = target[j] + feedback[:j, j] @ errors[:j]
        entry = torch.searchsorted(borders, wanted[:, None])
        errors[j] = target[j] - values.gather(1, entry)[:, 0]
        codes[order[j]] = entry[:, 0].to(torch.int8)
    return codes.T.contiguous()
