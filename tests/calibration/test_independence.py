"""What is collected of a layer does not depend on what else is: recipes can share one calibration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff.calibration import LayerStatistics, collect

EVERYTHING = ("samples", "histograms", "hessian")


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, sample, timestep):
        return self.second(self.first(sample))


def collected(names, needs) -> dict[str, LayerStatistics]:
    """Of 1,600 positions a call: more than samples, histograms or moments keep, so that all of them draw."""
    torch.manual_seed(0)
    denoiser, generator = Denoiser(), torch.Generator().manual_seed(1)

    def run():
        for timestep in (900.0, 500.0, 100.0):
            denoiser(torch.randn(4, 3, 20, 20, generator=generator), torch.tensor(timestep))

    with torch.no_grad():
        layers = {name: getattr(denoiser, name) for name in names}
        return dict(collect(run, denoiser, layers, needs, progress=False, seed=3).layers)


@pytest.mark.parametrize("need", EVERYTHING)
def test_a_need_alone_is_what_it_is_among_all(need):
    alone, among = collected(["second"], [need])["second"], collected(["first", "second"], EVERYTHING)["second"]
    parts = {
        "samples": lambda layer: (layer.samples.values, layer.samples.timesteps),
        "histograms": lambda layer: (layer.histograms.counts, torch.tensor(layer.histograms.scale.low)),
        "hessian": lambda layer: (layer.moments.gram, layer.moments.mean, layer.moments.weight),
    }
    for found, expected in zip(parts[need](among), parts[need](alone), strict=True):
        assert torch.equal(found, expected)
