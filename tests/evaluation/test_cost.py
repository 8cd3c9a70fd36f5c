import torch
from torch import nn

from qdiff.evaluation import half_precision_bytes, stored_bytes


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 4)
        self.second = nn.Linear(8, 4)
        self.second.weight = self.first.weight
        self.register_buffer("codes", torch.zeros(10, dtype=torch.uint8))


def test_every_tensor_is_counted_once():
    assert stored_bytes(Shared()) == 4 * (8 * 4 + 4 + 4) + 10


def test_half_precision_counts_integers_at_their_own_width():
    module = Shared()
    assert half_precision_bytes(module) == 2 * (8 * 4 + 4 + 4) + 10
    assert module.first.weight.dtype == torch.float32
