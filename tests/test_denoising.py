import copy
import pickle

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
    with pytest.raises(RuntimeError, match="no timestep is known"):
        tracker.share([TABLE])
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


class Layered(Unet):
    """Layers with tables of several widths, whose rows are the result."""

    def __init__(self, widths=(1, 2, 1, 3, 2), grid=GRID):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Module() for _ in widths)
        for layer, width in zip(self.layers, widths):
            layer.register_buffer("act_scales", torch.rand(len(grid), width, generator=generator))
        self.tracker = StepTracker(grid)
        self.hook = self.tracker.attach(self, list(self.layers))

    def forward(self, sample, timestep):
        return [self.tracker.resample(layer.act_scales, len(sample)) for layer in self.layers]

    def alone(self, sample, timestep):
        """The same without sharing."""
        tracker = StepTracker(self.tracker.timesteps)
        tracker.set(timestep, len(sample))
        return [tracker.resample(layer.act_scales, len(sample)) for layer in self.layers]


def equal(results, others):
    return len(results) == len(others) and all(map(torch.equal, results, others))


def storages(results):
    return {rows.untyped_storage().data_ptr() for rows in results}


@given(grids, st.lists(st.floats(-100, 1100, width=32), min_size=1, max_size=5), st.integers(1, 2))
def test_shared_tables_give_the_same_bits(grid, timesteps, samples):
    denoiser, timesteps = Layered(grid=tuple(map(float, grid))), torch.tensor(timesteps)
    x = torch.zeros(samples * len(timesteps), 4)
    rows = denoiser(x, timesteps)
    assert equal(rows, denoiser.alone(x, timesteps))
    assert all(row.is_contiguous() and row.data_ptr() % 16 == 0 for row in rows)
    assert len(storages(rows)) == 3  # one for each width


def test_shared_tables_are_read_at_every_call():
    denoiser, x = Layered(), torch.zeros(2, 4)
    denoiser(x, 60)
    for timestep in (1, 300, 300):
        denoiser.layers[2].act_scales.add_(1)
        denoiser.layers[3].act_scales = 2 * denoiser.layers[3].act_scales
        rows = denoiser(x, timestep)
        assert equal(rows, denoiser.alone(x, timestep))
        assert len(storages(rows)) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda denoiser: denoiser.layers[1].act_scales.mul_(3),
        lambda denoiser: denoiser.load_state_dict({k: v + 1 for k, v in denoiser.state_dict().items()}),
        lambda denoiser: denoiser.layers[1].register_buffer("act_scales", torch.rand(4, 2)),
        lambda denoiser: denoiser.to(torch.float64).to(torch.float32),
        lambda denoiser: denoiser.tracker.set(50, 3),
        lambda denoiser: setattr(denoiser.tracker, "weights", torch.tensor([[0.25, 0.5, 0.25, 0.0]])),
    ],
    ids=["in place", "loaded", "another", "moved", "another timestep", "other weights"],
)
def test_what_changes_after_the_call_is_seen(change):
    denoiser, x = Layered(), torch.zeros(3, 4)
    denoiser(x, 300)
    change(denoiser)
    expected = StepTracker(GRID)
    expected.weights = denoiser.tracker.weights
    tables = [layer.act_scales for layer in denoiser.layers]
    assert equal(denoiser.forward(x, None), [expected.resample(table, 3) for table in tables])


def test_only_tables_that_can_be_shared_are():
    denoiser, x = Layered((2, 2, 2, 2, 2)), torch.zeros(2, 4)
    first, second, third, fourth, _ = denoiser.layers
    first.act_scales.requires_grad_()
    second.act_scales = second.act_scales.double()
    third.act_scales = third.act_scales[:3]
    with torch.inference_mode():
        fourth.act_scales = fourth.act_scales.clone()
    denoiser.layers.append(nn.Module())
    denoiser.layers[-1].register_buffer("act_scales", TABLE.to("meta"))
    with pytest.raises(ValueError, match="table: got 3 rows"):
        denoiser(x, 300)
    del denoiser.layers[2]
    rows = denoiser(x, 300)
    assert equal(rows[:-1], denoiser.alone(x, 300)[:-1])
    assert rows[0].requires_grad
    assert len(storages(rows[:-1])) == 4


def test_copies_share_their_own_tables():
    denoiser, x = Layered(), torch.zeros(2, 4)
    denoiser(x, 300)
    assert copy.deepcopy(denoiser.tracker)._shared is None  # whoever copies a layer copies its tracker
    for again in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
        again.layers[0].act_scales.add_(1)
        assert equal(again.forward(x, 300), again.alone(x, 300))
        rows = again(x, 70)
        assert equal(rows, again.alone(x, 70))
        assert len(storages(rows)) == 3
        assert equal(denoiser.forward(x, 300), denoiser.alone(x, 300))


def test_a_compiled_denoiser_is_compiled_once():
    denoiser, x, graphs = Layered(), torch.zeros(2, 4), []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(denoiser, fullgraph=True, backend=keep)
    counts = []
    for timestep in (torch.tensor(300.0), torch.tensor(50.0), torch.tensor(999.0)):
        denoiser(x, timestep + 1)
        assert equal(compiled(x, timestep), denoiser.alone(x, timestep))
        counts.append(len(graphs))
    assert counts[0] == counts[-1]


def test_no_value_is_read_on_the_host():
    """Under a fake tensor mode reading a value raises: what passes here can be captured in a CUDA graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    tracker = StepTracker(GRID)
    with FakeTensorMode():
        tracker.set(torch.zeros(2), 4)
        table = torch.zeros(4, 2)
        assert tracker.resample(table, 4).shape == (4, 2)
        tracker.share([table])
        assert tracker.resample(table, 4).shape == (4, 2)


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


@pytest.mark.gpu
def test_a_captured_graph_follows_shared_tables():
    denoiser, x, timestep = Layered().cuda(), torch.zeros(2, 4, device="cuda"), torch.tensor([1.0], device="cuda")
    denoiser(x, timestep)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = denoiser(x, timestep)
    assert len(storages(rows)) <= 3
    for value in (1.0, 77.0, 500.0, 2000.0):
        timestep.fill_(value)
        denoiser.layers[0].act_scales.add_(1)
        graph.replay()
        assert equal(rows, denoiser.alone(x, timestep))


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
