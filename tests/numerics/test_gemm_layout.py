import pytest
import torch
import torch.nn.functional as F

from qdiff.numerics.gemm_layout import channels_to_gemm, from_gemm, to_gemm, widen_segments


@pytest.mark.parametrize("segments", [(6,), (2, 4), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)], ids=str)
def test_from_gemm_undoes_to_gemm(segments, kernel):
    weight = torch.randn(4, 6, *kernel)
    assert torch.equal(from_gemm(to_gemm(weight, segments), segments, kernel), weight)


def test_the_order_of_k_is_segment_tap_channel():
    weight = torch.arange(2 * 3 * 3).view(1, 2, 3, 3)
    assert to_gemm(weight, (2,))[0].tolist() == [9 * c + tap for tap in range(9) for c in range(2)]
    assert to_gemm(weight, (1, 1))[0].tolist() == list(range(18))


def test_a_linear_weight_is_its_own_matrix():
    weight = torch.randn(3, 5)
    assert torch.equal(to_gemm(weight, (5,)), weight)


def test_the_matrix_multiplies_patches_in_the_documented_order():
    x, weight, segments = (
        torch.randn(1, 5, 6, 7, dtype=torch.double),
        torch.randn(3, 5, 3, 2, dtype=torch.double),
        (2, 3),
    )
    patches = torch.cat(
        [
            torch.stack(
                [part[0, :, i : i + 3, j : j + 2].permute(1, 2, 0).flatten() for i in range(4) for j in range(6)]
            )
            for part in x.split(list(segments), 1)
        ],
        1,
    )
    result = (patches @ to_gemm(weight, segments).t()).t().view(1, 3, 4, 6)
    torch.testing.assert_close(result, F.conv2d(x, weight))


def test_channel_values_follow_their_channels():
    """Scaling channels commutes with the change of layout."""
    weight, values, segments = torch.randn(4, 5, 3, 3), torch.randn(5), (2, 3)
    scaled = to_gemm(weight * values[:, None, None], segments)
    assert torch.equal(scaled, to_gemm(weight, segments) * channels_to_gemm(values, segments, 9))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3)], ids=str)
def test_widened_segments_convolve_to_the_same(kernel):
    x, weight = torch.randint(-9, 9, (2, 6, 7, 12)).double(), torch.randint(-9, 9, (3, 12, *kernel)).double()
    segments, widths = (1, 4, 7), (4, 4, 8)
    image = widen_segments(x, segments, widths)
    matrix = widen_segments(to_gemm(weight, segments), segments, widths, kernel[0] * kernel[1])
    wide = from_gemm(matrix, widths, kernel)
    for values in (image.movedim(3, 1), wide):
        assert values.shape[1] == 16
        assert not values[:, [1, 2, 3, 15]].any()
    assert torch.equal(F.conv2d(image.movedim(3, 1), wide), F.conv2d(x.movedim(3, 1), weight))


def test_segments_must_sum_to_the_channels():
    with pytest.raises(ValueError, match="segments"):
        to_gemm(torch.randn(4, 6, 3, 3), (2, 3))
