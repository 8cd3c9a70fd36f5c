from __future__ import annotations

import torch
from torch import nn

from qdiff.plugin.blocks import blocks_of, output_costs
from qdiff.plugin.calls import Call, some_samples


def test_blocks_are_resnets_and_transformer_blocks():
    resnet = [f"up_blocks.1.resnets.0.{name}" for name in ("conv1", "time_emb_proj", "conv2")]
    inner = [f"up_blocks.1.attentions.0.transformer_blocks.0.{name}" for name in ("attn1.to_q", "attn1.to_out.0")]
    alone = ["up_blocks.1.attentions.0.proj_in", "up_blocks.1.attentions.0.proj_out", "up_blocks.1.upsamplers.0.conv"]
    found = blocks_of([*resnet, *inner, *alone, "time_embedding.linear_1", "time_embedding.linear_2"])
    assert found == dict.fromkeys(resnet, "up_blocks.1.resnets.0") | dict.fromkeys(
        inner, "up_blocks.1.attentions.0.transformer_blocks.0"
    )


class Denoiser(nn.Module):
    """out = A z + B z^2 of the block's output z, by channel, and as many channels again that are no noise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)])
        self.last = nn.Conv2d(6, 8, 1)
        self.requires_grad_(False)

    def forward(self, sample, timestep):
        self.blocks[1](sample)  # nothing depends on it
        return (self.last(self.blocks[0](sample) ** 2),)


def test_costs_are_the_diagonal_of_the_squared_jacobian():
    denoiser = Denoiser()
    sample = torch.randn(2, 4, 8, 8)
    calls = [Call((sample, torch.tensor(1.0)), {})] * 64
    costs = output_costs(denoiser, ["blocks.0", "blocks.1"], calls, seed=0)
    mean = torch.stack([of_call[0] for of_call in costs["blocks.0"]]).mean(0)
    z = denoiser.blocks[0](sample)
    jacobian = denoiser.last.weight[:4, :, 0, 0].square().sum(0)[:, None, None] * (2 * z).square()
    torch.testing.assert_close(mean, jacobian.mean((0, 2, 3)), rtol=0.05, atol=0)
    assert not any(of_call[0].any() for of_call in costs["blocks.1"])
    assert not sample.requires_grad
    assert not denoiser.blocks[0]._forward_hooks


def test_some_samples_of_a_call():
    latent = torch.arange(8.0)[:, None].expand(8, 3)
    call = Call((latent,), {"timestep": torch.tensor(5), "added": {"ids": torch.arange(8)}, "table": torch.zeros(5)})
    some = some_samples(Denoiser2(), call, 2, turn=1)
    assert some.args[0][:, 0].tolist() == [1, 5]
    assert some.kwargs["added"]["ids"].tolist() == [1, 5]
    assert some.kwargs["timestep"] == 5
    assert len(some.kwargs["table"]) == 5
    assert some_samples(Denoiser2(), call, 9, turn=1) is call


class Denoiser2(nn.Module):
    def forward(self, sample, timestep, added, table):
        return sample
