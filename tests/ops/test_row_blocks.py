import pytest
import torch

from qdiff.ops.row_blocks import row_blocks


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 1000])
@pytest.mark.parametrize("row_bytes", [0, 1, 1 << 14, 1 << 30])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_cover_every_row_once_in_order(rows, row_bytes, device):
    blocks = row_blocks(rows, row_bytes, torch.device(device))
    assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))


def test_a_block_stays_within_the_cache_and_above_the_least():
    assert [block.stop - block.start for block in row_blocks(256, 1 << 14, torch.device("cpu"))] == [64] * 4
    assert next(iter(row_blocks(256, 1 << 30, torch.device("cpu")))) == slice(0, 16)
    assert next(iter(row_blocks(256, 1 << 30, torch.device("cpu"), at_least=1))) == slice(0, 1)


def test_an_accelerator_gets_all_rows_at_once():
    assert list(row_blocks(10**6, 1 << 20, torch.device("cuda"))) == [slice(0, 10**6)]
