from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qdiff.calibration import Moments, Samples, Statistics, collect
from qdiff.calibration.accumulator import SAMPLE_ROWS, MomentSum
from qdiff.calibration.histogram import BINS


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.linear = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        growth = 1 + timestep.reshape(-1, 1, 1, 1) / 100
        hidden = self.conv(sample * growth)
        return self.linear(hidden.flatten(2).transpose(1, 2))


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return Denoiser()


def layers_of(denoiser):
    return {name: getattr(denoiser, name) for name in ("conv", "linear", "idle")}


def runs(denoiser, timesteps=(900.0, 500.0, 100.0), batch=2, repeats=2):
    def run():
        generator = torch.Generator().manual_seed(0)
        for _ in range(repeats):
            for timestep in timesteps:
                denoiser(torch.randn(batch, 3, 8, 8, generator=generator), torch.tensor(timestep))

    return run


def gathered(denoiser, needs=("samples", "histograms"), seed=0, **arguments) -> Statistics:
    with torch.no_grad():
        return collect(runs(denoiser, **arguments), denoiser, layers_of(denoiser), needs, progress=False, seed=seed)


def test_tables_follow_the_timesteps(denoiser):
    statistics = gathered(denoiser)
    assert statistics.timesteps == (100.0, 500.0, 900.0)
    absmax = statistics.layers["conv"].channel_absmax
    assert absmax.shape == (3, 3)
    assert absmax[0].max() * 3 < absmax[2].max()
    assert "idle" not in statistics.layers


def test_absmax_is_exact(denoiser):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=generator)
    statistics = gathered(denoiser, timesteps=(0.0,), repeats=1)
    assert torch.equal(statistics.layers["conv"].channel_absmax[0], x.abs().amax((0, 2, 3)))
    assert statistics.layers["conv"].absmax((1, 2)).tolist() == [
        [x[:, :1].abs().max().item(), x[:, 1:].abs().max().item()]
    ]


def test_samples_are_bounded_and_even_over_timesteps(denoiser):
    samples = gathered(denoiser, batch=8, repeats=4).layers["conv"].samples
    counts = samples.timesteps.bincount()
    assert counts.tolist() == [-(-SAMPLE_ROWS // 3)] * 3
    assert samples.values.shape == (sum(counts), 9, 3)
    assert samples.gemm((1, 2)).shape == (sum(counts), 27)


def test_gemm_samples_follow_segment_tap_channel(denoiser):
    samples = gathered(denoiser).layers["conv"].samples
    rows = samples.gemm((1, 2))
    assert torch.equal(rows[:, :9], samples.values[:, :, 0].float())
    assert torch.equal(rows[:, 9:], samples.values[:, :, 1:].float().flatten(1))


def test_same_seed_same_bits_other_seed_other_samples(denoiser):
    first, second = gathered(denoiser, batch=8), gathered(denoiser, batch=8)
    other = gathered(denoiser, batch=8, seed=1)
    for name, layer in first.layers.items():
        assert torch.equal(layer.channel_absmax, second.layers[name].channel_absmax)
        assert torch.equal(layer.samples.values, second.layers[name].samples.values)
        assert torch.equal(layer.histograms.counts, second.layers[name].histograms.counts)
    assert not torch.equal(first.layers["conv"].samples.values, other.layers["conv"].samples.values)


def test_a_thousand_timesteps_share_bounded_bins(denoiser):
    few = gathered(denoiser, timesteps=tuple(range(64)), repeats=1)
    many = gathered(denoiser, timesteps=tuple(range(999, 0, -3)), repeats=1)
    assert len(few.timesteps) == 64
    assert 16 <= len(many.timesteps) <= 64
    assert list(many.timesteps) == sorted(many.timesteps)
    assert many.memory_bytes <= 1.3 * few.memory_bytes
    layer = many.layers["conv"]
    assert layer.histograms.counts.sum() == 333 * 128 * 3  # every call's 2 x 8 x 8 pixels, 3 channels: nothing lost


def test_a_timestep_for_each_row_of_the_batch(denoiser):
    x = torch.randn(2, 3, 8, 8)
    x[1] *= 5

    def run():
        denoiser(x, torch.tensor([0.0, 0.001]))

    with torch.no_grad():
        statistics = collect(run, denoiser, layers_of(denoiser), {"samples"}, progress=False)
    assert len(statistics.timesteps) == 2
    expected = torch.stack([row.abs().amax((1, 2)) for row in (x[0], x[1] * 1.00001)])
    torch.testing.assert_close(statistics.layers["conv"].channel_absmax, expected)


def test_only_what_is_needed_is_kept(denoiser):
    bare = gathered(denoiser, needs=())
    assert bare.layers["conv"].samples is None
    assert bare.layers["conv"].histograms is None
    one = gathered(denoiser, needs={"conv": {"samples"}})
    assert one.layers["conv"].samples is not None
    assert one.layers["linear"].samples is None
    assert bare.memory_bytes < one.memory_bytes < gathered(denoiser).memory_bytes


def test_memory_counts_every_tensor(denoiser):
    layer = gathered(denoiser).layers["linear"]
    assert layer.memory_bytes == 3 * 4 + 3 * 4 * 4 + 3 * 4 * BINS * 4 + len(layer.samples.timesteps) * (4 * 2 + 8)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("needs", [(), ("samples", "histograms")])
def test_values_that_are_not_finite_name_layer_and_timestep(denoiser, poison, needs):
    denoiser.conv.bias.data[0] = poison
    with pytest.raises(ValueError, match="'linear' at timestep 900"):
        gathered(denoiser, needs=needs)
    assert not denoiser._forward_pre_hooks
    assert not any(layer._forward_pre_hooks for layer in layers_of(denoiser).values())


@pytest.mark.parametrize("later", [False, True])
def test_the_first_layer_that_is_not_finite_is_named_though_others_ran_since(denoiser, later):
    """At the last call, after which no other comes, too."""

    def run():
        for timestep, value in ((900.0, 1.0), (500.0, float("nan")), (100.0, 1.0))[: 3 if later else 2]:
            denoiser(torch.full((2, 3, 8, 8), value), torch.tensor(timestep))

    with torch.no_grad(), pytest.raises(ValueError, match="input of layer 'conv' at timestep 500;"):
        collect(run, denoiser, layers_of(denoiser), {"samples", "histograms"}, progress=False)


def test_hooks_are_gone_whatever_happens(denoiser):
    def fail():
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        collect(fail, denoiser, layers_of(denoiser), (), progress=False)
    gathered(denoiser)
    assert not denoiser._forward_pre_hooks
    assert not any(layer._forward_pre_hooks for layer in layers_of(denoiser).values())


def test_a_denoiser_that_does_not_run_is_an_error(denoiser):
    with pytest.raises(ValueError, match="never ran"):
        collect(lambda: None, denoiser, layers_of(denoiser), (), progress=False)


def test_unknown_needs_are_an_error(denoiser):
    with pytest.raises(ValueError, match="got gradients"):
        collect(lambda: None, denoiser, layers_of(denoiser), {"gradients"}, progress=False)


def test_percentiles_per_tensor_and_per_channel(denoiser):
    layer = gathered(denoiser, batch=8, repeats=4).layers["conv"]
    assert layer.percentile(0.99).shape == (3,)
    assert layer.channel_percentile(0.99).shape == (3, 3)
    assert (layer.channel_percentile(0.99) <= layer.channel_absmax).all()
    assert (layer.percentile(0.99) > layer.percentile(0.5)).all()


def unfolded(x):
    """Every output position's patch, [positions, (tap, channel)]."""
    columns = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2)
    return columns.reshape(len(columns), -1, x.shape[1], 9).transpose(2, 3).flatten(0, 1).flatten(1)


def test_moments_are_those_of_all_rows_each_call_counting_alike(denoiser):
    moments = gathered(denoiser, ("hessian",), repeats=1).layers["conv"].moments  # 128 positions a call: all of them
    generator = torch.Generator().manual_seed(0)
    gram, mean, weight = torch.zeros(27, 27).double(), torch.zeros(27).double(), 0.0
    for timestep in (900.0, 500.0, 100.0):
        rows = unfolded((torch.randn(2, 3, 8, 8, generator=generator) * (1 + timestep / 100)).double())
        balance = rows.square().mean().rsqrt()
        gram += balance**2 * rows.T @ rows / len(rows) / 3
        mean += balance**2 * rows.mean(0) / 3
        weight += balance**2 / 3
    assert moments.rows == 3 * 128
    # float32 sums of 384 products
    torch.testing.assert_close(moments.gram.double(), gram, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.mean.double(), mean, rtol=1e-4, atol=1e-5)
    assert moments.weight.item() == pytest.approx(weight.item(), rel=1e-5)


def test_moments_are_in_the_order_of_the_weight(denoiser):
    moments = gathered(denoiser, ("hessian",)).layers["conv"].moments
    rows = torch.randn(50, 9, 3)
    by_segment = Samples(rows.half(), torch.zeros(50).long()).gemm((1, 2))
    flat = rows.half().float().flatten(1)
    expected = Moments(flat.T @ flat, flat.mean(0), torch.ones(()), 50).gemm((1, 2))
    torch.testing.assert_close(expected.gram, by_segment.T @ by_segment, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(expected.mean, by_segment.mean(0))
    assert moments.gemm((3,)) is moments


def test_wide_moments_are_symmetric():
    layer = nn.Linear(700, 1)  # of more than one block
    total, x = MomentSum(), torch.randn(100, 700, dtype=torch.float64)
    total.add(layer, x, torch.Generator())
    gram = total.moments().gram
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gram.double(), x.T @ x / x.square().mean() / 100, rtol=1e-4, atol=1e-4)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.q(sample) + self.k(sample) + self.other(sample * 2)


def test_layers_that_read_the_same_tensor_share_their_moments():
    attention = Attention()
    layers = dict(attention.named_children())

    def run():
        generator = torch.Generator().manual_seed(0)
        for timestep in (3.0, 2.0, 1.0):
            attention(torch.randn(2, 300, 4, generator=generator), torch.tensor(timestep))

    def grams(*watched):
        found = collect(run, attention, {name: layers[name] for name in watched}, ("hessian",), progress=False)
        return found, {name: layer.moments.gram for name, layer in found.layers.items()}

    with torch.no_grad():
        (together, both), (_, alone) = grams("q", "k", "other"), grams("k")
    assert both["q"] is both["k"]
    assert both["other"] is not both["q"]
    assert torch.equal(both["k"], alone["k"])  # what is sampled does not depend on who shares
    held = {id(tensor): tensor.nbytes for layer in together.layers.values() for tensor in layer.tensors()}
    assert together.memory_bytes == sum(held.values())
