import pytest
import torch

from qdiff.ops.checks import check_divides, check_tensor

CPU, META = torch.device("cpu"), torch.device("meta")


def test_what_fits_passes():
    check_tensor("x", torch.zeros(2, 3), [torch.float32, torch.float16], [None, 3], CPU)


@pytest.mark.parametrize(
    ("dtypes", "shape", "device"),
    [
        ([torch.float16], [2, 3], CPU),
        ([torch.float32], [2, 4], CPU),
        ([torch.float32], [2], CPU),
        ([torch.float32], [2, 3], META),
    ],
    ids=["dtype", "size", "dimensions", "device"],
)
def test_a_message_says_what_came_and_what_is_expected(dtypes, shape, device):
    with pytest.raises(ValueError, match=r"^x: got torch.float32 \(2, 3\) on cpu, expected .* on (cpu|meta)$"):
        check_tensor("x", torch.zeros(2, 3), dtypes, shape, device)


@pytest.mark.parametrize(("part", "rows"), [(1, 5), (5, 5), (2, 4), (1, 0), (0, 0)])
def test_rows_that_can_be_shared(part, rows):
    check_divides("scale", part, rows)


@pytest.mark.parametrize(("part", "rows"), [(2, 5), (0, 5), (6, 5)])
def test_rows_that_cannot(part, rows):
    with pytest.raises(ValueError, match="scale"):
        check_divides("scale", part, rows)
