import pytest
import torch

from qdiff.ops import transform_input


def arguments(channels=24, width=32):
    torch.manual_seed(0)
    index = torch.arange(channels).repeat_interleave(
        torch.tensor([2] * (width - channels) + [1] * (2 * channels - width))
    )
    signs = (torch.randint(0, 2, (8,)) * 2 - 1).to(torch.int8)
    return torch.randn(channels), index, torch.rand(width) + 0.5, signs


def expected(x, shift, index, smooth, rotation):
    """In float64, one block after the other, with scipy's construction of the matrix written out."""
    x = x.double()
    x = x if shift is None else x - shift.double()
    x = x if index is None else x[..., index]
    x = x if smooth is None else x * smooth.double()
    if rotation is None:
        return x
    b = len(rotation)
    h = (
        torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(b)] for i in range(b)], dtype=torch.float64)
        / b**0.5
    )
    q = torch.diag(rotation.double()) @ h
    return torch.cat([part @ q for part in x.split(b, -1)], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24), (3000, 24)], ids=str)
@pytest.mark.parametrize("given", [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 1), (0, 0, 0, 0)], ids=str)
def test_rows(dtype, shape, given):
    values = arguments(width=32 if given[1] else 24)
    chosen = [value if there else None for value, there in zip(values, given)]
    x = torch.randn(shape).to(dtype)
    result = transform_input(x, *chosen, -1)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    torch.testing.assert_close(result.double(), expected(x, *chosen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_images(order):
    x = torch.randn(2, 24, 5, 3).to(memory_format=order)
    result = transform_input(x, *arguments(), 1)
    assert result.shape == (2, 32, 5, 3)
    assert result.is_contiguous(memory_format=torch.channels_last)
    wanted = expected(x.permute(0, 2, 3, 1), *arguments()).permute(0, 3, 1, 2)
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)


def test_opcheck():
    torch.library.opcheck(torch.ops.qdiff.transform_input.default, (torch.randn(2, 3, 24), *arguments(), -1))
    torch.library.opcheck(torch.ops.qdiff.transform_input.default, (torch.randn(2, 24, 3, 3), *arguments(), 1))
    torch.library.opcheck(torch.ops.qdiff.transform_input.default, (torch.randn(2, 24), None, None, None, None, -1))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(2, 24, dtype=torch.int8)}, "x"),
        ({"shift": torch.zeros(23)}, "shift"),
        ({"index": torch.zeros(32, dtype=torch.int32)}, "index"),
        ({"smooth": torch.ones(24)}, "smooth"),
        ({"rotation": torch.ones(6, dtype=torch.int8)}, "rotation"),
        ({"rotation": torch.ones(64, dtype=torch.int8)}, "rotation"),
        ({"channel_dim": 1}, "channel_dim"),
    ],
)
def test_wrong_arguments(change, named):
    given = dict(
        zip(("x", "shift", "index", "smooth", "rotation", "channel_dim"), (torch.zeros(2, 24), *arguments(), -1))
    )
    with pytest.raises(ValueError, match=f"^{named}: got"):
        transform_input(*(given | change).values())
