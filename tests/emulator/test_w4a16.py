"""cuda/w4a16_linear.cu and its launcher, run on the CPU, against products in float64."""

from __future__ import annotations

import pytest
import torch

from qdiff.numerics.packing import pack_int4, pack_multipliers
from qdiff.ops import _cupy, _w4a16_cuda
from qdiff.ops.checks import Checked

SHARED_LIMIT = 227 << 10


@pytest.fixture(autouse=True)
def device(monkeypatch, emulated_kernel):
    """A GPU of three multiprocessors, emulated."""

    monkeypatch.setattr(_cupy, "kernel", emulated_kernel)
    monkeypatch.setattr(_cupy, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(_cupy, "capability", lambda device: (9, 0))
    monkeypatch.setattr(_w4a16_cuda, "_shared_limit", lambda device: SHARED_LIMIT)


def weight(kind, n, k, generator):
    """The integers of W, and how they are stored: codes, multipliers, codebook."""
    if kind == "int8":
        w = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
        return w, w, None, None
    u = torch.randint(0, 16, (n, k), generator=generator)
    codes = pack_int4((u - 8).to(torch.int8), 32)
    if kind == "codebook":
        codebook = torch.randint(-128, 128, (n, 16), generator=generator).to(torch.int8)
        return codebook.gather(1, u), codes, None, codebook
    m = torch.randint(1, 16, (n, k // 32), generator=generator).to(torch.uint8)
    return (u - 8) * m.repeat_interleave(32, 1), codes, pack_multipliers(m), None


def check(kind, dtype, rows, n, k, guarded):
    generator = torch.Generator().manual_seed(0)
    x = guarded(torch.randn(*rows, k, generator=generator).to(dtype))
    integers, *stored = weight(kind, n, k, generator)
    stored = [None if part is None else guarded(part) for part in stored]
    scale = guarded(torch.rand(n, generator=generator) / 100 + 1e-3)
    smooth = guarded(torch.rand(k, generator=generator) + 0.5)
    bias = torch.randn(n, generator=generator)
    down, up = torch.randn(8, k, generator=generator) / 30, torch.randn(n, 8, generator=generator)
    for use_smooth, use_bias, use_branch in ((False, None, False), (True, dtype, True), (True, torch.float32, False)):
        s, b = smooth if use_smooth else None, None if use_bias is None else guarded(bias.to(use_bias))
        branch = (down.to(dtype), guarded(up)) if use_branch else (None, None)
        args = (x, s, *stored, scale, 32, b, *branch)
        y = _w4a16_cuda.linear(Checked(None), *args)
        assert y.shape == (*rows, n)
        assert y.dtype == dtype

        xs = (x if s is None else (x * s).to(dtype)).double()
        w = integers.double() * scale.double()[:, None]
        exact, size = xs @ w.T, xs.abs() @ w.abs().T
        if b is not None:
            exact += b.double()
        if use_branch:
            low = (xs @ branch[0].double().T).to(dtype).double()
            exact += low @ up.double().T
            size += torch.finfo(dtype).eps * (low.abs() @ up.abs().double().T) * 2**20
        # Sums in float32 in another order, and one rounding; the branch's first half may round either way.
        slack = size * 2**-20 + exact.abs() * torch.finfo(dtype).eps
        assert ((y.double() - exact).abs() <= slack).all()


@pytest.mark.parametrize(
    ("kind", "dtype", "rows", "n", "k"),
    [
        ("two-level", torch.float16, (1,), 40, 32),
        ("two-level", torch.float16, (2,), 30, 1280),  # ten units for eight warps
        ("two-level", torch.float16, (2, 4), 200, 1280),  # five tiles a block, four units a warp
        ("two-level", torch.float16, (1,), 700, 352),  # a warp has parts of two tiles
        ("two-level", torch.float16, (2,), 900, 96),  # a warp has more than a tile
        ("two-level", torch.bfloat16, (16,), 77, 1056),
        ("two-level", torch.float32, (3,), 77, 1056),
        ("codebook", torch.float16, (2,), 77, 1056),
        ("int8", torch.bfloat16, (16,), 77, 1056),
        ("int8", torch.float16, (9,), 50, 160),
    ],
)
def test_linear(kind, dtype, rows, n, k, guarded):
    check(kind, dtype, rows, n, k, guarded)


@pytest.mark.parametrize(("kind", "type_", "threads"), [("two-level", 4, 256), ("codebook", 5, 256), ("int8", 8, 128)])
def test_little_shared_memory(kind, type_, threads, guarded, monkeypatch):
    """Fewer warps, fewer units under way, and more blocks than multiprocessors."""
    limit = 53 << 10
    monkeypatch.setattr(_w4a16_cuda, "_shared_limit", lambda device: limit)
    plan = _w4a16_cuda._plan(torch.float16, type_, 15, 300, 800, limit, 3)
    assert plan.threads == threads
    assert plan.blocks > 3
    assert plan.shared_bytes <= limit
    check(kind, torch.float16, (15,), 300, 800, guarded)


def test_a_block_has_what_fits():
    plans = [_w4a16_cuda._plan(torch.float16, 4, 8, n, 3072, 227 << 10, 132) for n in (3072, 18432, 262144)]
    assert [plan.blocks for plan in plans] == [128, 132, 264]
    assert all(plan.shared_bytes <= 227 << 10 for plan in plans)
    assert _w4a16_cuda._plan(torch.float16, 4, 16, 3072, 12288, 227 << 10, 132) is None


def test_what_it_does_not_take():
    def takes(rows=2, k=64, group_size=32, dtype=torch.float16):
        codes = torch.zeros(8, k // 2, dtype=torch.uint8)
        multipliers = torch.zeros(8, (k // group_size + 1) // 2, dtype=torch.uint8)
        x = torch.zeros(rows, k, dtype=dtype)
        args = (x, None, codes, multipliers, None, torch.ones(8), group_size, None, None, None)
        return _w4a16_cuda.linear(Checked(None), *args) is not None

    assert takes()
    assert takes(rows=16)
    assert not takes(rows=17)
    assert not takes(rows=0)
    assert not takes(k=48, group_size=16)
    assert not takes(group_size=16)
    assert takes(rows=8, k=12288)
    assert not takes(rows=16, k=12288)
