import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdiff.numerics import integer_matmul
from qdiff.numerics.integer_matmul import int_matmul, split_float_matmul


def random_int8(*shape, seed=0):
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("product", [int_matmul, split_float_matmul])
@given(st.integers(0, 40), st.integers(0, 70), st.integers(0, 40), st.integers(0, 9))
def test_equals_the_int64_product(product, m, k, n, seed):
    a, b = random_int8(m, k, seed=seed), random_int8(n, k, seed=seed + 1)
    result = product(a, b)
    assert result.dtype == torch.int32
    assert torch.equal(result.long(), a.long() @ b.long().t())


@pytest.mark.parametrize("product", [int_matmul, split_float_matmul])
@pytest.mark.parametrize("k", [1024, 1025, 5000, 11520])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127)])
def test_extreme_sums_are_exact(product, k, left, right):
    a, b = torch.full((3, k), left, dtype=torch.int8), torch.full((5, k), right, dtype=torch.int8)
    assert (product(a, b) == left * right * k).all()


def test_float_product_is_exact_where_float32_alone_is_not():
    """Sums above 2^24 that differ by one."""
    a = torch.full((2, 2048), 127, dtype=torch.int8)
    b = torch.full((1, 2048), 127, dtype=torch.int8)
    a[1, 0], b[0, 0] = 126, 1
    first, second = split_float_matmul(a, b).flatten().tolist()
    assert first > 2**24
    assert first - second == 1


def test_strided_operands():
    a, b = random_int8(20, 60)[::2, ::3], random_int8(20, 14).t()[:, ::1]
    assert torch.equal(int_matmul(a, b).long(), a.long() @ b.long().t())


@pytest.mark.parametrize("k", [1, 2, 512])
def test_the_stride_of_a_dimension_of_size_one_does_not_matter(k):
    a, b = random_int8(1, k), random_int8(7, k, seed=1)
    for stride in (0, 1, 3):
        assert torch.equal(int_matmul(a.as_strided((1, k), (stride, 1)), b).long(), a.long() @ b.long().t())
        assert torch.equal(int_matmul(b, a.as_strided((1, k), (stride, 1))).long(), b.long() @ a.long().t())


def test_an_inexact_platform_product_is_not_used(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32))
    integer_matmul._cpu_int_mm_is_exact.cache_clear()
    try:
        a, b = random_int8(9, 33), random_int8(5, 33)
        assert torch.equal(int_matmul(a, b).long(), a.long() @ b.long().t())
    finally:
        integer_matmul._cpu_int_mm_is_exact.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 8), (17, 100, 30), (2, 7, 3), (300, 320, 640), (0, 8, 8)])
def test_cuda_equals_cpu(m, k, n):
    a, b = random_int8(m, k), random_int8(n, k, seed=1)
    assert torch.equal(int_matmul(a.cuda(), b.cuda()).cpu(), int_matmul(a, b))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int8)),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 4, dtype=torch.int8)),
        (torch.zeros(3, dtype=torch.int8), torch.zeros(2, 3, dtype=torch.int8)),
    ],
    ids=["float", "sizes", "vector"],
)
def test_wrong_operands(a, b):
    with pytest.raises(ValueError, match=r"int8 \[M, K\]"):
        int_matmul(a, b)
