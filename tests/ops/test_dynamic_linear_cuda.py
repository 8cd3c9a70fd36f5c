"""What `dynamic_linear` launches: the two operators' kernels, with nothing but memory between them; without a GPU."""

import gc
import inspect
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

from qdiff import ops
from qdiff.numerics.packing import pack_int4, pack_multipliers
from qdiff.ops import _cupy, _dynamic_linear_cuda, _gemm, _settled, _shortcut, _tiles, checks

M, N, K = 5, 24, 64
ORDER = list(inspect.signature(ops.dynamic_linear).parameters)[:-2]  # without what has a default


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The launches, on a GPU that takes CPU tensors for its own and computes nothing."""
    launches = []

    def kernel(source, defines):
        def launcher(*shape):
            return lambda *values: launches.append(SimpleNamespace(kernel=(source, defines, *shape[:3]), at=values))

        return SimpleNamespace(launcher=launcher)

    monkeypatch.setattr(_cupy, "kernel", kernel)
    monkeypatch.setattr(_cupy, "capability", lambda device: (9, 0))
    monkeypatch.setattr(_cupy, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(_tiles, "_chosen", {})
    for name in ("dynamic_linear", "quantize_per_token", "w4a8_linear", "w8a8_linear"):
        monkeypatch.setattr(sys.modules[f"qdiff.ops.{name}"], "runs_kernel", lambda op, x, refusal: refusal is None)
    checks.forget()
    _settled.forget()
    with _gemm.forced_path("mma"):
        yield launches
    checks.forget()


def inputs(kind="int4", m=M, k=K, smoothed=True, rank=8, bias=True, dtype=torch.float16):
    group_size = 32 if k % 32 == 0 else 8
    packed = pack_int4(torch.zeros(N, k, dtype=torch.int8), group_size)
    multipliers = pack_multipliers(torch.ones(N, k // group_size, dtype=torch.uint8))
    return {
        "x": torch.zeros(m, k, dtype=dtype),
        "smooth": torch.ones(k) if smoothed else None,
        "down": torch.zeros(rank, k, dtype=torch.float16) if rank else None,
        "codes": torch.zeros(N, k, dtype=torch.int8) if kind == "int8" else packed,
        "multipliers": multipliers if kind == "int4" else None,
        "codebook": torch.zeros(N, 16, dtype=torch.int8) if kind == "codebook" else None,
        "scale": torch.ones(N),
        "group_size": group_size,
        "bias": torch.zeros(N, dtype=torch.float16) if bias else None,
        "up": torch.zeros(N, rank, dtype=torch.float16) if rank else None,
        "out_dtype": torch.float16,
    }


def by_two(x, smooth, down, codes, multipliers, codebook, scale, group_size, bias, up, out_dtype):
    x_codes, x_scale, low = ops.quantize_per_token(x, smooth, down)
    added = (bias, None if down is None else low, up, None)
    if codes.dtype == torch.int8:
        return ops.w8a8_linear(x_codes, x_scale, codes, scale, *added, out_dtype)
    return ops.w4a8_linear(x_codes, x_scale, codes, multipliers, codebook, scale, group_size, *added, out_dtype)


def by_one(arguments, positions=True):
    return ops.dynamic_linear(*arguments.values()) if positions else ops.dynamic_linear(**arguments)


def without_results(launches, y):
    """The launches, whose own tensors have numbers for addresses: what is made between, and 100 for the result."""
    first, second = launches
    made = len(first.at) - (3 if len(second.at) == 12 and second.at[9] else 2)
    numbers = {address: place for place, address in enumerate(first.at[made:])} | {y.data_ptr(): 100}
    return [(launch.kernel, [numbers.get(address, address) for address in launch.at]) for launch in (first, second)]


by_both_routes = pytest.mark.parametrize("positions", [False, True], ids=["dispatcher", "shortcut"])


@by_both_routes
@pytest.mark.parametrize("kind", ["int4", "codebook", "int8"])
@pytest.mark.parametrize(
    ("smoothed", "rank", "bias"), [(False, 0, False), (True, 0, True), (False, 8, True), (True, 32, False)]
)
def test_every_call_launches_what_the_two_operators_do(kind, smoothed, rank, bias, positions, launches):
    arguments = inputs(kind, smoothed=smoothed, rank=rank, bias=bias)
    expected = without_results(launches, by_two(**arguments))
    for _ in range(3):
        launches.clear()
        y = by_one(arguments, positions)
        assert without_results(launches, y) == expected
        assert (y.shape, y.dtype, y.is_contiguous()) == ((M, N), torch.float16, True)


@pytest.mark.parametrize("m", [1, 5, 129])
@pytest.mark.parametrize("rank", [0, 8])
def test_what_is_between_the_kernels_has_room(m, rank, launches, monkeypatch):
    made = []

    def allocator(device):
        def empty(shape, strides, dtype):
            made.append(torch.empty_strided(shape, strides, dtype=dtype))
            return made[-1]

        return empty

    monkeypatch.setattr(_dynamic_linear_cuda, "allocator", allocator)
    for _ in range(2):
        y = by_one(inputs(m=m, rank=rank))
    between, out = made
    assert out is y
    codes, scale, *low = launches[-2].at[-3 if rank else -2 :]
    parts = [(codes, m * K), (scale, 4 * m), *((place, 2 * m * rank) for place in low)]
    assert not any(place % 16 for place, _ in parts)
    ends = [place + size for place, size in parts]
    begins = [place for place, _ in parts[1:]] + [between.data_ptr() + between.numel() * between.element_size()]
    assert parts[0][0] == between.data_ptr()
    assert all(end <= begin for end, begin in zip(ends, begins))


def test_weights_are_waited_for_once(launches, monkeypatch):
    seen, prepare = [], _gemm._gemm_mma.prepare

    def and_tell(*arguments):
        launch = prepare(*arguments)
        return lambda places, early: seen.append(early) or launch(places, early)

    monkeypatch.setattr(_gemm._gemm_mma, "prepare", and_tell)
    one, other = inputs(), inputs()
    for arguments in (one, one, other, other):
        by_one(arguments)
    one["multipliers"].add_(1)
    by_one(one)
    assert seen == [False, True, False, True, False]


def shifted(tensor):
    """The same values, from an address that is no multiple of 16."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


CHANGES = {
    "x anywhere": lambda a: {"x": shifted(a["x"])},
    "smooth anywhere": lambda a: {"smooth": shifted(a["smooth"])},
    "codes anywhere": lambda a: {"codes": shifted(a["codes"])},
    "bias anywhere": lambda a: {"bias": shifted(a["bias"])},
    "x strided": lambda a: {"x": a["x"].t().contiguous().t()},
    "smooth strided": lambda a: {"smooth": a["smooth"].repeat_interleave(2)[::2]},
    "down strided": lambda a: {"down": a["down"].t().contiguous().t()},
    "a branch of another type": lambda a: {"down": a["down"].float()},
    "float32": lambda a: {"x": a["x"].float()},
    "a result of another type": lambda a: {"out_dtype": torch.bfloat16},
    "int32": lambda a: {"out_dtype": torch.int32},
}


@by_both_routes
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_needs_a_copy_goes_one_kernel_after_the_other(change, positions, launches):
    arguments = inputs()
    changed = arguments | change(arguments)
    for given in (changed, arguments, changed, changed):
        y = by_one(given, positions)
    assert y.dtype == changed["out_dtype"]
    sources = [launch.kernel[0] for launch in launches]
    assert sources[1::2] == ["gemm_mma"] * 4
    assert all(source.startswith("quantize_per_token") for source in sources[::2])
    quantize, multiply = launches[-2:]
    assert not any(address % 16 for address in multiply.at)
    tensors = [part for part in changed.values() if isinstance(part, torch.Tensor)]
    for part in (part for part in tensors if part.data_ptr() % 16 or not part.is_contiguous()):
        assert part.data_ptr() not in multiply.at
        assert part.is_contiguous() or part.data_ptr() not in quantize.at
    if changed["down"].dtype != changed["x"].dtype:
        assert changed["down"].data_ptr() not in quantize.at
    if changed["out_dtype"] != changed["x"].dtype:
        assert multiply.at[9] not in quantize.at or multiply.at[9] == 0
    assert multiply.at[0] in quantize.at
    assert multiply.at[-1] == y.data_ptr()
    assert all(len(kinds) <= 2 for kinds in _shortcut._known.values())


@by_both_routes
def test_a_repeated_call_runs_what_is_forced(positions, launches):
    arguments = inputs(rank=0)
    for tile in (None, "64x32", None, "128x64"):
        if tile is None:
            y = by_one(arguments, positions)
            continue
        with _gemm.forced_tile(tile):
            y = by_one(arguments, positions)
        assert f"{dict(launches[-1].kernel[1])['FEATURES']}x{dict(launches[-1].kernel[1])['TOKENS']}" == tile
        assert launches[-1].at[-1] == y.data_ptr()


def test_a_repeated_call_runs_few_functions():
    """Each takes as long as a look at two tensors, and a call is to cost the host less than a small kernel the GPU."""
    arguments, called = list(inputs().values()), []
    for _ in range(2):
        ops.dynamic_linear(*arguments)
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        ops.dynamic_linear(*arguments)
    finally:
        sys.setprofile(None)
    assert len(called) < 10, called


@by_both_routes
@pytest.mark.parametrize(
    "wrong",
    [{"scale": torch.ones(N).half()}, {"bias": torch.zeros(N + 1)}, {"up": None}, {"smooth": torch.ones(K + 1)}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_repeated_call_is_checked(wrong, positions, launches):
    by_one(inputs(), positions)
    with pytest.raises(ValueError, match="expected"):
        by_one(inputs() | wrong, positions)
    assert len(launches) == 2


def test_a_width_that_the_product_does_not_take_is_quantized_by_its_kernel_all_the_same(launches):
    for _ in range(2):
        assert by_one(inputs(k=40, rank=0)).shape == (M, N)
    assert [launch.kernel[0] for launch in launches] == ["quantize_per_token"] * 2


def test_no_rows(launches):
    for _ in range(2):
        assert by_one(inputs(m=0)).shape == (0, N)


@by_both_routes
def test_what_is_kept_keeps_no_tensor_alive(positions):
    arguments = inputs()
    left = [weakref.ref(part) for part in arguments.values() if isinstance(part, torch.Tensor)]
    left += [weakref.ref(by_one(arguments, positions)) for _ in range(2)]
    del arguments
    gc.collect()
    assert not any(ref() is not None for ref in left)
