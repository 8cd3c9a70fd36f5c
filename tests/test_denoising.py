import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qdiff.denoising import StepTracker, read_timestep

GRID = (1.0, 50.0, 200.0, 999.0)
TABLE = torch.tensor([[1.0, 10.0], [3.0, 20.0], [2.0, 40.0], [8.0, 10.0]])

grids = st.lists(st.integers(0, 1000), min_size=1, max_size=12, unique=True).map(sorted)


class Unet(nn.Module):
    def __init__(self, tracker=None):
        super().__init__()
        self.inner = nn.Identity()
        self.inner.tracker = tracker

    def forward(self, sample, timestep, encoder_hidden_states=None):
        return sample


class Transformer(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states=None, timestep=None):
        return hidden_states


@given(grids, st.lists(st.floats(-100, 1100), min_size=1, max_size=5))
def test_weights_are_a_partition_of_unity_over_neighbours(grid, timesteps):
    tracker = StepTracker(grid)
    tracker.set(torch.tensor(timesteps), len(timesteps))
    weights = tracker.weights
    assert weights.shape == (len(timesteps), len(grid))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(timesteps)), rtol=0, atol=1e-6)
    for row in weights:
        used = row.nonzero().flatten().tolist()
        assert len(used) <= 2
        assert used[-1] - used[0] <= 1


@given(grids, st.floats(-100, 1100, width=32))
def test_a_table_becomes_the_piecewise_linear_function_through_its_rows(grid, timestep):
    values = torch.linspace(-3, 5, len(grid)) ** 2
    tracker = StepTracker(grid)
    tracker.set(timestep, 1)
    clamped = min(max(timestep, grid[0]), grid[-1])
    right = next(j for j, point in enumerate(grid) if point >= clamped)
    left = max(0, right - 1)
    share = (clamped - grid[left]) / (grid[right] - grid[left]) if right > left else 1.0
    expected = float(values[left]) * (1 - share) + float(values[right]) * share
    assert float(tracker.resample(values[:, None], 1)) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_at_a_grid_point_the_row_comes_back_bit_for_bit():
    tracker = StepTracker(GRID)
    for timestep, row in zip(GRID, TABLE, strict=True):
        tracker.set(timestep, 1)
        assert torch.equal(tracker.resample(TABLE, 1), row[None])


@pytest.mark.parametrize(
    "timestep",
    [200, 200.0, torch.tensor(200), torch.tensor([200]), torch.tensor(200.0).half(), torch.tensor([200] * 6)],
    ids=["int", "float", "scalar", "one", "half", "batch"],
)
def test_every_form_of_a_timestep(timestep):
    tracker = StepTracker(GRID)
    tracker.set(timestep, 6)
    assert tracker.weights.dtype == torch.float32
    assert torch.equal(tracker.resample(TABLE, 6), TABLE[2].expand(6, 2))


def test_samples_may_be_at_different_timesteps_and_layers_may_fold_more_into_their_batch():
    tracker = StepTracker(GRID)
    tracker.set(torch.tensor([1, 999]), 4)
    assert torch.equal(tracker.resample(TABLE, 4), TABLE[[0, 0, 3, 3]])
    assert torch.equal(tracker.resample(TABLE, 8), TABLE[[0, 0, 0, 0, 3, 3, 3, 3]])


@pytest.mark.parametrize("grid", [[], [1, 1], [2, 1], [float("nan"), 1.0], [float("nan")], [1, 1 + 1e-12]], ids=str)
def test_a_grid_must_ascend(grid):
    with pytest.raises(ValueError, match="timesteps"):
        StepTracker(grid)


def test_misuse_is_told():
    tracker = StepTracker(GRID)
    with pytest.raises(RuntimeError, match="no timestep is known"):
        tracker.resample(TABLE, 1)
    with pytest.raises(ValueError, match="timestep"):
        tracker.set(torch.tensor([1, 2, 3]), 4)
    tracker.set(1, 2)
    with pytest.raises(ValueError, match="batch"):
        tracker.resample(TABLE, 3)
    with pytest.raises(ValueError, match="table"):
        tracker.resample(TABLE[:3], 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda denoiser, x: denoiser(x, 50),
        lambda denoiser, x: denoiser(x, timestep=torch.tensor(50)),
        lambda denoiser, x: denoiser(sample=x, timestep=50.0),
    ],
    ids=["positions", "keyword", "keywords"],
)
def test_an_attached_tracker_follows_the_argument(call):
    tracker, denoiser = StepTracker(GRID), Unet()
    handle = tracker.attach(denoiser)
    call(denoiser, torch.zeros(3, 4))
    assert torch.equal(tracker.resample(TABLE, 3), TABLE[1].expand(3, 2))
    handle.remove()
    denoiser(torch.zeros(3, 4), 999)
    assert torch.equal(tracker.resample(TABLE, 3), TABLE[1].expand(3, 2))


def test_transformers_are_read_by_their_own_signature():
    tracker, denoiser = StepTracker(GRID), Transformer()
    tracker.attach(denoiser)
    denoiser(torch.zeros(2, 4), torch.zeros(7, 1), 200)
    assert torch.equal(tracker.resample(TABLE, 2), TABLE[2].expand(2, 2))
    with pytest.raises(ValueError, match="timestep: got None"):
        denoiser(torch.zeros(2, 4))


def test_a_deep_copy_has_a_tracker_of_its_own():
    tracker = StepTracker(GRID)
    original = Unet(tracker)
    tracker.attach(original)
    original(torch.zeros(1, 4), 1)
    duplicate = copy.deepcopy(original)
    duplicate(torch.zeros(1, 4), 999)
    assert torch.equal(duplicate.inner.tracker.resample(TABLE, 1), TABLE[3:])
    assert torch.equal(original.inner.tracker.resample(TABLE, 1), TABLE[:1])


def test_no_value_is_read_on_the_host():
    """Under a fake tensor mode reading a value raises: what passes here can be captured in a CUDA graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    tracker = StepTracker(GRID)
    with FakeTensorMode():
        tracker.set(torch.zeros(2), 4)
        assert tracker.resample(torch.zeros(4, 2), 4).shape == (4, 2)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_timestep():
    tracker, timestep, table = StepTracker(GRID), torch.tensor([1.0], device="cuda"), TABLE.cuda()
    tracker.set(timestep, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tracker.set(timestep, 2)
        scales = tracker.resample(table, 2)
    for value, row in zip(GRID, TABLE, strict=True):
        timestep.fill_(value)
        graph.replay()
        assert torch.equal(scales.cpu(), row.expand(2, 2))


def test_read_timestep():
    x = torch.zeros(3, 4)
    assert read_timestep(Unet(), (x, 7), {}) == (7, 3)
    assert read_timestep(Transformer(), (x,), {"timestep": 8}) == (8, 3)


@pytest.mark.parametrize(
    ("denoiser", "args", "named"),
    [(nn.Linear(1, 1), (), "denoiser"), (Unet(), (None, 1), "sample"), (Unet(), (torch.zeros(1),), "timestep")],
)
def test_read_timestep_says_what_is_missing(denoiser, args, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        read_timestep(denoiser, args, {})
