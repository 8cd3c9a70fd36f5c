from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff.calibration.accumulator import InputView, Memory, observe, spread


@pytest.mark.parametrize(("rows", "count"), [(10, 3), (10, 10), (3, 10), (1000, 7), (1, 1)])
def test_spread_gives_distinct_rows_in_range(rows, count):
    chosen = spread(rows, count, torch.Generator().manual_seed(0))
    assert len(chosen.unique()) == len(chosen) == min(rows, count)
    assert chosen.min() >= 0
    assert chosen.max() < rows


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(5, 7, 3, padding=1),
        nn.Conv2d(5, 7, 3, stride=2, padding=1),
        nn.Conv2d(5, 7, (1, 3), padding=(0, 2), stride=(2, 1)),
        nn.Conv2d(5, 7, 1),
        nn.Conv2d(5, 7, 3, stride=2),
        nn.Conv2d(5, 7, 3, padding="same"),
    ],
    ids=["3x3", "stride", "oblong", "1x1", "unpadded", "same"],
)
def test_patches_are_what_the_convolution_multiplies(conv):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, 7)
    out = conv(x)
    positions = out[:, 0].numel()
    patches = InputView(conv, x).patches(positions, torch.Generator()).float()  # all positions, in order
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    product = patches.flatten(1) @ weight.T + conv.bias
    # float16 samples: 11 bits of |x| < 4 in a sum of at most 45 products.
    torch.testing.assert_close(product, out.permute(0, 2, 3, 1).reshape(positions, -1), rtol=0, atol=1e-2)


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 1, 5, 6)])
def test_linear_inputs_of_any_rank(shape):
    x = torch.randn(*shape)
    view = InputView(nn.Linear(6, 2), x)
    assert torch.equal(view.channel_absmax(), x.abs().flatten(0, -2).amax(0))
    rows = view.patches(100, torch.Generator())
    torch.testing.assert_close(rows[:, 0].float(), x.reshape(-1, 6), rtol=1e-3, atol=1e-6)


def test_convolution_rows_are_whole_pixels():
    x = torch.randn(2, 3, 4, 5)
    rows = InputView(nn.Conv2d(3, 1, 1), x).rows(1000, torch.Generator())
    assert torch.equal(rows, x.permute(0, 2, 3, 1).reshape(-1, 3))


def test_values_beyond_half_precision_are_clamped():
    view = InputView(nn.Linear(1, 1), torch.tensor([[1e6]]))
    rows = observe(nn.Linear(1, 1), view.x, None, 1, torch.Generator(), torch.Generator()).rows
    assert rows.item() == 65504.0
    assert view.channel_absmax().item() == 1e6


def test_trim_keeps_the_rows_of_highest_priority():
    memory = Memory(torch.zeros(1), None, torch.arange(4.0).half().view(4, 1, 1), torch.tensor([0.1, 0.9, 0.3, 0.8]))
    memory.trim(2)
    assert memory.rows.flatten().tolist() == [1.0, 3.0]
    memory.trim(5)
    assert len(memory.rows) == 2
