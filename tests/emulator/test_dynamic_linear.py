"""A linear layer with the quantization of its input, run on the CPU from one call, against the reference."""

from __future__ import annotations

import sys

import pytest
import torch

from qdiff import ops
from qdiff.numerics.packing import pack_int4, pack_multipliers
from qdiff.ops import _cupy, _gemm, _tiles, checks

# Each kernel variant costs two seconds of g++: the cases are chosen to need few.


@pytest.fixture
def on_kernels(monkeypatch, emulated_kernel, guarded):
    """Runs the operator on a GPU of two multiprocessors, emulated; there is no memory after its arguments."""
    monkeypatch.setattr(_cupy, "kernel", emulated_kernel)
    monkeypatch.setattr(_cupy, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(_cupy, "capability", lambda device: (9, 0))
    monkeypatch.setattr(_tiles, "_chosen", {})

    def run(arguments):
        with monkeypatch.context() as patch, _gemm.forced_path("mma"), _gemm.forced_tile("64x16"):
            patch.setattr(sys.modules["qdiff.ops.dynamic_linear"], "runs_kernel", lambda op, x, refusal: True)
            return ops.dynamic_linear(*(guarded(a) if isinstance(a, torch.Tensor) else a for a in arguments))

    checks.forget()
    yield run
    checks.forget()


@pytest.mark.parametrize(
    ("bits", "rank", "dtype"),
    [(4, 8, torch.float16), (8, 0, torch.float16), (8, 0, torch.float32)],
    ids=["4 bits and a branch", "8 bits", "8 bits, float32"],
)
def test_every_call_computes_the_reference(bits, rank, dtype, on_kernels):
    m, n, k = 33, 70, 96
    generator = torch.Generator().manual_seed(0)
    q, multipliers = (
        torch.randint(-8, 8, (n, k), generator=generator),
        torch.randint(1, 16, (n, 3), generator=generator),
    )
    four, eight = pack_int4(q.to(torch.int8), 32), torch.randint(-127, 128, (n, k), generator=generator)
    codes, packed = (four, pack_multipliers(multipliers.to(torch.uint8))) if bits == 4 else (eight.to(torch.int8), None)
    scale, bias = torch.rand(n, generator=generator) / 700, torch.randn(n, generator=generator)
    down = torch.randn(rank, k, generator=generator).to(dtype) / 10 if rank else None
    up = torch.randn(n, rank, generator=generator).to(dtype) if rank else None
    for call in range(3):  # the second and the third by what the first has left
        x, smooth = torch.randn(m, k, generator=generator).to(dtype), torch.rand(k, generator=generator) + 0.1
        arguments = (x, smooth, down, codes, packed, None, scale, 32, bias, up)
        assert torch.equal(on_kernels((*arguments, torch.int32)), ops.dynamic_linear(*arguments, torch.int32))
        got, expected = on_kernels((*arguments, torch.float16)), ops.dynamic_linear(*arguments, torch.float16)
        # One rounding to float16, which another order of the branch's sum may tip over.
        torch.testing.assert_close(got, expected, rtol=2**-10, atol=1e-3 if rank else 0, msg=f"call {call}")
