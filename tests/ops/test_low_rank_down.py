import pytest
import torch

from qdiff.ops import low_rank_down


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)], ids=str)
@pytest.mark.parametrize("smoothed", [False, True])
def test_projects_the_smoothed_input(dtype, shape, smoothed):
    x, down = torch.randn(shape).to(dtype), torch.randn(4, 7).half()
    smooth = torch.rand(7) + 0.5 if smoothed else None
    result = low_rank_down(x, smooth, down)
    v = x.double() * (1.0 if smooth is None else smooth.double())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), v @ down.double().t(), rtol=1e-5, atol=1e-5)  # float32 sums of 7 terms


def test_opcheck():
    for smooth in (None, torch.rand(8)):
        torch.library.opcheck(low_rank_down, (torch.randn(2, 3, 8), smooth, torch.randn(4, 8).half()))


@pytest.mark.parametrize(
    ("x", "smooth", "down", "named"),
    [
        (torch.zeros(2, 8, dtype=torch.int8), None, torch.zeros(4, 8), "x"),
        (torch.zeros(2, 8), None, torch.zeros(4, 7), "down"),
        (torch.zeros(2, 8), torch.ones(7), torch.zeros(4, 8), "smooth"),
    ],
)
def test_wrong_arguments(x, smooth, down, named):
    with pytest.raises(ValueError, match=f"^{named}: got"):
        low_rank_down(x, smooth, down)
