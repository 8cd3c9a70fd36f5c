"""What a second call of a quantizer or of `w4a16_linear` keeps of the first; without a GPU."""

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

from qdiff import ops
from qdiff.numerics.packing import pack_int4, pack_multipliers
from qdiff.ops import _cupy, _settled, _w4a16_cuda, checks

K = 64


@pytest.fixture
def launched(monkeypatch):
    """The launches, on a GPU of capability 9.0 that takes CPU tensors for its own."""
    launches = []

    def kernel(source, defines):
        def launcher(grid, threads, shared_bytes, layout, rest, cluster=0):
            shape = (source, defines, grid, threads, shared_bytes)
            return lambda *values: launches.append((*shape, layout.pack(*values) + rest))

        return SimpleNamespace(launcher=launcher)

    monkeypatch.setattr(_cupy, "kernel", kernel)
    monkeypatch.setattr(_cupy, "capability", lambda device: (9, 0))
    monkeypatch.setattr(_cupy, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(_w4a16_cuda, "_shared_limit", lambda device: 227 << 10)
    for name in CALLS:
        monkeypatch.setattr(sys.modules[f"qdiff.ops.{name}"], "runs_kernel", lambda op, x, refusal: True)
    checks.forget()
    yield launches
    checks.forget()


def token(down=True):
    x = torch.zeros(5, K, dtype=torch.float16)
    return {"x": x, "smooth": torch.ones(K), "down": torch.zeros(8, K, dtype=torch.float16) if down else None}


def sample():
    x = torch.zeros(2, K, 4, 2, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    return {"x": x, "scale": torch.ones(2, 2), "smooth": torch.ones(K), "segments": [48, 16], "channel_dim": 1}


def few_rows():
    return {
        "x": torch.zeros(3, K, dtype=torch.float16),
        "smooth": torch.ones(K),
        "codes": pack_int4(torch.zeros(24, K, dtype=torch.int8), 32),
        "multipliers": pack_multipliers(torch.ones(24, K // 32, dtype=torch.uint8)),
        "codebook": None,
        "scale": torch.ones(24),
        "group_size": 32,
        "bias": torch.zeros(24, dtype=torch.float16),
        "down": None,
        "up": None,
    }


ROUTES = {
    "dispatcher": lambda name, arguments: getattr(ops, name)(**arguments),
    "shortcut": lambda name, arguments: getattr(ops, name)(*arguments.values()),
}
CALLS = {"quantize_per_token": token, "quantize_per_sample": sample, "w4a16_linear": few_rows}


def without_results(launch, results):
    """A launch, where what it writes is called the result's."""
    *rest, params = launch
    for result in results if isinstance(results, tuple) else (results,):
        params = params.replace(bytes(ctypes.c_uint64(result.data_ptr())), b"a result")
    return *rest, params


@pytest.mark.parametrize("call", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_of_a_kind_launches_what_a_first_one_would(name, call, launched, monkeypatch):
    one, other = CALLS[name](), CALLS[name]()
    result = call(name, other)
    expected = without_results(launched[-1], result)
    checks.forget()
    _settled.forget()
    call(name, one)
    monkeypatch.setattr(_cupy, "kernel", None)  # nobody asks for it again
    again = call(name, other)
    assert without_results(launched[-1], again) == expected
    assert expected[-1].count(b"a result") == (3 if isinstance(result, tuple) else 1)


@pytest.mark.parametrize("call", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("name", CALLS)
def test_every_call_of_a_kind_has_a_result_of_its_own(name, call, launched):
    arguments = CALLS[name]()
    first, second = call(name, arguments), call(name, arguments)
    for a, b in zip(first, second) if isinstance(first, tuple) else [(first, second)]:
        assert a.data_ptr() != b.data_ptr()
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("call", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize(
    ("name", "make", "vectors"),
    [("quantize_per_token", lambda: token(False), "VECTORS"), ("quantize_per_sample", sample, "VALUES")],
)
def test_a_view_of_the_kind_that_starts_anywhere_is_read_value_by_value(name, make, vectors, call, launched):
    arguments = make()
    shifted = torch.ones(K + 1)[1:]
    for smooth in (arguments["smooth"], shifted, arguments["smooth"]):
        call(name, arguments | {"smooth": smooth})
    aligned, anywhere, again = (dict(launch[1])[vectors] for launch in launched)
    assert aligned == again > anywhere


@pytest.mark.parametrize("call", ROUTES.values(), ids=ROUTES)
def test_a_branch_of_another_type_is_cast_at_every_call(call, launched):
    arguments = token()
    arguments["down"] = arguments["down"].float()
    for _ in range(3):
        call("quantize_per_token", arguments)
    down = bytes(ctypes.c_uint64(arguments["down"].data_ptr()))
    assert [down in params for *_, params in launched] == [False] * 3


@pytest.mark.parametrize("call", ROUTES.values(), ids=ROUTES)
def test_weights_of_few_rows_that_start_anywhere_are_the_references(call, launched):
    arguments = few_rows()
    call("w4a16_linear", arguments)
    y = call("w4a16_linear", arguments | {"scale": torch.ones(25)[1:]})
    assert len(launched) == 1
    assert torch.equal(y, torch.zeros(3, 24, dtype=torch.float16))


@pytest.mark.parametrize("call", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize(("name", "wrong"), [("quantize_per_sample", "scale"), ("w4a16_linear", "scale")])
def test_wrong_arguments_are_seen_after_right_ones(name, wrong, call, launched):
    arguments = CALLS[name]()
    call(name, arguments)
    with pytest.raises(ValueError, match=wrong):
        call(name, arguments | {wrong: arguments[wrong].half()})
    assert len(launched) == 1
