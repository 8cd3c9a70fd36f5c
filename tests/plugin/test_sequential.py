from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qdiff import Calibration, Recipe, load, save
from qdiff.plugin import sequential
from qdiff.plugin.calls import CALLS, Call, CallRecorder
from qdiff.recipe import MethodSpec

ADAQUANT = Recipe.preset("w4a8").replace(
    name="adaquant", transforms=(), rounding=MethodSpec.of("adaquant", iterations=2), overrides=()
)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
        self.last = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = sample + self.time(timestep.reshape(1, 1))
        for block in reversed(self.blocks):  # not in the order of definition
            hidden = hidden + block(hidden)
        return self.last(hidden)


@pytest.mark.parametrize("count", [1, 10, 20, 40, 100])
def test_recorded_calls_are_spread_evenly(count):
    chain = Chain()
    with CallRecorder(chain) as recorder:
        for step in range(count):
            chain(torch.full((1, 4), float(step)), timestep=torch.tensor([float(step)]))
    steps = [call.args[0][0, 0].item() for call in recorder.calls]
    assert steps == sorted(steps)
    assert len(steps) == min(count, CALLS)
    if count > CALLS:
        gaps = torch.tensor([-1.0, *steps, float(count)]).diff()
        assert gaps.max() <= 2.7 * count / CALLS
    assert not chain._forward_pre_hooks


def test_recorded_arguments_are_copies():
    chain, x = Chain(), torch.ones(1, 4)
    with CallRecorder(chain) as recorder:
        chain(x, timestep=torch.tensor([1.0]))
        x.zero_()
    assert recorder.calls[0].args[0].sum() == 4
    assert recorder.calls[0].kwargs["timestep"].item() == 1


def test_stages_are_blocks_in_the_order_they_run():
    chain = Chain()
    names = [name for name, module in chain.named_modules() if isinstance(module, nn.Linear)]
    runs = sequential._runs(chain, names, Call((torch.ones(1, 4), torch.tensor([1.0])), {}))
    stages = [["time"], ["blocks.1.0", "blocks.1.1"], ["blocks.0.0", "blocks.0.1"], ["last"]]
    assert sequential._stages([*runs, "time"]) == stages  # a layer may run again


def test_rows_arrive_through_quantized_layers_and_round_trip(tiny, quantize, generate, monkeypatch, tmp_path):
    """Carried rows are those of the samples, exact before the first quantized layer, and a little off after it."""
    pipe = tiny()
    exact_images = generate(pipe)
    seen = []
    inner = sequential._with_carried

    def spy(*arguments):
        seen.append(inner(*arguments))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(sequential, "_with_carried", spy)
        pipe = quantize(pipe, recipe=ADAQUANT)
    errors = []
    for statistics in seen:
        exact, carried = statistics.samples, statistics.carried
        assert torch.equal(exact.timesteps, carried.timesteps)
        assert exact.values.shape == carried.values.shape
        difference = (exact.values.float() - carried.values.float()).norm()
        errors.append(float(difference / exact.values.float().norm()))
    assert errors[0] == 0  # nothing is quantized before the first stage
    assert max(errors) < 0.7
    assert (
        sum(error > 1e-3 for error in errors) > len(errors) / 4
    )  # a tiny DiT has two blocks, and only one sees another
    images = generate(pipe)
    assert torch.isfinite(images).all()
    assert not torch.equal(images, exact_images)
    assert torch.equal(images, generate(quantize(tiny(), recipe=ADAQUANT)))  # the same bytes every time
    save(pipe, tmp_path / "saved")
    assert torch.equal(images, generate(load(tmp_path / "saved")))


@pytest.mark.parametrize("sampling", ["uniform", "normal"])
def test_rows_of_steps_that_are_not_sampled_count_for_the_nearest_that_is(tiny_dit, quantize, monkeypatch, sampling):
    pipe, seen = tiny_dit(), []
    inner = sequential._with_carried

    def spy(statistics, exact, arriving):
        seen.append((exact, inner(statistics, exact, arriving)))
        return seen[-1][1]

    monkeypatch.setattr(sequential, "_with_carried", spy)
    calibration = Calibration([1, 7], steps=6, sampling=sampling, sampled_steps=2)
    quantize(pipe, recipe=ADAQUANT.replace(all_timesteps=()), calibration=calibration)
    for exact, statistics in seen:
        assert len(statistics.timesteps) == 2
        assert len(exact.timesteps) == 6
        for rows, own in ((statistics.samples, exact.samples), (statistics.carried, exact.samples)):
            actual = exact.timesteps[own.timesteps]
            taken = statistics.timesteps[rows.timesteps]
            other = statistics.timesteps[1 - rows.timesteps]
            assert ((actual - taken).abs() <= (actual - other).abs()).all()
            assert rows.timesteps.unique().tolist() == [0, 1]
    assert seen


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_pipeline_is_as_it_was_on_any_error(tiny, quantize, snapshot, monkeypatch, error):
    pipe = tiny()
    before = snapshot(pipe)
    inner, calls = sequential._with_carried, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 5:  # some stages are swapped in by now
            raise error
        return inner(*arguments)

    monkeypatch.setattr(sequential, "_with_carried", fail)
    with pytest.raises(error):
        quantize(pipe, recipe=ADAQUANT)
    before.assert_unchanged()
