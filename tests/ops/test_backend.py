import sys
import warnings

import pytest
import torch

from qdiff import ops
from qdiff.ops import _cupy, _gemm, _quantize_cuda, _w4a16_cuda, backend, set_backend, use_backend
from qdiff.ops.checks import Checked

LINEAR = {
    "x_codes": torch.zeros(2, 32, dtype=torch.int8),
    "x_scale": torch.ones(2),
    "codes": torch.zeros(4, 32, dtype=torch.int8),
    "scale": torch.ones(4),
    "bias": None,
    "x_low": None,
    "up": None,
    "residual": None,
    "out_dtype": torch.float32,
}
FOUR_BIT = {
    "codes": torch.zeros(4, 16, dtype=torch.uint8),
    "multipliers": torch.full((4, 1), 0x11, dtype=torch.uint8),
    "codebook": None,
    "scale": torch.ones(4),
    "group_size": 32,
    "bias": None,
}
CONV = {
    "x_codes": torch.zeros(2, 32, 3, 3, dtype=torch.int8),
    "x_scale": torch.ones(2, 1),
    "codes": torch.zeros(4, 32, dtype=torch.int8),
    "scale": torch.ones(4),
    "bias": None,
    "shift": None,
    "residual": None,
    "kernel": [1, 1],
    "stride": [1, 1],
    "padding": [0, 0],
    "segments": [32],
    "out_dtype": torch.float16,
}


def with_four_bit(arguments):
    """The 4-bit operator's arguments, in its order, from the 8-bit operator's."""
    names = list(arguments)
    rest = {name: arguments[name] for name in names[5:]}
    return {name: arguments[name] for name in names[:2]} | FOUR_BIT | rest


class OnGpu:
    """What `runs_kernel` asks a tensor."""

    is_cuda, device = True, torch.device("cuda", 1)

    def get_device(self):
        return 1


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test starts on "auto", with nothing warned of, on a machine whose device is usable."""
    monkeypatch.setattr(backend, "_told", set())
    monkeypatch.setattr(_cupy, "unusable", lambda index: None)
    with use_backend("auto"):
        yield


def test_a_usable_device_and_a_problem_that_fits_run_the_kernel():
    assert backend.runs_kernel("op", OnGpu(), None)


@pytest.mark.parametrize("name", ["auto", "cuda", "reference"])
def test_tensors_elsewhere_run_the_reference(name):
    with use_backend(name), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backend.runs_kernel("op", torch.zeros(1), "a reason")


def test_the_reference_can_be_forced_without_a_word():
    with use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backend.runs_kernel("op", OnGpu(), None)
        assert not backend.runs_kernel("op", OnGpu(), "a reason")


def test_a_fall_back_is_told_once_for_each_reason():
    with pytest.warns(RuntimeWarning, match="no kernel for op: a reason; the reference runs"):
        assert not backend.runs_kernel("op", OnGpu(), "a reason")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backend.runs_kernel("op", OnGpu(), "a reason")
    with pytest.warns(RuntimeWarning, match="another"):
        backend.runs_kernel("op", OnGpu(), "another reason")


def test_an_unusable_device_is_told_once_for_all_operators(monkeypatch):
    monkeypatch.setattr(_cupy, "unusable", lambda index: "no CuPy")
    with pytest.warns(RuntimeWarning, match="no kernel for cuda:1: no CuPy"):
        assert not backend.runs_kernel("one", OnGpu(), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not backend.runs_kernel("other", OnGpu(), None)


@pytest.mark.parametrize("refusal", ["a reason", None])
def test_kernels_can_be_forced_and_then_say_why_not(monkeypatch, refusal):
    with use_backend("cuda"):
        assert backend.runs_kernel("op", OnGpu(), None)
        monkeypatch.setattr(_cupy, "unusable", lambda index: "a reason")
        with pytest.raises(RuntimeError, match=r"no kernel for .*: a reason"):
            backend.runs_kernel("op", OnGpu(), refusal)


def test_a_name_that_is_none():
    with pytest.raises(ValueError, match="got 'gpu', expected one of auto, cuda, reference"):
        set_backend("gpu")


def test_use_backend_restores_what_was_set_also_after_an_error():
    set_backend("cuda")
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backend._backend == "cuda"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (backend.refuses_linear(64, 32, True), None),
        (backend.refuses_linear(64, 64, False), None),
        (backend.refuses_linear(48, 16, False), "width 48"),
        (backend.refuses_linear(0, 32, True), "width 0"),
        (backend.refuses_linear(64, 16, True), "group_size 16"),
        (backend.refuses_conv([4, 40, 32, 7]), None),
        (backend.refuses_conv([32] * 5), "5 channel segments"),
    ],
)
def test_what_the_kernels_take(reason, expected):
    assert reason is None if expected is None else expected in reason


@pytest.fixture
def calls(monkeypatch):
    """What the kernels were called with, in a process that believes that CPU tensors can run them."""
    calls = {}
    result = torch.zeros(1)

    def kernel(name, result):
        def run(*args):
            calls[name] = [value for value in args if not isinstance(value, Checked)]
            return result

        return run

    kernels = {
        _gemm: {"linear": result, "conv2d": result},
        _quantize_cuda: {
            "quantize_per_token": (result, result, result),
            "quantize_layer_norm": (result, result),
            "quantize_per_sample": result,
        },
        _w4a16_cuda: {"linear": result},
    }
    for module, results in kernels.items():
        for name, value in results.items():
            monkeypatch.setattr(module, name, kernel(name, value))
    for name in ops.__all__:
        module = sys.modules.get(f"qdiff.ops.{name}")
        if hasattr(module, "runs_kernel"):
            monkeypatch.setattr(module, "runs_kernel", lambda op, x, refusal: refusal is None)
    return calls


def is_same(got, expected):
    return len(got) == len(expected) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(got, expected)
    )


def test_what_the_kernel_of_a_linear_operator_is_given(calls):
    ops.w8a8_linear(**LINEAR)
    given = dict(LINEAR)
    assert is_same(calls["linear"], [*list(given.values())[:3], None, None, *list(given.values())[3:]])
    given = with_four_bit(LINEAR)
    ops.w4a8_linear(**given)
    del given["group_size"]
    assert is_same(calls["linear"], list(given.values()))


def test_what_the_kernel_of_a_convolution_is_given(calls):
    ops.w8a8_conv2d(**CONV)
    given = dict(CONV)
    assert is_same(calls["conv2d"], [*list(given.values())[:3], None, None, *list(given.values())[3:]])
    given = with_four_bit(CONV)
    ops.w4a8_conv2d(**given)
    del given["group_size"]
    assert is_same(calls["conv2d"], list(given.values()))


def test_what_the_other_kernels_are_given(calls):
    x, smooth, down = torch.zeros(2, 32), torch.ones(32), torch.ones(3, 32)
    ops.quantize_per_token(x, smooth, down)
    assert is_same(calls["quantize_per_token"], [x, smooth, down, "none"])
    ops.quantize_layer_norm(x, smooth, None, 1e-5, None)
    assert is_same(calls["quantize_layer_norm"], [x, smooth, None, 1e-5, None])
    ops.quantize_per_sample(x, torch.ones(1, 1), smooth, [32], 1)
    assert is_same(calls["quantize_per_sample"], [x, torch.ones(1, 1), smooth, [32], 1])
    packed = (x, smooth, *FOUR_BIT.values(), None, None)
    ops.w4a16_linear(*packed)
    assert is_same(calls["linear"], packed)


def test_wrong_arguments_and_problems_that_do_not_fit_never_reach_a_kernel(calls):
    with pytest.raises(ValueError, match="scale"):
        ops.w8a8_linear(**LINEAR | {"scale": torch.ones(5)})
    narrow = {"x_codes": torch.zeros(2, 8, dtype=torch.int8), "codes": torch.zeros(4, 8, dtype=torch.int8)}
    assert ops.w8a8_linear(**LINEAR | narrow).shape == (2, 4)
    assert not calls
