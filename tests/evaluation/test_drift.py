import copy

import pytest
import torch
from torch import nn

from qdiff.evaluation.drift import layer_errors, measure_drift
from qdiff.evaluation.generation import Generation
from qdiff.evaluation.prompts import items_of
from qdiff.evaluation.trajectory import Trajectory, record_denoiser

GENERATION = Generation(steps=3, guidance_scale=3.0)


class Denoiser(nn.Module):
    """Two layers, the second called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x, timestep):
        return (self.second(self.second(self.first(x))),)


@pytest.mark.parametrize("which", ["sd", "dit"])
def test_a_pipeline_does_not_drift_from_itself(tiny_sd, tiny_dit, which):
    pipe, prompts = (tiny_sd(), ["red cat", "house"]) if which == "sd" else (tiny_dit(), [3, 5])
    drift = measure_drift(pipe, copy.deepcopy(pipe), items_of(prompts), GENERATION)
    assert drift.latents.shape == (3, 2)
    assert not drift.latents.any()
    assert not drift.layers.values.any()
    assert drift.layers.denoiser == 0
    assert list(drift.timesteps) == sorted(drift.timesteps, reverse=True)
    assert len(drift.timesteps) == drift.layers.values.shape[1] == 3
    assert "conv_in" in drift.layers.layers or "proj_out_1" in drift.layers.layers


def test_only_layers_behind_the_changed_one_err(tiny_sd):
    pipe, other = tiny_sd(), tiny_sd()
    with torch.no_grad():
        other.unet.mid_block.resnets[0].conv1.weight.mul_(1.5)
    drift = measure_drift(pipe, other, items_of(["red cat"]), GENERATION)
    errors = dict(zip(drift.layers.layers, drift.layers.values))
    assert not errors["conv_in"].any()
    assert not errors["down_blocks.1.resnets.0.conv2"].any()
    assert (errors["mid_block.resnets.0.conv1"] > 0).all()
    assert (errors["conv_out"] > 0).all()
    assert drift.latents[-1].item() > 0


def test_errors_are_those_of_float64_on_the_references_inputs():
    torch.manual_seed(0)
    reference = Denoiser()
    candidate = copy.deepcopy(reference)
    with torch.no_grad():
        candidate.first.weight.add_(0.1 * torch.randn(4, 4))
    inputs = [torch.randn(2, 4) for _ in range(3)]
    with torch.no_grad(), record_denoiser(reference) as trajectory:
        for x in inputs:
            reference(x, timestep=torch.tensor(1.0))
    found = layer_errors(trajectory, reference, candidate)
    assert found.layers == ("first", "second")

    def outputs(denoiser, x):
        first = x.double() @ denoiser.first.weight.double().T
        second = first @ denoiser.second.weight.double().T
        third = second @ denoiser.second.weight.double().T
        return {"first": first, "second": torch.cat([second, third]), "all": third}

    pairs = [(outputs(reference, x), outputs(candidate, x)) for x in inputs]
    for row, name in enumerate(found.layers):
        expected = [((b[name] - a[name]).norm() / a[name].norm()).item() for a, b in pairs]
        assert found.values[row].tolist() == pytest.approx(expected, rel=1e-4)
    squares = [((b["all"] - a["all"]).square().sum().item(), a["all"].square().sum().item()) for a, b in pairs]
    whole = (sum(e for e, _ in squares) / sum(n for _, n in squares)) ** 0.5
    assert found.denoiser == pytest.approx(whole, rel=1e-4)


def test_pipelines_that_do_not_fit_are_told(tiny_sd, tiny_dit):
    with pytest.raises(ValueError, match="must share"):
        layer_errors(Trajectory(), Denoiser(), Denoiser())
    with pytest.raises(ValueError, match="takes class labels"):
        measure_drift(tiny_sd(), tiny_dit(), items_of(["red cat"]), GENERATION)
