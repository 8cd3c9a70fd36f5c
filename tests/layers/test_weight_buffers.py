import copy

import torch
from torch import nn

from qdiff.denoising import StepTracker
from qdiff.layers import QuantLinear, stored_bytes


class Denoiser(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, sample, timestep):
        return self.layer(sample)


def test_stored_bytes_counts_each_tensor_once():
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    module[1].bias = module[0].weight  # shared
    assert stored_bytes(module) == 4 * (3 * 5 + 5 + 5 * 3)
    module.register_buffer("extra", torch.zeros(7, dtype=torch.uint8))
    assert stored_bytes(module) == 4 * (3 * 5 + 5 + 5 * 3) + 7


def test_a_deep_copy_of_a_denoiser_keeps_layers_and_tracker_together(make_plan, quantize):
    linear, plan = nn.Linear(16, 8), make_plan("linear", (16,), 8, "temporal")
    table = torch.tensor([[6 / 127], [1e3]])
    layer = QuantLinear.from_float(linear, plan, quantize(linear.weight, plan, act_scales=table))
    layer.tracker = StepTracker((1, 999))
    original = Denoiser(layer)
    layer.tracker.attach(original)
    x = torch.randn(2, 16)
    fine, coarse = original(x, 1), original(x, 999)
    assert not torch.equal(fine, coarse)
    duplicate = copy.deepcopy(original)
    assert torch.equal(duplicate(x, 1), fine)
    assert torch.equal(original.layer(x), coarse)  # still at its own last timestep
