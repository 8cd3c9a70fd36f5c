import dataclasses
import json
import math

import pytest
import torch
from board import measure, peers, units
from board.measure import Bench, InDtype, learned
from board.peers import Peer, bytes_of
from board.rows import Row, all_rows
from board.units import Settings, Unit
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from qdiff import Calibration, Recipe, calibrate
from qdiff.recipe import WeightSpec

ROW = Row("presets", "w8", Recipe("w8", WeightSpec(8, -1, "channel"), activation_bits=16))
QUICK = dataclasses.replace(ROW, calibration=Calibration(["red cat"], steps=1))
SAME = Peer("untouched", "same")


@pytest.fixture
def settings(tmp_path, tiny_sd, monkeypatch):
    tiny_sd().save_pretrained(tmp_path / "emoji-sd")
    entries = [{"caption": caption} for caption in ("red apple", "green cat", "red house")]
    (tmp_path / "emoji-heldout.json").write_text(json.dumps(entries))
    monkeypatch.setitem(peers.QUANTIZERS, "same", lambda denoiser, options: denoiser)
    return Settings(tmp_path, tmp_path, count=2, steps=2, replayed=1)


def measured(settings, row, seed=0):
    bench = Bench(settings)
    assert bench.measure(Unit("emoji-sd", seed, None)).keys() == {"phases"}
    return bench.measure(Unit("emoji-sd", seed, row))


def test_an_untouched_denoiser_has_no_error_and_all_of_the_bytes(settings):
    found = measured(settings, SAME)
    assert found["ratio_to_fp16"] == 1
    assert found["denoiser_relative_error"] < 1e-5
    assert found["psnr_db"] == math.inf
    assert found["ssim"] == pytest.approx(1)


def test_a_recipe_is_measured_on_a_copy_and_gives_the_same_figures_twice(settings, monkeypatch):
    monkeypatch.setattr(units, "all_rows", lambda: [QUICK])
    bench = Bench(settings)
    bench.measure(Unit("emoji-sd", 0, None))
    first, second = (bench.measure(Unit("emoji-sd", 0, QUICK)) for _ in range(2))
    for found in (first, second):
        assert found.pop("phases").keys() == {"load", "quantize", "replay", "generate", "compare"}
    assert first == second
    assert 0.5 < first["ratio_to_fp16"] < 0.8
    assert 0 < first["denoiser_relative_error"] < 0.1
    assert bench.measure(Unit("emoji-sd", 0, SAME))["denoiser_relative_error"] < 1e-5


def test_rows_share_a_calibration_which_is_made_once_and_found_by_another_process(settings, monkeypatch):
    other = dataclasses.replace(QUICK, label="w4", recipe=ROW.recipe.replace(weight=WeightSpec(4, -1)))
    monkeypatch.setattr(units, "all_rows", lambda: [QUICK, other])
    calibrations = []
    monkeypatch.setattr(measure, "calibrate", lambda *a, **k: calibrations.append(a) or calibrate(*a, **k))
    for row in (QUICK, other):
        reference, shared = Unit("emoji-sd", 0, row).preparations
        for unit in (reference, shared, Unit("emoji-sd", 0, row)):
            assert "phases" in Bench(settings).measure(unit)
    assert len(calibrations) == 1
    assert not list(settings.work.glob("*.part"))


def test_only_learned_roundings_are_made_on_the_device():
    found = {row.label for row in all_rows() if learned(row.recipe)}
    assert {"adaround", "adaquant", "adaround rounding", "adaquant rounding"} <= found
    assert not found & {"w4a8", "gptq", "svdquant", "naive"}


def test_no_noise_is_shared_between_seeds_or_with_calibration(settings):
    pictures = [set(range(settings.run(seed).seed, settings.run(seed).seed + 64)) for seed in range(3)]
    calibrations = [set(range(100 * seed, 100 * seed + 16)) for seed in range(3)]
    everything = [*pictures, *calibrations]
    assert len(set().union(*everything)) == sum(map(len, everything))


def test_a_key_changes_with_the_recipe_the_seed_and_the_settings_but_not_with_folders(settings):
    unit = Unit("emoji-sd", 0, ROW)
    other = dataclasses.replace(ROW, recipe=ROW.recipe.replace(activation_bits=8))
    keys = [
        unit.key(settings),
        Unit("emoji-sd", 1, ROW).key(settings),
        Unit("emoji-sd", 0, other).key(settings),
        unit.key(dataclasses.replace(settings, count=3)),
        unit.key(dataclasses.replace(settings, dtype="float16")),
    ]
    assert len(set(keys)) == len(keys)
    assert unit.key(dataclasses.replace(settings, work=settings.work / "elsewhere")) == keys[0]


def test_the_bytes_of_a_tensor_subclass_are_those_of_what_it_holds(settings):
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(TwoTensor(torch.zeros(4, 4), torch.zeros(4, 4)))
    assert layer.weight.nbytes == 64  # what it says of itself
    assert peers._inner_bytes(layer.weight) == 128
    assert bytes_of(SAME, nn.Linear(4, 4)) == 2 * 20


def test_a_denoiser_of_another_dtype_takes_float32_and_returns_it():
    layer = nn.Linear(2, 2).half()

    class Denoiser(nn.Module):
        def forward(self, sample, timestep):
            assert timestep.dtype == torch.int64
            return (layer(sample),)

    found = InDtype(Denoiser(), torch.float16)(torch.ones(1, 2), timestep=torch.tensor(3))
    assert found.dtype == torch.float32
