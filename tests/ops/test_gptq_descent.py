import pytest
import torch

from qdiff.ops import gptq_descent

B, N = 7, 5


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(B, N, generator=generator, dtype=dtype)
    steps = 0.2 + torch.rand(B, N, generator=generator, dtype=dtype)
    mixing = torch.randn(B, B, generator=generator, dtype=dtype)
    hessian = mixing @ mixing.T
    codes = (weight / steps).round().clamp(-3, 2)
    errors = weight - codes * steps
    return codes, errors, hessian @ errors, steps, hessian


def loss(error, hessian):
    return float(error @ hessian @ error)


def test_each_code_in_turn_is_the_best_of_all():
    """By trying every code, in rows of their own."""
    codes, errors, gradient, steps, hessian = problem()
    better, new_errors = gptq_descent(codes, errors, gradient, steps, hessian, -3, 2)
    assert not torch.equal(better, codes)
    for n in range(N):
        error = errors[:, n].clone()
        for j in range(B):
            weight = error[j] + codes[j, n] * steps[j, n]
            tried = []
            for code in range(-3, 3):
                error[j] = weight - code * steps[j, n]
                tried.append((loss(error, hessian), code))
            assert better[j, n] == min(tried)[1]
            error[j] = weight - better[j, n] * steps[j, n]
        torch.testing.assert_close(new_errors[:, n], error, rtol=1e-12, atol=1e-12)


def test_the_gradient_may_come_from_other_columns_too():
    codes, errors, gradient, steps, hessian = problem()
    moved = gptq_descent(codes, errors, gradient + 2.0, steps, hessian, -3, 2)[0]
    assert (moved >= gptq_descent(codes, errors, gradient, steps, hessian, -3, 2)[0])[0].all()
    assert not torch.equal(moved, gptq_descent(codes, errors, gradient, steps, hessian, -3, 2)[0])


def test_arguments_stay_as_they_are_and_may_have_any_strides():
    values = problem()
    expected = gptq_descent(*values, -3, 2)
    strided = [value.T.contiguous().T for value in values]
    kept = [value.clone() for value in strided]
    results = gptq_descent(*strided, -3, 2)
    assert all(torch.equal(a, b) for a, b in zip(strided, kept))
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(results, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_an_operator(dtype):
    values = problem(dtype)
    torch.library.opcheck(torch.ops.qdiff.gptq_descent.default, (*values, -3, 2))
    assert gptq_descent(*values, -3, 2)[0].dtype == dtype


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(B, N, dtype=torch.int8), "codes: got torch.int8"),
        (1, torch.zeros(B, N + 1), "errors: got"),
        (2, torch.zeros(B, N, dtype=torch.float64), "gradient: got torch.float64"),
        (4, torch.zeros(B - 1, B), "within: got"),
    ],
)
def test_wrong_arguments_are_named(position, value, message):
    values = list(problem(torch.float32))
    values[position] = value
    with pytest.raises(ValueError, match=message):
        gptq_descent(*values, -3, 2)
