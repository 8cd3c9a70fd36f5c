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
    v = (x if smooth is None else x.float() * smooth).to(dtype).double()
    assert result.dtype == dtype
    # float32 sums of 7 terms, then one rounding.
    expected = v @ down.to(dtype).double().t()
    torch.testing.assert_close(result.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_a_tensor_of_many_blocks_equals_its_rows():
    x, smooth, down = torch.randn(5000, 256), torch.rand(256), torch.randn(4, 256)
    low = low_rank_down(x, smooth, down)
    for row in (0, 1023, 1024, 4999):
        torch.testing.assert_close(low_rank_down(x[row], smooth, down), low[row], rtol=1e-5, atol=1e-5)


def test_opcheck():
    for smooth in (None, torch.rand(8)):
        torch.library.opcheck(
            torch.ops.qdiff.low_rank_down.default, (torch.randn(2, 3, 8), smooth, torch.randn(4, 8).half())
        )


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
