import inspect

import pytest
import torch

from qdiff.numerics.packing import pack_int4, pack_multipliers
from qdiff.ops import dynamic_linear, quantize_per_token, w4a8_linear, w8a8_linear
from qdiff.ops.activation import activate

KINDS = ("int4", "codebook", "int8")
ORDER = list(inspect.signature(dynamic_linear).parameters)[:-2]  # without what has a default
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


def inputs(kind="int4", shape=(6, 40), n=5, dtype=FULL, smoothed=True, rank=3, bias=True, out_dtype=None):
    """The arguments in their order, and the integers [n, K] that the weights stand for."""
    generator, k, group_size = torch.Generator().manual_seed(0), shape[-1], 8
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=generator)
    multipliers = torch.randint(1, 16, (n, k // group_size), generator=generator).to(torch.uint8)
    codebook = torch.randint(-127, 128, (n, 16), dtype=torch.int8, generator=generator)
    eight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    codes = eight if kind == "int8" else pack_int4(q, group_size)
    arguments = {
        "x": torch.randn(shape, generator=generator).to(dtype),
        "smooth": torch.rand(k, generator=generator) + 0.5 if smoothed else None,
        "down": torch.randn(rank, k, generator=generator).half() if rank else None,
        "codes": codes,
        "multipliers": pack_multipliers(multipliers) if kind == "int4" else None,
        "codebook": codebook if kind == "codebook" else None,
        "scale": (torch.rand(n, generator=generator) + 0.5) / (70 * k**0.5),
        "group_size": group_size,
        "bias": torch.randn(n, generator=generator) if bias else None,
        "up": torch.randn(n, rank, generator=generator).half() if rank else None,
        "out_dtype": out_dtype or dtype,
    }
    assert list(arguments) == ORDER
    integers = {
        "int4": q.long() * multipliers.long().repeat_interleave(group_size, 1),
        "codebook": codebook.gather(1, q.long() + 8).long(),
        "int8": eight.long(),
    }
    return arguments, integers[kind]


def by_two(x, smooth, down, codes, multipliers, codebook, scale, group_size, bias, up, out_dtype, residual=None):
    """What a layer that calls the two operators gets."""
    x_codes, x_scale, low = quantize_per_token(x, smooth, down)
    rest = {"scale": scale, "bias": bias, "up": up, "residual": residual, "out_dtype": out_dtype}
    rest["x_low"] = None if down is None else low.to(out_dtype)
    if codes.dtype == torch.int8:
        return w8a8_linear(x_codes=x_codes, x_scale=x_scale, codes=codes, **rest)
    packed = {"codes": codes, "multipliers": multipliers, "codebook": codebook, "group_size": group_size}
    return w4a8_linear(x_codes=x_codes, x_scale=x_scale, **packed, **rest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40,), (1, 40), (6, 40), (2, 3, 24), (301, 56), (0, 8)], ids=str)
@pytest.mark.parametrize(
    ("smoothed", "rank", "bias"), [(False, 0, False), (True, 0, True), (False, 3, True), (True, 3, False)]
)
def test_is_the_two_operators_bit_for_bit(kind, shape, smoothed, rank, bias):
    for dtype, out_dtype in ((HALF, HALF), (BRAIN, BRAIN), (FULL, FULL), (FULL, HALF), (HALF, BRAIN)):
        arguments, _ = inputs(kind, shape, 7, dtype, smoothed, rank, bias, out_dtype)
        got, expected = dynamic_linear(**arguments), by_two(**arguments)
        assert got.shape == (*shape[:-1], 7)
        assert got.dtype == out_dtype
        assert got.is_contiguous()
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_float64_product_up_to_the_rounding_of_the_input(kind):
    arguments, integers = inputs(kind, (300, 640), 50)
    v = arguments["x"].double() * arguments["smooth"].double()
    exact = v @ (integers.double() * arguments["scale"].double()[:, None]).t()
    added = arguments["bias"].double() + v @ arguments["down"].double().t() @ arguments["up"].double().t()
    got = dynamic_linear(**arguments).double() - added
    # The largest of 640 normal values is about 3.5: 127 steps of it lose 0.3 steps rms each, 0.8 % of unit variance.
    assert 0.001 < float((got - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40,), (2, 3, 40), (0, 40)], ids=str)
def test_int32_gives_the_accumulators(kind, shape):
    arguments, integers = inputs(kind, shape, out_dtype=torch.int32)
    arguments["scale"].fill_(float("nan"))
    codes = quantize_per_token(arguments["x"], arguments["smooth"], None)[0]
    result = dynamic_linear(**arguments)
    assert result.dtype == torch.int32
    assert torch.equal(result.long(), codes.long() @ integers.t())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "geglu"])
@pytest.mark.parametrize("rank", [0, 3])
def test_an_activation_before_and_a_residual_after(kind, activation, rank):
    for dtype in (HALF, FULL):
        arguments, _ = inputs(kind, (2, 3, 40), 7, dtype, rank=rank)
        if activation == "geglu":
            arguments["x"] = torch.cat([arguments["x"], arguments["x"].flip(1)], -1)
        residual = torch.randn(2, 3, 7).to(dtype)
        got = dynamic_linear(**arguments, activation=activation, residual=residual)
        expected = by_two(**arguments | {"x": activate(arguments["x"], activation)}, residual=residual)
        assert torch.equal(got, expected)
        torch.library.opcheck(torch.ops.qdiff.dynamic_linear.default, (*arguments.values(), activation, residual))


def test_wrong_activations_and_residuals():
    arguments, _ = inputs()
    for changes, message in (
        ({"activation": "relu"}, "activation: got 'relu'"),
        ({"activation": "geglu"}, r"smooth: got .*\(40,\)"),
        ({"residual": torch.zeros(6, 4)}, r"residual: got .*\(6, 4\)"),
        ({"residual": torch.zeros(6, 5).half()}, "residual: got torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            dynamic_linear(**arguments | changes)


def test_strides_do_not_matter_and_the_input_is_not_changed():
    arguments, _ = inputs(shape=(4, 6, 40))
    x = arguments["x"].transpose(0, 1)[::2]
    before = x.clone()
    assert torch.equal(dynamic_linear(**arguments | {"x": x}), dynamic_linear(**arguments | {"x": before}))
    assert torch.equal(x, before)


def test_opcheck():
    operator = torch.ops.qdiff.dynamic_linear.default
    for kind in KINDS:
        torch.library.opcheck(operator, tuple(inputs(kind)[0].values()))
    for changes in ({"rank": 0, "smoothed": False, "bias": False}, {"out_dtype": BRAIN}, {"shape": (2, 3, 16)}):
        torch.library.opcheck(operator, tuple(inputs(**changes)[0].values()))


def test_compiles_whole():
    arguments, _ = inputs("codebook", (2, 9, 40), dtype=HALF)
    x, *rest = arguments.values()
    compiled = torch.compile(lambda x: dynamic_linear(x, *rest) + 1, fullgraph=True, backend="aot_eager")
    for rows in (9, 10, 11):
        x = torch.randn(2, rows, 40).half()
        assert torch.equal(compiled(x), dynamic_linear(x, *rest) + 1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(6, 40, dtype=torch.int8)}, "x: got"),
        ({"x": torch.zeros(6, 0)}, "x: got"),
        ({"smooth": torch.ones(39)}, "smooth: got"),
        ({"smooth": torch.ones(40).half()}, "smooth: got"),
        ({"down": torch.zeros(3, 39)}, "down: got"),
        ({"down": None}, "down, up: got"),
        ({"up": None}, "down, up: got"),
        ({"up": torch.zeros(5, 4)}, "up: got"),
        ({"up": torch.zeros(4, 3)}, "up: got"),
        ({"codes": torch.zeros(5, 40, dtype=torch.uint8)}, "codes: got"),
        ({"codes": torch.zeros(5, 40, dtype=torch.int8)}, "codes: got"),
        ({"multipliers": None}, "multipliers, codebook: got neither"),
        ({"multipliers": torch.zeros(5, 5, dtype=torch.uint8)}, "multipliers: got"),
        ({"codebook": torch.zeros(5, 16, dtype=torch.int8)}, "multipliers, codebook: got both"),
        ({"multipliers": None, "codes": torch.zeros(5, 20, dtype=torch.int8)}, "codes: got"),
        ({"scale": torch.ones(4)}, "scale: got"),
        ({"group_size": 7}, "group_size: got"),
        ({"bias": torch.ones(4)}, "bias: got"),
        ({"out_dtype": torch.int8}, "out_dtype: got"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(change, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        dynamic_linear(**inputs()[0] | change)
