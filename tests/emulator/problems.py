"""Products of quantized activations and packed weights, with what they are in float64: for the tests of the tiles."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from qdiff.numerics.gemm_layout import from_gemm
from qdiff.numerics.packing import pack_int4, pack_multipliers


def make_problem(case: Any) -> SimpleNamespace:
    """The arguments of a launcher, and `weight`, its integers; `case` is the `Case` of test_gemm_mma.py or alike."""
    generator = torch.Generator().manual_seed(0)

    def integers(low, high, *shape):
        if case.extremes:  # the same sign in every product: the largest sums there are
            return torch.full(shape, low)
        return torch.randint(low, high + 1, shape, generator=generator)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype)

    images, rows, columns = case.size
    channels, taps = sum(case.segments), case.kernel[0] * case.kernel[1]
    k = channels * taps
    multipliers = codebook = None
    if case.weight == 8:
        weight = codes = integers(-127, 127, case.n, k).to(torch.int8)
    else:
        q = integers(-8, 7, case.n, k).to(torch.int8)
        codes = pack_int4(q, 32)
        if case.weight == 5:
            codebook = integers(-127, 127, case.n, 16).to(torch.int8)
            weight = codebook.gather(1, q.long() + 8)
        else:
            m = torch.full((case.n, k // 32), 15) if case.extremes else integers(1, 15, case.n, k // 32)
            multipliers = pack_multipliers(m.to(torch.uint8))
            weight = (q * m.repeat_interleave(32, 1)).to(torch.int8)
    x = integers(-127, 127, images, rows, columns, channels).to(torch.int8)
    oh, ow = (
        (extent + 2 * case.padding[i] - case.kernel[i]) // case.stride[i] + 1
        for i, extent in enumerate((rows, columns))
    )
    pixels = images * oh * ow
    # Of the accumulators' size to the other terms', so that an error in any of them shows.
    x_scale = torch.rand(case.scale_rows, len(case.segments), generator=generator) + 0.5
    return SimpleNamespace(
        x=x,
        B=images,
        H=rows,
        W=columns,
        C=channels,
        OH=oh,
        OW=ow,
        N=case.n,
        kernel=case.kernel,
        stride=case.stride,
        padding=case.padding,
        segments=case.segments,
        x_scale=x_scale,
        weight_kind=case.weight,
        codes=codes,
        multipliers=multipliers,
        codebook=codebook,
        scale=(torch.rand(case.n, generator=generator) + 0.5) / (70 * 30 * k**0.5),
        bias=None if case.bias is None else normal(case.n, dtype=case.bias),
        shift=normal(images, case.n) if case.shift else None,
        residual=normal(pixels, case.n, dtype=case.out_dtype) if case.residual else None,
        x_low=normal(pixels, case.rank, dtype=case.low_dtype) if case.rank else None,
        up=normal(case.n, case.rank, dtype=case.low_dtype) if case.rank else None,
        out_dtype=case.out_dtype,
        weight=weight,
    )


def accumulators(problem: SimpleNamespace) -> list[torch.Tensor]:
    """The integer sums [pixels, N] of every segment, exact in float64."""
    x = problem.x.double().permute(0, 3, 1, 2).split(problem.segments, dim=1)
    weight = from_gemm(problem.weight.double(), problem.segments, problem.kernel).split(problem.segments, dim=1)
    sums = (F.conv2d(a, b, None, problem.stride, problem.padding) for a, b in zip(x, weight))
    return [one.permute(0, 2, 3, 1).reshape(-1, problem.N) for one in sums]


def rounded(problem: SimpleNamespace) -> torch.Tensor:
    """The result [pixels, N] with the contract's roundings, but for the low-rank sum, which is exact."""
    sums = accumulators(problem)
    pixels = sums[0].shape[0]
    x_scale = problem.x_scale.repeat_interleave(pixels // problem.x_scale.shape[0], dim=0)
    y = torch.zeros(pixels, problem.N)
    for s, one in enumerate(sums):
        y += one.float() * x_scale[:, s, None]
    y *= problem.scale
    if problem.bias is not None:
        y += problem.bias.float()
    if problem.shift is not None:
        y += problem.shift.repeat_interleave(problem.OH * problem.OW, dim=0)
    if problem.x_low is not None:
        y = (y.double() + problem.x_low.double() @ problem.up.double().T).float()
    if problem.residual is not None:
        y += problem.residual.float()
    return y.to(problem.out_dtype)


def replace_scales(problem: SimpleNamespace) -> SimpleNamespace:
    """The same problem with infinities in all that the int32 output may not look at."""
    changed = vars(problem).copy()
    for name in ("scale", "bias", "shift", "residual", "x_scale", "x_low", "up"):
        if changed[name] is not None:
            changed[name] = torch.full_like(changed[name], torch.inf)
    return SimpleNamespace(**changed)


def guard(problem: SimpleNamespace, guarded: Callable) -> SimpleNamespace:
    """The same problem in arrays after which there is no memory, aligned to 16 bytes where launchers see to it."""
    changed = vars(problem).copy()
    for name, value in changed.items():
        if isinstance(value, torch.Tensor):
            aligned = name in ("x", "codes", "codebook", "residual", "x_low", "up")
            changed[name] = guarded(value, 16 if aligned else value.element_size())
    return SimpleNamespace(**changed)


def assert_result(got: torch.Tensor, problem: SimpleNamespace) -> None:
    """Assert that `got` is `rounded(problem)`: bit for bit, but for the low-rank branch."""
    want = rounded(problem)
    if problem.x_low is None:
        assert torch.equal(got, want)
        return
    # float32 sums of `rank` terms in another order, then one rounding: a unit in the last place of the type at most,
    # but where the terms cancel.
    eps, rank = torch.finfo(got.dtype).eps, problem.up.shape[1]
    slack = 2**-23 * (rank + 3) * (1 + problem.x_low.double().abs() @ problem.up.double().abs().T)
    assert ((got.double() - want.double()).abs() <= eps * want.double().abs() + slack).all()
    assert (got != want).float().mean() < (1 if got.dtype == torch.float32 else 0.02)
