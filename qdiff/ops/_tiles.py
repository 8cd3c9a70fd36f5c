"""Which tile computes a problem: what was measured on this kind of GPU, or else a rule of thumb.

Measurements are JSON, {problem: tile}. Those in `tiles/` come with the package, one file for each compute capability,
which `scripts/bench_kernels.py --tile-sweep` writes; with QDIFF_TUNE=1 a problem that has none is measured when it is
first seen, and kept beside the compiled kernels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from qdiff.ops import _cupy
from qdiff.ops._problem import Launch, Problem, addresses
from qdiff.ops.rehearsal import rehearsal


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Tile = TypeVar("Tile", bound=_Named)


class Kernels(Protocol[Tile]):
    """A module that launches one kernel in tiles of several shapes."""

    NAME: str
    TILES: Sequence[Tile]

    def fits(self, tile: Tile, problem: Problem) -> bool: ...
    def guess(self, problem: Problem) -> Tile: ...
    def prepare(self, problem: Problem, out: Tensor, tile: Tile) -> Launch: ...


_chosen: dict[tuple, Any] = {}


def choose(kernels: Kernels[Tile], problem: Problem, out: Tensor) -> Tile:
    """The tile for `problem`: measured, or guessed. With QDIFF_TUNE=1, `out` is computed to find out."""
    p = problem
    rank = 0 if p.up is None else p.up.shape[1]  # a tile may have no room for it
    key = (kernels.NAME, out.device, p.B, p.OH, p.OW, p.N, p.segments, p.kernel, p.stride, rank)
    found: Tile | None = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _find(kernels, problem, out)
    return found


def describe(kernels: Kernels[Tile], problem: Problem) -> str:
    """A problem as the files name it. Weight formats and low-rank branches have a shape's best tile in common."""
    p = problem
    window = f"{p.kernel[0]}x{p.kernel[1]}/{p.stride[0]}"
    return f"{kernels.NAME} {p.B}x{p.OH}x{p.OW} {'+'.join(map(str, p.segments))} {window} {p.N}"


def fitting(kernels: Kernels[Tile], problem: Problem) -> list[Tile]:
    """The tiles that can compute a problem."""
    return [tile for tile in kernels.TILES if kernels.fits(tile, problem)]


def ship(capability: tuple[int, int], found: dict[str, str]) -> Path:
    """Write measurements to the package's own file, whose other problems stay in it; returns its path."""
    path = _shipped(capability)
    path.write_bytes(_with(path, found))
    return path


def _find(kernels: Kernels[Tile], problem: Problem, out: Tensor) -> Tile:
    capability, text, tiles = _cupy.capability(out.device), describe(kernels, problem), fitting(kernels, problem)
    name = _measured(capability).get(text)
    if name is None and os.environ.get("QDIFF_TUNE") == "1" and not torch.cuda.is_current_stream_capturing():
        name = _measure(problem, out, tiles, kernels.prepare)
        _keep(capability, text, name)
    return next((tile for tile in tiles if tile.name == name), None) or kernels.guess(problem)


def _measure(
    problem: Problem, out: Tensor, tiles: Sequence[Tile], prepare: Callable[[Problem, Tensor, Tile], Launch]
) -> str:
    """The name of the fastest: the median of replays of a graph of launches, so that the host's time does not count."""
    times, places = {}, addresses(problem, out)
    launches = {tile.name: prepare(problem, out, tile) for tile in tiles}
    with rehearsal():  # compiles all of them
        for launch in launches.values():
            launch(places, False)
    for name, launch in launches.items():
        launch(places, False)
        torch.cuda.synchronize(out.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(8):
                launch(places, True)
        spans = []
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            spans.append(start.elapsed_time(end))
        times[name] = sorted(spans)[2]
    return min(times, key=lambda name: times[name])


@lru_cache(maxsize=8)
def _measured(capability: tuple[int, int]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in (_shipped(capability), _kept(capability)):
        if path.is_file():
            found |= json.loads(path.read_text(encoding="utf-8"))
    return found


def _keep(capability: tuple[int, int], key: str, name: str) -> None:
    _measured(capability)[key] = name
    path = _kept(capability)
    _cupy.write(path, _with(path, {key: name}))


def _with(path: Path, found: dict[str, str]) -> bytes:
    """What the file holds once these measurements are in it."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return json.dumps(before | found, indent=0, sort_keys=True).encode()


def _shipped(capability: tuple[int, int]) -> Path:
    return Path(__file__).parent / "tiles" / _file(capability)


def _kept(capability: tuple[int, int]) -> Path:
    return _cupy.cache_folder() / f"qdiff_tiles_{_file(capability)}"


def _file(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}.json"
