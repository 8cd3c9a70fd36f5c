"""What is measured: each section returns plain rows, ready for JSON."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernel_bench.fp8 import Fp8Linear
from kernel_bench.problems import ConvProblem, ConvShape, LinearProblem, LinearShape, Weights, random_bytes
from kernel_bench.timing import Timing, copies_for, glance, race
from qdiff import ops
from qdiff.layers import LayerSizes, QuantLinear
from qdiff.ops import _gemm, _tiles, checks
from qdiff.ops.rehearsal import rehearsal
from qdiff.recipe import LayerPlan, MethodSpec

Row = dict[str, Any]

# Up to so many rows a layer may run on float activations; its weights are what it reads.
FEW_ROWS = 16
MANY_ROWS = 1024
RANK = 32
# Layers of few rows are read from DRAM in a pass through a model; it takes this many to overflow the L2 cache.
MOST_SMALL_COPIES = 512
ENQUEUES, ENQUEUE_ROUNDS = 2000, 5
# Tiles that a first glance finds slower than so many times the fastest are not timed any further.
NEARLY_FASTEST = 1.15


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def linear(shapes: list[LinearShape]) -> Iterator[Row]:
    """Layers of more than 16 rows: ours with its input's quantization, its two halves, and what there is to beat."""
    return _each([shape for shape in shapes if shape.m > FEW_ROWS], _linear)


def _linear(shape: LinearShape) -> Row:
    copies = copies_for(shape.cold_bytes)
    problem = LinearProblem(shape, copies, RANK)
    exact = problem.is_exact()
    problem.prepare_codes()
    fp8 = Fp8Linear(problem)
    competitors: dict[str, Callable[[int], Any]] = {
        "w4a8": problem.w4a8,
        "quantize": problem.quantize,
        "gemm": problem.gemm4,
        "w8a8": problem.w8a8,
        "fp16": problem.half,
        "fp8_static": fp8.static,
        "fp8_dynamic": fp8.dynamic,
        "fp8_rows": fp8.rows,
    }
    if shape.m >= MANY_ROWS:
        competitors["w4a8_rank"] = problem.w4a8_with_branch
    row = _row(shape, race(competitors, copies)) | {"m": shape.m, "n": shape.n, "k": shape.k, "exact": exact}
    fastest = min(("fp8_static", "fp8_dynamic", "fp8_rows"), key=lambda name: _or_inf(row["us"][name]))
    row["fp8_kind"], row["us"]["fp8"] = fastest.removeprefix("fp8_"), row["us"][fastest]
    return row | {"workspace": max(workspace(problem.quantize), workspace(problem.gemm4))}


def small(shapes: list[LinearShape]) -> Iterator[Row]:
    """Layers of up to 16 rows (embeddings of time and text, modulations): as layers run them, and with int8 inputs."""
    return _each([shape for shape in shapes if shape.m <= FEW_ROWS], _small)


def _small(shape: LinearShape) -> Row:
    copies = copies_for(shape.cold_bytes, MOST_SMALL_COPIES)
    problem = LinearProblem(shape, copies)
    exact = problem.is_exact()
    timings = race({"w4a16": problem.w4a16, "w4a8": problem.w4a8, "fp16": problem.half}, copies)
    row = _row(shape, timings) | {"m": shape.m, "n": shape.n, "k": shape.k, "exact": exact}
    return row | {"workspace": workspace(problem.w4a16)}


def conv(shapes: list[ConvShape]) -> Iterator[Row]:
    """Convolutions with their input's quantization, against cuDNN's choice after measuring (benchmark mode)."""
    torch.backends.cudnn.benchmark = True
    return _each(shapes, _conv)


def _conv(shape: ConvShape) -> Row:
    copies = copies_for(shape.cold_bytes)
    problem = ConvProblem(shape, copies)
    exact = problem.is_exact()
    problem.prepare_codes()
    competitors = {
        "w4a8": problem.w4a8,
        "quantize": problem.quantize,
        "gemm": problem.gemm4,
        "w8a8": problem.w8a8,
        "fp16": problem.half,
        "fp16_without_bias": problem.half_without_bias,
    }
    row = _row(shape, race(competitors, copies)) | {"exact": exact}
    return row | {"workspace": max(workspace(problem.quantize), workspace(problem.gemm4))}


def peak(size: int = 8192) -> Iterator[Row]:
    """Products of large square matrices, without quantization of the input: what the tensor cores give."""
    shape = LinearShape(size, size, size, {})
    problem = LinearProblem(shape, 1)
    problem.prepare_codes()
    codes, weight = problem.quantized[0][0], problem.weights[0].codes8.t()
    fp8 = Fp8Linear(problem)
    competitors = {
        "w4a8": problem.gemm4,
        "w8a8": problem.gemm8,
        "int8 (torch._int_mm)": lambda i: torch._int_mm(codes, weight),
        "fp16": problem.half,
        "fp8 (torch._scaled_mm)": fp8.product_alone,
    }
    for name, timing in race(competitors, 1).items():
        yield {"name": name, "us": timing.us, "tops": shape.operations / timing.us / 1e6, "note": timing.note}


def quantize() -> Iterator[Row]:
    """The quantizers alone at 64 MB and above, and a copy that moves the same number of bytes."""
    for name, x, call in _quantizers():
        copies = 2
        inputs = [torch.randn_like(x) for _ in range(copies)]
        moved = x.numel() * (x.element_size() + 1)
        source = [random_bytes(moved // 2) for _ in range(copies)]
        target = [torch.empty_like(part) for part in source]
        competitors = {
            "quantize": lambda i, call=call, inputs=inputs: call(inputs[i]),
            "copy": lambda i, source=source, target=target: target[i].copy_(source[i]),
        }
        timings = race(competitors, copies)
        us = {key: timing.us for key, timing in timings.items()}
        rates = {key: moved / value / 1e3 for key, value in us.items()}
        yield {"name": name, "us": us, "gb_per_s": rates, "of_copy": us["copy"] / us["quantize"], **_notes(timings)}


def _quantizers() -> Iterator[tuple[str, Tensor, Callable[[Tensor], Any]]]:
    half, brain = torch.float16, torch.bfloat16
    for m, k, dtype, smoothed, rank in (
        (8192, 4096, half, False, 0),
        (8192, 4096, half, True, 0),
        (32768, 1280, half, True, 0),
        (16384, 5120, half, True, 0),
        (8192, 12288, brain, True, 0),
        (16384, 5120, half, True, RANK),
    ):
        smooth = torch.rand(k, device="cuda") + 0.5 if smoothed else None
        down = torch.randn(rank, k, device="cuda", dtype=dtype) if rank else None
        extras = (", smooth" if smoothed else "") + (f", rank {rank}" if rank else "")
        name = f"per_token {m}x{k} {'fp16' if dtype == half else 'bf16'}{extras}"
        x = torch.empty(m, k, device="cuda", dtype=dtype)
        yield name, x, lambda x, smooth=smooth, down=down: ops.quantize_per_token(x, smooth, down)
    for size, segments, order in (
        ((8, 320, 128, 128), (320,), torch.channels_last),
        ((16, 1280, 64, 64), (1280,), torch.channels_last),
        ((16, 960, 64, 64), (640, 320), torch.channels_last),
        ((8, 320, 128, 128), (320,), torch.contiguous_format),
    ):
        smooth = torch.rand(size[1], device="cuda") + 0.5
        scale = torch.full((size[0], len(segments)), 4 / 127, device="cuda")
        kind = "NHWC" if order == torch.channels_last else "NCHW"
        name = f"per_sample {'x'.join(map(str, size))} {kind}, {len(segments)} segment{'s' * (len(segments) > 1)}"
        x = torch.empty(size, device="cuda", dtype=half, memory_format=order)
        yield name, x, lambda x, a=scale, b=smooth, c=list(segments): ops.quantize_per_sample(x, a, b, c, 1)


def overhead() -> Iterator[Row]:
    """Host time of an operator call: many enqueues of a problem that the GPU is done with sooner."""
    m, n, k = 32, 64, 64
    x, smooth = torch.randn(m, k, device="cuda", dtype=torch.float16), torch.ones(k, device="cuda")
    weights = Weights.random(n, k)
    codes, scale, _ = ops.quantize_per_token(x, smooth, None)
    few = x[:2]
    image = torch.randn(1, k, 4, 8, device="cuda", dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    image_scale, ones, sides = torch.ones(1, 1, device="cuda"), [1, 1], [k]
    image_codes = ops.quantize_per_sample(image, image_scale, smooth, sides, 1)
    geometry, half = (ones, ones, [0, 0], sides), torch.float16
    four, eight, bias = weights.packed(), (weights.codes8, weights.scale), weights.bias
    layer = nn.Linear(k, n, device="cuda", dtype=half)
    quantized = _quantized(layer)
    calls: dict[str, Callable[[], Any]] = {
        "quantize_per_token": lambda: ops.quantize_per_token(x, smooth, None),
        "quantize_per_sample": lambda: ops.quantize_per_sample(image, image_scale, smooth, sides, 1),
        "w4a8_linear": lambda: ops.w4a8_linear(codes, scale, *four, bias, None, None, None, half),
        "w8a8_linear": lambda: ops.w8a8_linear(codes, scale, *eight, bias, None, None, None, half),
        "w4a8_conv2d": lambda: ops.w4a8_conv2d(image_codes, image_scale, *four, bias, None, None, *geometry, half),
        "w8a8_conv2d": lambda: ops.w8a8_conv2d(image_codes, image_scale, *eight, bias, None, None, *geometry, half),
        "w4a16_linear": lambda: ops.w4a16_linear(few, smooth, *four, bias, None, None),
        "dynamic_linear": lambda: ops.dynamic_linear(x, smooth, None, *four, bias, None, half),
        "QuantLinear": lambda: quantized(x),
        "torch linear": lambda: F.linear(x, weights.half, bias),
        "torch's nn.Linear": lambda: layer(x),
    }
    on_gpu = race({name: lambda i, call=call: call() for name, call in calls.items()}, 1)
    for name, call in calls.items():
        us = statistics.median(_enqueue_us(call) for _ in range(ENQUEUE_ROUNDS))
        yield {"name": name, "us": us, "gpu_us": on_gpu[name].us}


def _quantized(layer: nn.Linear) -> QuantLinear:
    """A layer of 4-bit weights, with smoothing; of which numbers does not matter."""
    plan = LayerPlan(
        name="layer",
        kind="linear",
        weight_bits=4,
        granularity="group",
        group_size=32,
        activation_bits=8,
        range_mode="dynamic",
        range=MethodSpec("dynamic"),
        transforms=(),
        rounding=MethodSpec("nearest"),
        segments=(layer.in_features,),
    )
    quantized = QuantLinear.empty(layer, plan, LayerSizes(has_smooth=True))
    for buffer in quantized.buffers():
        buffer.fill_(1)
    return quantized


def _enqueue_us(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(ENQUEUES):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / ENQUEUES * 1e6


def first_call() -> Iterator[Row]:
    """A new process that runs every layer of SDXL once: with empty caches of kernels, and again."""
    folder = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as cache:
        path = os.pathsep.join([str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")])
        # NVRTC keeps what it has compiled in the driver's cache too, so that a second time is not a first one.
        caches = {"CUPY_CACHE_DIR": f"{cache}/cupy", "CUDA_CACHE_PATH": f"{cache}/driver"}
        environment = os.environ | caches | {"PYTHONPATH": path}
        for name in ("empty cache", "from the cache"):
            command = [sys.executable, "-m", "kernel_bench.first_call"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                yield {"name": name, "seconds": math.nan, "note": done.stderr.strip().splitlines()[-1]}
            else:
                yield {"name": name, **json.loads(done.stdout.splitlines()[-1])}


def tile_sweep(linears: list[LinearShape], convs: list[ConvShape]) -> Iterator[Row]:
    """Every tile for every shape, without quantization; the fastest become the table that `_tiles.choose` reads."""
    fastest: dict[str, str] = {}
    for row in _each([*linears, *convs], _tile_sweep):
        if "error" not in row:
            fastest[row["problem"]] = min(row["us"], key=lambda name: _or_inf(row["us"][name]))
        yield row
    path = _tiles.ship(torch.cuda.get_device_capability(), fastest)
    progress(f"{len(fastest)} tiles written to {path}")


def _tile_sweep(shape: LinearShape | ConvShape) -> Row:
    copies = copies_for(shape.cold_bytes)
    problem = LinearProblem(shape, copies) if isinstance(shape, LinearShape) else ConvProblem(shape, copies)
    problem.prepare_codes()
    kernels, asked, _ = _arguments(_tiles, "choose", problem.gemm4)
    guess = kernels.guess(asked).name
    calls = {tile.name: _with_tile(problem.gemm4, tile.name) for tile in _tiles.fitting(kernels, asked)}
    # In parallel and not as they are needed: the first shapes need many.
    with rehearsal():
        for call in calls.values():
            call(0)
    rough = {name: glance(call, copies) for name, call in calls.items()}
    limit = NEARLY_FASTEST * min(rough.values())
    timings = race({name: calls[name] for name, us in rough.items() if us <= limit or name == guess}, copies)
    return _row(shape, timings) | {"problem": _tiles.describe(kernels, asked), "guess": guess}


class _Reached(Exception):  # noqa: N818  no error
    pass


def _arguments(module: Any, name: str, call: Callable[[int], Any]) -> tuple[Any, ...]:
    """The arguments with which a call comes to this function of a module, where it is made to end."""
    checks.forget()  # a launch that is ready comes to neither of them
    with mock.patch.object(module, name, side_effect=_Reached) as function, contextlib.suppress(_Reached):
        call(0)
    return tuple(function.call_args.args)


def _with_tile(call: Callable[[int], Any], name: str) -> Callable[[int], Any]:
    def run(i: int) -> Any:
        with _gemm.forced_tile(name):
            return call(i)

    return run


def workspace(call: Callable[[int], Any]) -> int:
    """Bytes that a call had allocated at its peak, beyond what it returned."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = call(0)
    beyond = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del result
    return beyond


def _each(shapes: Iterable[Any], measure: Callable[[Any], Row]) -> Iterator[Row]:
    for shape in shapes:
        try:
            yield measure(shape)
        except (RuntimeError, ValueError) as error:
            torch.cuda.synchronize()  # raises where the error was the device's: nothing after it would be true
            progress(f"{shape}: {error}")
            yield {"name": str(shape), "counts": shape.counts, "error": f"{type(error).__name__}: {error}"}


def _row(shape: LinearShape | ConvShape, timings: dict[str, Timing]) -> Row:
    progress(f"{shape}: " + ", ".join(f"{name} {timing.us:.1f}" for name, timing in timings.items()))
    us = {name: timing.us for name, timing in timings.items()}
    return {"name": str(shape), "counts": shape.counts, "operations": shape.operations, "us": us, **_notes(timings)}


def _notes(timings: dict[str, Timing]) -> Row:
    return {"notes": {name: timing.note for name, timing in timings.items() if timing.note}}


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value
