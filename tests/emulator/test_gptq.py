"""The kernels of GPTQ's columns and their launcher, run on the CPU, against the operators' references."""

from __future__ import annotations

import pytest
import torch

from qdiff.ops import _cupy, _gptq_cuda, gptq_descent, gptq_feedback

# The references' updates round once where torch's vectors do, which they do in whole vectors of rows.
VECTOR = 16

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch has no fused multiply-add on this CPU"
)


@pytest.fixture(autouse=True)
def device(monkeypatch, emulated_kernel):
    """A GPU of two multiprocessors, emulated."""

    monkeypatch.setattr(_cupy, "kernel", emulated_kernel)
    monkeypatch.setattr(_cupy, "multiprocessors", lambda device: 2)


def problem(columns, rows, seed=0):
    """Weights, steps, and a matrix H with its triangular factor scaled to a diagonal of ones; rows in whole vectors."""
    generator = torch.Generator().manual_seed(seed)
    rows = -(-rows // VECTOR) * VECTOR
    weight = torch.randn(columns, rows, generator=generator)
    steps = 0.2 + torch.rand(columns, rows, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator)
    hessian = mixing @ mixing.T / columns + 0.1 * torch.eye(columns)
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    return weight, steps, hessian, factor / factor.diagonal()


def both(kernel, reference, values, within, rows, guarded, low, high):
    expected = [part[:, :rows] for part in reference(*values, within, low, high)]
    arrays = [guarded(value[:, :rows].contiguous()) for value in values]
    before = [value.clone() for value in arrays]
    results = kernel(*arrays, guarded(within), low, high)
    for result, wanted in zip(results, expected):
        assert torch.equal(result, wanted)
    assert all(torch.equal(value, kept) for value, kept in zip(arrays, before))
    return results


# Codes so fine that they show the last bits of what is rounded.
FINEST = 2**23

# (columns, rows): a whole block; ragged ones, in both directions; one column; more rows than a block of few threads.
SHAPES = [(128, 16), (128, 21), (72, 5), (37, 18), (1, 3), (12, 150)]


@pytest.mark.parametrize("high", [7, 127, FINEST])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_feedback(shape, high, guarded):
    (columns, rows), low = shape, -high - 1
    weight, steps, _, within = problem(*shape)
    steps = steps * 8 / high
    generator = torch.Generator().manual_seed(1)
    target = weight + 0.1 * torch.randn(weight.shape, generator=generator)
    target[0, 0] = 2.5 * steps[0, 0]  # a tie
    codes, _ = both(_gptq_cuda.feedback, gptq_feedback, (target, weight, steps), within, rows, guarded, low, high)
    assert codes.min() >= low
    assert codes.max() <= high
    assert codes.unique().numel() > min(columns * rows, 8) / 2


@pytest.mark.parametrize("high", [7, 127, FINEST])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_descent(shape, high, guarded):
    weight, steps, hessian, _ = problem(*shape)
    low, steps = -high - 1, steps * 8 / high
    codes = (weight / steps).round().clamp(low, high)
    errors = weight - codes * steps
    # With errors of columns that are not in the block.
    gradient = hessian @ errors + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    values = (codes, errors, gradient, steps)
    better, _ = both(_gptq_cuda.descent, gptq_descent, values, hessian, shape[1], guarded, low, high)
    assert shape[0] * shape[1] < 8 or not torch.equal(better, codes[:, : shape[1]])


@pytest.mark.parametrize("shape", [(24, 16), (23, 16)], ids=str)
def test_a_matrix_within_a_larger_one(shape, guarded):
    """Of any strides and address, as blocks of the whole matrix are."""
    weight, steps, hessian, _ = problem(*shape)
    columns = len(hessian)
    wanted = gptq_feedback(weight, weight, steps, hessian, -8, 7)[0]
    for start in (4, 5):
        place = slice(start, start + columns)
        for matrix in (torch.empty(100, 100), torch.empty(100, 100).T, torch.empty(100, 97)):
            matrix.fill_(float("nan"))[place, place] = hessian
            assert torch.equal(_gptq_cuda.feedback(weight, weight, steps, matrix[place, place], -8, 7)[0], wanted)


def test_what_the_kernels_refuse():
    assert _gptq_cuda.refusal(torch.zeros(128, 3)) is None
    assert "129 columns" in _gptq_cuda.refusal(torch.zeros(129, 3))
    assert "float64" in _gptq_cuda.refusal(torch.zeros(2, 3, dtype=torch.float64))
