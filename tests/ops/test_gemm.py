"""What operators hand to the matrix kernels, and what a second call of a kind keeps of the first; without a GPU."""

import ctypes
import gc
import inspect
import math
import struct
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

from qdiff import ops
from qdiff.numerics.packing import pack_int4, pack_multipliers
from qdiff.ops import _cupy, _gemm, _gemm_mma, _gemm_wgmma, _settled, _shortcut, _tensor_maps, _tiles, checks
from qdiff.ops._problem import Problem
from qdiff.ops.w8a8_conv2d import int8_conv2d

N, KERNEL = 6, (3, 2)
SEGMENTS = [(4,), (40,), (4, 36), (32, 20), (32,), (64, 32)]


@pytest.fixture
def launched(monkeypatch):
    """The problems that came to a launch, where the reference computes them as int8 weights."""
    problems = []

    def run(p, out):
        problems.append(p)
        added = (p.scale, p.bias, p.shift, p.residual.permute(0, 3, 1, 2))
        geometry = (p.kernel, p.stride, p.padding, p.segments, p.out_dtype)
        out.copy_(int8_conv2d(p.x.permute(0, 3, 1, 2), p.x_scale, p.codes, *added, *geometry))

    monkeypatch.setattr(_gemm, "_run", run)
    return problems


def on_kernels(monkeypatch, name, arguments, positions=False):
    """The operator's result on its kernel, by keywords, which takes the dispatcher, or positions, which may not."""
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[f"qdiff.ops.{name}"], "runs_kernel", lambda op, x, refusal: refusal is None)
        operator = getattr(ops, name)
        return operator(*in_order(name, arguments)) if positions else operator(**arguments)


def in_order(name, arguments):
    return [arguments[parameter] for parameter in inspect.signature(getattr(ops, name)).parameters]


def inputs(segments):
    x = torch.randint(-127, 128, (2, sum(segments), 6, 5), dtype=torch.int8)
    return {
        "x_codes": x.contiguous(memory_format=torch.channels_last),
        "x_scale": torch.rand(2, len(segments)) + 0.1,
        "scale": torch.rand(N) + 0.1,
        "bias": torch.randn(N),
        "shift": torch.randn(2, N),
        "residual": torch.randn(2, N, 3, 4),
        "kernel": KERNEL,
        "stride": (2, 1),
        "padding": (1, 0),
        "segments": segments,
        "out_dtype": torch.float32,
    }


def assert_whole_blocks(problem, segments):
    assert problem.segments == tuple(math.ceil(width / 32) * 32 for width in segments)
    assert problem.C == problem.x.shape[3] == sum(problem.segments)
    assert problem.x.is_contiguous()
    assert problem.codes.shape == (N, problem.C * math.prod(KERNEL))


@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_8_bit_weights(segments, launched, monkeypatch):
    codes = torch.randint(-127, 128, (N, sum(segments) * math.prod(KERNEL)), dtype=torch.int8)
    arguments = inputs(segments) | {"codes": codes}
    got = on_kernels(monkeypatch, "w8a8_conv2d", arguments)
    assert torch.equal(got, ops.w8a8_conv2d(**arguments))
    assert_whole_blocks(launched[0], segments)


@pytest.mark.parametrize("codebook", [False, True], ids=["multipliers", "codebook"])
@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_4_bit_weights_in_smaller_groups_become_8_bit_ones(segments, codebook, launched, monkeypatch):
    k, group_size = sum(segments) * math.prod(KERNEL), math.gcd(16, *segments)
    multipliers = pack_multipliers(torch.randint(1, 16, (N, k // group_size), dtype=torch.uint8))
    arguments = inputs(segments) | {
        "codes": pack_int4(torch.randint(-8, 8, (N, k), dtype=torch.int8), group_size),
        "multipliers": None if codebook else multipliers,
        "codebook": torch.randint(-127, 128, (N, 16), dtype=torch.int8) if codebook else None,
        "group_size": group_size,
    }
    got = on_kernels(monkeypatch, "w4a8_conv2d", arguments)
    assert torch.equal(got, ops.w4a8_conv2d(**arguments))
    assert_whole_blocks(launched[0], segments)
    assert launched[0].weight_kind == 8


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of capability 9.0, whose kernels only write down their parameters; CPU tensors are taken for its own."""
    made = SimpleNamespace(kernels=[], params=[])

    def kernel(source, defines):
        made.kernels.append((source, dict(defines)))

        def launcher(grid, threads, shared, layout, rest):
            return lambda *values: made.params.append(layout.pack(*values) + rest)

        return SimpleNamespace(
            launch=lambda grid, threads, shared, params: made.params.append(bytes(params)), launcher=launcher
        )

    def forget():
        checks.forget()
        _settled.forget()
        _gemm_wgmma._plan.cache_clear()
        _tensor_maps.forget()

    made.forget = forget
    monkeypatch.setattr(_cupy, "kernel", kernel)
    monkeypatch.setattr(_cupy, "capability", lambda device: (9, 0))
    monkeypatch.setattr(_cupy, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(_tensor_maps, "encode", lambda *shape: struct.pack("Q", shape[0]).ljust(128, b"\0"))
    monkeypatch.setattr(_tiles, "_chosen", {})
    forget()
    yield made
    forget()


def test_tensor_maps_of_images_have_columns_before_rows(monkeypatch):
    asked = []

    def encoder(mode):
        def encode(*values):
            asked.append((mode, [list(value) if isinstance(value, ctypes.Array) else value for value in values]))
            return 0

        return encode

    monkeypatch.setattr(_cupy, "tensor_map_encoder", encoder)
    rows, columns = (-1, -2, 2), (0, -4, 1)  # 3 x 5 windows, padded above and below
    assert len(_tensor_maps.encode(4096, (96, 7, 9, 2), (64, 160), rows, columns)) == 128
    mode, (_, _, rank, address, sizes, strides, first, last, channels, pixels, steps, _, swizzle, *_) = asked[0]
    assert (mode, rank, address.value, swizzle) == ("Im2col", 4, 4096, 2)
    assert (sizes, strides) == ([96, 7, 9, 2], [96, 96 * 7, 96 * 7 * 9])
    assert (first, last, steps) == ([0, -1], [-4, -2], [1, 1, 2, 1])
    assert (channels, pixels) == (64, 160)


def test_a_tensor_map_that_the_driver_does_not_make_is_an_error(monkeypatch):
    monkeypatch.setattr(_cupy, "tensor_map_encoder", lambda mode: lambda *values: 1)
    with pytest.raises(RuntimeError, match="CUresult 1"):
        _tensor_maps.encode(4096, (96, 7), (64, 16))


def linear_inputs(rank=8):
    return {
        "x_codes": torch.zeros(5, 64, dtype=torch.int8),
        "x_scale": torch.ones(5),
        "codes": torch.zeros(24, 64, dtype=torch.int8),
        "scale": torch.ones(24),
        "bias": torch.zeros(24, dtype=torch.float16),
        "x_low": torch.zeros(5, rank, dtype=torch.float16),
        "up": torch.zeros(24, rank, dtype=torch.float16),
        "residual": torch.zeros(5, 24, dtype=torch.float16),
        "out_dtype": torch.float16,
    }


def conv_inputs():
    arguments = inputs((64, 32)) | {"codes": torch.zeros(N, 96 * math.prod(KERNEL), dtype=torch.int8)}
    return arguments | {"residual": arguments["residual"].contiguous(memory_format=torch.channels_last)}


CALLS = {"w8a8_linear": linear_inputs, "w8a8_conv2d": conv_inputs}


by_both_routes = pytest.mark.parametrize("positions", [False, True], ids=["dispatcher", "shortcut"])


@by_both_routes
@pytest.mark.parametrize("path", ["mma", "wgmma"])
@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_of_a_kind_launches_what_a_first_one_would(name, path, positions, gpu, monkeypatch):
    def launched(arguments):
        result = on_kernels(monkeypatch, name, arguments, positions)
        return result, gpu.params[-1].replace(struct.pack("Q", result.data_ptr()), b"the result's")

    one, other = CALLS[name](), CALLS[name]()
    with _gemm.forced_path(path):
        expected, params = launched(other)
        gpu.forget()
        launched(one)
        asked = len(gpu.kernels)
        result, again = launched(other)
    assert again == params
    assert (result.shape, result.stride(), result.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert len(gpu.kernels) == asked == 2
    assert gpu.kernels[0][0] == f"gemm_{path}"


@by_both_routes
@pytest.mark.parametrize("moved", ["x_codes", "codes", "bias", "residual"])
@pytest.mark.parametrize("how", ["misaligned", "strided"])
def test_a_second_call_copies_what_the_kernels_cannot_read(moved, how, positions, gpu, monkeypatch):
    arguments = linear_inputs()
    wide = torch.zeros(2 * arguments[moved].numel() + 1, dtype=arguments[moved].dtype)
    flat = wide[1 : 1 + arguments[moved].numel()] if how == "misaligned" else wide[:-1:2]
    view = flat.view(arguments[moved].shape)
    with _gemm.forced_path("mma"):
        on_kernels(monkeypatch, "w8a8_linear", arguments, positions)
        for _ in range(3):
            on_kernels(monkeypatch, "w8a8_linear", arguments | {moved: view}, positions)
    assert [len(kinds) for kinds in _shortcut._known.values()] == [1] * positions
    before, after, *_ = (struct.unpack("12Q", params[:96]) for params in gpu.params)
    place = before.index(arguments[moved].data_ptr())
    assert after[place] not in (arguments[moved].data_ptr(), view.data_ptr())
    assert not any(address % 16 for address in after)


@by_both_routes
def test_a_second_call_runs_what_is_forced(positions, gpu, monkeypatch):
    on_kernels(monkeypatch, "w8a8_linear", linear_inputs(), positions)
    for path, tile, expected in (("mma", "64x32", ("gemm_mma", 32)), ("wgmma", "128x96", ("gemm_wgmma", 96))):
        with _gemm.forced_path(path), _gemm.forced_tile(tile):
            on_kernels(monkeypatch, "w8a8_linear", linear_inputs(), positions)
        source, macros = gpu.kernels[-1]
        assert (source, macros["TOKENS"]) == expected
    asked = len(gpu.kernels)
    on_kernels(monkeypatch, "w8a8_linear", linear_inputs(), positions)
    assert len(gpu.kernels) == asked


@pytest.mark.parametrize(("size", "taps", "refused"), [(1 << 32, 1, True), (1 << 15, 3, True), (1 << 15, 1, False)])
def test_the_portable_kernels_offsets_have_32_bits_and_places_in_images_16(size, taps, refused, gpu):
    """Of a row of pixels without taps beside them only the bytes count."""
    values = dict.fromkeys(Problem.__slots__) | {"B": 1, "H": 1, "W": size, "C": 32, "OH": 1, "OW": size, "N": 8}
    values |= {"kernel": (taps, taps), "stride": (1, 1), "padding": (0, 0), "segments": (32,), "weight_kind": 8}
    values |= {"codes": torch.zeros(8, 32, dtype=torch.int8), "x_scale": torch.ones(1, 1)}
    problem = Problem(**values | {"x": torch.zeros(1, dtype=torch.int8).expand(size)})
    out = torch.zeros(1, dtype=torch.int32)
    if refused:
        with pytest.raises(ValueError, match=r"expected less than 4 GiB each, and images of fewer than 32,768 rows"):
            _gemm_mma.prepare(problem, out, _gemm_mma.TILES[0])
    else:
        _gemm_mma.prepare(problem, out, _gemm_mma.TILES[0])
    assert not gpu.params


@pytest.mark.parametrize("path", ["mma", "wgmma"])
@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_runs_few_functions(name, path, gpu, monkeypatch):
    """Each takes as long as a look at two tensors, and a call is to cost the host less than a small kernel the GPU."""
    arguments, called = in_order(name, CALLS[name]()), []
    monkeypatch.setattr(sys.modules[f"qdiff.ops.{name}"], "runs_kernel", lambda op, x, refusal: True)
    with _gemm.forced_path(path):
        for _ in range(2):
            getattr(ops, name)(*arguments)
        sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
        try:
            getattr(ops, name)(*arguments)
        finally:
            sys.setprofile(None)
    assert len(called) < 10, called


@by_both_routes
@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": torch.ones(24).half()},
        {"bias": torch.zeros(25)},
        {"x_low": None},
        {"codes": torch.zeros(24, 64, dtype=torch.uint8)},
        {"residual": torch.zeros(5, 24)},
        {"out_dtype": torch.float32},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_second_call_is_checked(wrong, positions, gpu, monkeypatch):
    on_kernels(monkeypatch, "w8a8_linear", linear_inputs(), positions)
    with pytest.raises(ValueError, match="expected"):
        on_kernels(monkeypatch, "w8a8_linear", linear_inputs() | wrong, positions)
    assert len(gpu.params) == 1


@by_both_routes
def test_what_is_kept_for_a_second_call_keeps_no_tensor_alive(positions, gpu, monkeypatch):
    arguments = linear_inputs()
    left = [
        weakref.ref(on_kernels(monkeypatch, "w8a8_linear", arguments, positions)),
        *map(weakref.ref, list(arguments.values())[:-1]),
    ]
    del arguments
    gc.collect()
    assert not any(ref() is not None for ref in left)
