"""cuBLAS in fp8 at its best: weights quantized beforehand, the input by one Triton kernel where that is possible.

Three ways to scale the input: `static`, one scale known beforehand (one pass that reads and writes each value once);
`dynamic`, one scale a tensor (a pass more, for its largest magnitude); `rows`, one a token (`_scaled_mm`'s row-wise
scaling). The kernels' block sizes are tuned for each size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernel_bench.problems import LinearProblem

_ELEMENTWISE = [
    triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((1024, 4), (2048, 4), (4096, 8), (8192, 8))
]
_ROWS = [triton.Config({"ROWS": rows}, num_warps=warps) for rows, warps in ((1, 4), (1, 8), (2, 4), (4, 8), (8, 8))]


def _bench(kernel: Callable[[], None], quantiles: Sequence[float]) -> list[float]:
    return triton.testing.do_bench(kernel, warmup=2, rep=10, quantiles=quantiles)  # milliseconds a configuration


def _fitting(configs: list[triton.Config], arguments: dict, WIDTH: int, **_) -> list[triton.Config]:
    # A tile of more values than these does not fit the registers, and takes long to compile.
    return [config for config in configs if config.kwargs["ROWS"] == 1 or config.kwargs["ROWS"] * WIDTH <= 16384]


@triton.autotune(_ELEMENTWISE, key=["n"], do_bench=_bench)
@triton.jit
def _scale_kernel(x, out, scale, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    v = tl.load(x + offsets, mask=inside).to(tl.float32) * (1.0 / tl.load(scale))
    v = tl.minimum(tl.maximum(v, -448.0), 448.0)
    tl.store(out + offsets, v.to(tl.float8e4nv), mask=inside)


@triton.autotune(_ELEMENTWISE, key=["n"], do_bench=_bench)
@triton.jit
def _largest_kernel(x, scale, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    tl.atomic_max(scale, tl.max(tl.abs(v), axis=0) / 448.0)


@triton.autotune(_ROWS, key=["m", "k"], prune_configs_by={"early_config_prune": _fitting}, do_bench=_bench)
@triton.jit
def _rows_kernel(x, out, scale, m, k, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row[:, None] < m) & (column[None, :] < k)
    offsets = row[:, None] * k + column[None, :]
    v = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(v), axis=1), 1e-12) / 448.0
    tl.store(scale + row, step, mask=row < m)
    tl.store(out + offsets, (v * (1.0 / step)[:, None]).to(tl.float8e4nv), mask=inside)


class Fp8Linear:
    """The layers of a `LinearProblem` in fp8. Every method takes the number of a copy."""

    def __init__(self, problem: LinearProblem) -> None:
        self.x = problem.x
        self.bias = [weights.bias for weights in problem.weights]
        self.bias_bfloat16 = [bias.bfloat16() for bias in self.bias]
        self.scale = torch.full((), 5 / 448, device="cuda")
        self.w_scale = torch.full((), 0.1 / 448, device="cuda")
        # [k, n], column-major, as cuBLAS wants it
        self.w = [(weights.half / self.w_scale).to(torch.float8_e4m3fn).t() for weights in problem.weights]
        self.w_row_scale = self.w_scale.expand(1, self.w[0].shape[1]).contiguous()

    def static(self, i: int) -> Tensor:
        codes = torch.empty_like(self.x[i], dtype=torch.float8_e4m3fn)
        self._static(self.x[i], self.scale, codes)
        return self._product(codes, i, self.scale, self.w_scale)

    def dynamic(self, i: int) -> Tensor:
        x, scale = self.x[i], torch.zeros((), device="cuda")
        _largest_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, scale, x.numel())
        codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        self._static(x, scale, codes)
        return self._product(codes, i, scale, self.w_scale)

    def rows(self, i: int) -> Tensor:
        x, (m, k) = self.x[i], self.x[i].shape
        codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        scale = torch.empty(m, 1, device="cuda")
        grid = lambda meta: (triton.cdiv(m, meta["ROWS"]),)  # noqa: E731
        _rows_kernel[grid](x, codes, scale, m, k, WIDTH=triton.next_power_of_2(k))
        return self._product(codes, i, scale, self.w_row_scale, self.row_dtype)

    def product_alone(self, i: int) -> Tensor:
        return self._product(self.codes, i, self.scale, self.w_scale)

    def _static(self, x: Tensor, scale: Tensor, codes: Tensor) -> None:
        _scale_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, codes, scale, x.numel())

    def _product(
        self, codes: Tensor, i: int, scale: Tensor, w_scale: Tensor, dtype: torch.dtype = torch.float16
    ) -> Tensor:
        bias = (self.bias if dtype == torch.float16 else self.bias_bfloat16)[i]
        return torch._scaled_mm(codes, self.w[i], scale, w_scale, bias, out_dtype=dtype, use_fast_accum=True)

    @cached_property
    def codes(self) -> Tensor:
        """The first copy's input."""
        codes = torch.empty_like(self.x[0], dtype=torch.float8_e4m3fn)
        self._static(self.x[0], self.scale, codes)
        return codes

    @cached_property
    def row_dtype(self) -> torch.dtype:
        """Some versions of torch give row-wise products in bfloat16 alone."""
        scale = self.scale.expand(self.x[0].shape[0], 1).contiguous()
        try:
            self._product(self.codes, 0, scale, self.w_row_scale)
        except (RuntimeError, ValueError):
            return torch.bfloat16
        return torch.float16
