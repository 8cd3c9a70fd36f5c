"""Which tile computes a problem: tables, measurements and rules of thumb, without a GPU."""

import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from qdiff.ops import _cupy, _gemm_mma, _gemm_wgmma, _tiles
from qdiff.ops._gemm import Problem

BENCHMARKS = Path(__file__).parents[2] / "assets" / "benchmarks"
KERNELS = {one.NAME: one for one in (_gemm_mma, _gemm_wgmma)}


class Tile(NamedTuple):
    name: str


def make_problem(*, images=1, height=1, width=1, features=64, segments=(64,), kernel=(1, 1), stride=(1, 1)) -> Problem:
    """A problem of these sizes: no rule looks into its tensors."""
    nothing = torch.empty(0)
    return Problem(
        x=nothing,
        B=images,
        H=height * stride[0],
        W=width * stride[1],
        C=sum(segments),
        OH=height,
        OW=width,
        N=features,
        kernel=kernel,
        stride=stride,
        padding=(0, 0),
        segments=segments,
        x_scale=nothing,
        weight_kind=4,
        codes=nothing,
        multipliers=nothing,
        codebook=None,
        scale=nothing,
        bias=None,
        shift=None,
        residual=None,
        x_low=None,
        up=None,
        out_dtype=torch.float16,
    )


PROBLEM = make_problem(images=2, height=4, width=8, features=96, segments=(64, 32), kernel=(3, 3), stride=(2, 2))
TEXT = "fake 2x4x8 64+32 3x3/2 96"
OUT = torch.empty(2, 4, 8, 96)


class Setup:
    """A kernel with three tiles, of which `unfit` fits nothing, on a GPU of capability 9.0 whose tables are here."""

    def __init__(self, folder):
        self.shipped = folder / "package" / "tiles" / "sm_90.json"
        self.own = folder / "cache" / "qdiff_tiles_sm_90.json"
        self.measured = []
        self.kernels = SimpleNamespace(
            NAME="fake",
            TILES=[Tile("small"), Tile("large"), Tile("unfit")],
            fits=lambda tile, problem: tile.name != "unfit",
            guess=lambda problem: Tile("small"),
            prepare=lambda problem, out, tile: None,
        )
        for path in (self.shipped, self.own):
            path.parent.mkdir(parents=True)

    def measure(self, problem, out, tiles, prepare):
        self.measured.append([tile.name for tile in tiles])
        return "large"

    def choose(self, problem=PROBLEM):
        return _tiles.choose(self.kernels, problem, OUT).name

    def forget(self):
        """What another process would not know."""
        _tiles._chosen.clear()
        _tiles._measured.cache_clear()


@pytest.fixture
def setup(tmp_path, monkeypatch):
    made = Setup(tmp_path)
    monkeypatch.setattr(_tiles, "__file__", str(tmp_path / "package" / "_tiles.py"))
    monkeypatch.setattr(_tiles, "_chosen", {})
    monkeypatch.setattr(_tiles, "_measure", made.measure)
    monkeypatch.setattr(_cupy, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(_cupy, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("QDIFF_TUNE", raising=False)
    _tiles._measured.cache_clear()
    yield made
    _tiles._measured.cache_clear()


def test_without_a_table_it_guesses_and_writes_nothing(setup):
    assert setup.choose() == "small"
    assert not setup.measured
    assert not setup.own.exists()


def test_the_shipped_table_is_used(setup):
    setup.shipped.write_text(json.dumps({TEXT: "large"}))
    assert setup.choose() == "large"
    assert setup.choose(make_problem()) == "small"  # which is not in it


def test_own_measurements_win_over_shipped_ones(setup):
    setup.shipped.write_text(json.dumps({TEXT: "small"}))
    setup.own.write_text(json.dumps({TEXT: "large"}))
    assert setup.choose() == "large"


@pytest.mark.parametrize("name", ["gone", "unfit"])
def test_a_tile_that_cannot_be_used_falls_back_to_the_guess(setup, name):
    setup.shipped.write_text(json.dumps({TEXT: name}))
    assert setup.choose() == "small"


def test_tuning_measures_once_and_keeps_the_result(setup, monkeypatch):
    setup.own.write_text(json.dumps({"another problem": "small"}))
    monkeypatch.setenv("QDIFF_TUNE", "1")
    assert [setup.choose(), setup.choose()] == ["large", "large"]
    assert setup.measured == [["small", "large"]]
    assert json.loads(setup.own.read_text()) == {TEXT: "large", "another problem": "small"}
    setup.forget()
    monkeypatch.delenv("QDIFF_TUNE")
    assert setup.choose() == "large"
    assert len(setup.measured) == 1


def test_tuning_leaves_what_a_table_knows(setup, monkeypatch):
    setup.shipped.write_text(json.dumps({TEXT: "small"}))
    monkeypatch.setenv("QDIFF_TUNE", "1")
    assert setup.choose() == "small"
    assert not setup.measured
    assert not setup.own.exists()


def test_shipping_keeps_the_other_problems(setup):
    setup.shipped.write_text(json.dumps({TEXT: "small", "wgmma of another kernel": "128x16"}))
    assert _tiles.ship((9, 0), {_tiles.describe(setup.kernels, PROBLEM): "large"}) == setup.shipped
    assert setup.choose() == "large"
    assert setup.shipped.read_text() == f'{{\n"{TEXT}": "large",\n"wgmma of another kernel": "128x16"\n}}'


def test_nothing_is_measured_while_a_graph_is_captured(setup, monkeypatch):
    monkeypatch.setenv("QDIFF_TUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert setup.choose() == "small"
    assert not setup.measured
    assert not setup.own.exists()


def test_problems_that_differ_have_names_that_differ(setup, monkeypatch):
    monkeypatch.setenv("QDIFF_TUNE", "1")
    changes = ({}, {"images": 2}, {"height": 2}, {"width": 2}, {"features": 32}, {"segments": (32, 32)})
    changes += ({"kernel": (3, 3)}, {"stride": (2, 2)})
    for change in changes:
        setup.choose(make_problem(**change))
    assert len(setup.measured) == len(json.loads(setup.own.read_text())) == len(changes)


def problem_of(text) -> Problem:
    """What `_tiles.describe` calls so."""
    _, output, segments, window, features = text.split()
    images, height, width = map(int, output.split("x"))
    kernel, stride = window.split("/")
    problem = make_problem(
        images=images,
        height=height,
        width=width,
        features=int(features),
        segments=tuple(map(int, segments.split("+"))),
        kernel=tuple(map(int, kernel.split("x"))),
        stride=(int(stride), int(stride)),
    )
    assert _tiles.describe(KERNELS[text.split()[0]], problem) == text
    return problem


def test_shipped_tables_name_tiles_that_can_be_used():
    for path in _tiles._shipped((9, 0)).parent.glob("*.json"):
        for text, name in json.loads(path.read_text(encoding="utf-8")).items():
            kernels, problem = KERNELS[text.split()[0]], problem_of(text)
            assert name in [tile.name for tile in _tiles.fitting(kernels, problem)], f"{path.name}: {text}"


@pytest.mark.parametrize(
    ("kernels", "measured", "most"),
    [(_gemm_wgmma, "tile_sweep.json", 1.015), (_gemm_mma, "tile_sweep_portable.json", 1.045)],
    ids=["wgmma", "mma"],
)
def test_guesses_are_nearly_the_fastest_of_the_tiles_that_were_measured(kernels, measured, most, monkeypatch):
    sweep = json.loads((BENCHMARKS / measured).read_text())
    monkeypatch.setattr(_cupy, "multiprocessors", lambda device: 132)
    slower = []
    for row in sweep["sections"]["tile_sweep"]:
        guess, fastest = kernels.guess(problem_of(row["problem"])).name, min(row["us"].values())
        slower.append(row["us"].get(guess, 1.25 * fastest) / fastest)  # those that were far slower have no time
    assert statistics.geometric_mean(slower) < most


# Images, height and width of the output, and the stride.
OUTPUTS = (
    (1, 1, 1, (1, 1)),
    (1, 1, 77, (1, 1)),
    (1, 1, 4096, (1, 1)),
    (2, 64, 64, (1, 1)),
    (2, 128, 96, (1, 1)),
    (3, 13, 7, (1, 1)),
    (16, 8, 8, (1, 1)),
    (50, 1, 1, (1, 1)),
    (1, 1000, 1, (1, 1)),
    (1, 300, 2, (1, 1)),
    (2, 32, 32, (2, 2)),
    (2, 400, 3, (2, 2)),
    (1, 3, 400, (2, 2)),
    (4, 12, 20, (3, 2)),
    (2, 40, 40, (8, 8)),
)


@pytest.mark.parametrize(
    ("segments", "kernel", "piece", "stages"),
    [
        ((320,), (3, 3), 64, (23,)),  # 22.5 and not 9 times 3
        ((640, 320), (3, 3), 64, (45, 23)),
        ((640, 1280), (3, 3), 128, (45, 90)),  # none would be half empty
        ((96,), (3, 3), 128, (9,)),  # no multiple of 64
        ((320, 96), (3, 3), 128, (27, 9)),
        ((320,), (1, 1), 128, (3,)),  # there is no other tap to fill it with
        ((64,), (2, 1), 64, (1,)),
    ],
)
def test_stages(segments, kernel, piece, stages):
    assert _gemm_wgmma._piece(segments, kernel) == piece
    assert _gemm_wgmma._stages(segments, kernel) == stages


@pytest.mark.parametrize(
    ("change", "reason"),
    [({}, None), ({"stride": (9, 9)}, "stride of 9"), ({"kernel": (1, 128)}, r"window of \(1, 128\)")],
)
def test_what_the_copy_engine_does_not_take_is_refused(change, reason):
    problem = make_problem(images=2, height=4, width=8, **change)
    found = _gemm_wgmma.refusal(problem)
    assert found is None if reason is None else re.search(reason, found)


@pytest.mark.parametrize("segments", [(32,), (320,), (5120,), (640, 320), (64, 64, 64), (64, 32, 32, 64)], ids=str)
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_guess_is_a_tile_that_fits(output, segments, monkeypatch):
    monkeypatch.setattr(_cupy, "multiprocessors", lambda device: 132)
    images, height, width, stride = output
    for features, size in ((8, 1), (320, 3), (10240, 1)):
        problem = make_problem(
            images=images,
            height=height,
            width=width,
            features=features,
            segments=segments,
            kernel=(size, size),
            stride=stride,
        )
        for kernels in (_gemm_wgmma, _gemm_mma):
            tile = kernels.guess(problem)
            assert tile in kernels.TILES
            assert kernels.fits(tile, problem)
