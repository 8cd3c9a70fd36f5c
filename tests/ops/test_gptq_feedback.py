import pytest
import torch

from qdiff.ops import gptq_feedback

B, N = 9, 5


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(B, N, generator=generator, dtype=dtype)
    target = weight + 0.1 * torch.randn(B, N, generator=generator, dtype=dtype)
    steps = 0.2 + torch.rand(B, N, generator=generator, dtype=dtype)
    within = torch.randn(B, B, generator=generator, dtype=dtype) / 2
    return target, weight, steps, within


def test_each_column_gets_the_errors_of_those_before():
    target, weight, steps, within = problem()
    codes, errors = gptq_feedback(target, weight, steps, within, -2, 1)
    for n in range(N):
        so_far = []
        for j in range(B):
            wanted = float(target[j, n]) + sum(float(within[i, j]) * e for i, e in enumerate(so_far))
            code = min(max(round(wanted / float(steps[j, n])), -2), 1)  # Python rounds half to even too
            so_far.append(float(weight[j, n]) - code * float(steps[j, n]))
            assert codes[j, n] == code
            assert errors[j, n].item() == pytest.approx(so_far[-1], rel=1e-12)
    assert codes.unique().tolist() == [-2, -1, 0, 1]


def test_arguments_stay_as_they_are_and_may_have_any_strides():
    values = problem()
    expected = gptq_feedback(*values, -8, 7)
    strided = [value.T.contiguous().T for value in values]
    kept = [value.clone() for value in strided]
    results = gptq_feedback(*strided, -8, 7)
    assert all(torch.equal(a, b) for a, b in zip(strided, kept))
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(results, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_an_operator(dtype):
    values = problem(dtype)
    torch.library.opcheck(torch.ops.qdiff.gptq_feedback.default, (*values, -8, 7))
    assert gptq_feedback(*values, -8, 7)[0].dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(B, N, dtype=torch.float16)}, "target: got torch.float16"),
        ({0: torch.zeros(B)}, "target: got"),
        ({1: torch.zeros(B, N + 1)}, "weight: got"),
        ({2: torch.zeros(B, N, dtype=torch.float64)}, "steps: got torch.float64"),
        ({3: torch.zeros(B, B + 1)}, r"within: got .* expected torch.float32 \[9, 9\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    values = list(problem(torch.float32))
    for position, value in change.items():
        values[position] = value
    with pytest.raises(ValueError, match=message):
        gptq_feedback(*values, -8, 7)
