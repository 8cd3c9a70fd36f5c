import itertools

import pytest
import torch

from qdiff.numerics.gemm_layout import to_gemm
from qdiff.numerics.input_pipeline import InputPipeline, hadamard, rotate, unrotate


def signs_of(size):
    return (torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size)) * 2 - 1).to(torch.int8)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 256])
def test_hadamards_entries_are_parities(size):
    matrix = hadamard(size, torch.device("cpu")) * size**0.5
    for i, j in itertools.product(range(0, size, 7), range(0, size, 5)):
        # Sylvester: (-1) to the number of bits that i and j share.
        assert float(matrix[i, j].round()) == (-1) ** (i & j).bit_count()
    torch.testing.assert_close(matrix @ matrix, size * torch.eye(size))


def test_sizes_that_are_no_power_of_two():
    for size in (0, 3, 12):
        with pytest.raises(ValueError, match="power of two"):
            hadamard(size, torch.device("cpu"))


def test_a_rotation_is_orthogonal_and_spreads_an_outlier():
    x, signs = torch.randn(5, 96), signs_of(32)
    torch.testing.assert_close(unrotate(rotate(x, signs), signs), x)
    torch.testing.assert_close(rotate(x, signs).norm(dim=1), x.norm(dim=1))
    one = torch.zeros(1, 32)
    one[0, 3] = 1
    torch.testing.assert_close(rotate(one, signs).abs(), torch.full((1, 32), 32**-0.5))


@pytest.mark.parametrize(
    "steps", [(), ("shift",), ("index",), ("smooth", "rotation"), ("shift", "index", "smooth", "rotation")], ids=str
)
@pytest.mark.parametrize(("segments", "kernel"), [((24,), (1, 1)), ((24,), (3, 3)), ((8, 16), (3, 3))], ids=str)
def test_rows_channels_and_folded_weights_agree(steps, segments, kernel):
    """Rows in GEMM layout are the transformed channels in GEMM layout; a folded weight does on them what it should."""
    if "index" in steps and len(segments) > 1:
        pytest.skip("an index is of a single segment")
    torch.manual_seed(0)
    index = torch.arange(24).repeat_interleave(torch.tensor([2] * 8 + [1] * 16)) if "index" in steps else None
    width = 24 if index is None else 32
    pipeline = InputPipeline(
        torch.randn(24) if "shift" in steps else None,
        index,
        torch.rand(width) + 0.5 if "smooth" in steps else None,
        signs_of(8) if "rotation" in steps else None,
    )
    taps = kernel[0] * kernel[1]
    patches = torch.randn(5, 24, *kernel)
    there = pipeline.segments(segments)
    expected = to_gemm(pipeline.channels(patches.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), there)
    rows = to_gemm(patches, segments)
    torch.testing.assert_close(pipeline.rows(rows, segments, taps), expected)

    weight = torch.randn(7, width * taps)
    folded = pipeline.fold(weight, segments, taps)
    linear = pipeline.rows(rows, segments, taps, shifted=False)
    torch.testing.assert_close(rows @ folded.T, linear @ weight.T, rtol=1e-4, atol=1e-4)
