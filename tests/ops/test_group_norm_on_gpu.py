"""The group norm's kernels, with codes and without, against float64.

Not against torch on the same GPU: in groups of few pixels and with large means, torch's own is outside the bound.

Where diffusers is not installed: `pytest -m gpu --confcutdir=tests/ops tests/ops/test_group_norm_on_gpu.py`.
"""

import importlib.util
import random
from pathlib import Path

import pytest
import torch

from qdiff.ops import backend, group_norm, quantize_group_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `pytest -m gpu` on one"),
]
_spec = importlib.util.spec_from_file_location("group_norm_bound", Path(__file__).parent / "group_norm_bound.py")
bound = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bound)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Images, groups and channel segments: SDXL's, small ones, and such as the 8-value chunks do not fit.
PROBLEMS = {
    "320": ((2, 320, 128, 128), 32, [320]),
    "640 + 320": ((2, 960, 128, 128), 32, [640, 320]),
    "640": ((2, 640, 64, 64), 32, [640]),
    "1280 + 640": ((2, 1920, 64, 64), 32, [1280, 640]),
    "1280": ((2, 1280, 32, 32), 32, [1280]),
    "1280 + 1280": ((2, 2560, 32, 32), 32, [1280, 1280]),
    "8x8": ((1, 1280, 8, 8), 32, [1280]),
    "odd sizes": ((3, 64, 37, 11), 8, [64]),
    "one pixel": ((3, 64, 1, 1), 8, [64]),
    "no multiple of 8": ((2, 30, 17, 9), 5, [12, 18]),
    "many segments": ((1, 40, 12, 5), 4, [4] * 10),
    "a wide group": ((1, 2048, 9, 9), 1, [2048]),
    "groups of one": ((2, 2048, 3, 3), 2048, [2048]),
}


@pytest.fixture(autouse=True)
def kernels_only():
    """A call that would run the reference on the GPU raises."""
    torch.manual_seed(0)
    random.seed(0)
    with backend.use_backend("cuda"):
        yield


def arguments_of(x, groups, segments, affine=True, rows=1, silu=True):
    channels, device = x.shape[1], x.device
    weight, bias = (torch.randn(2, channels, device=device).to(x.dtype)) if affine else (None, None)
    scale = torch.rand(rows, len(segments), device=device) / 50 + 0.005
    smooth = torch.rand(channels, device=device) + 0.5 if affine else None
    return x, groups, weight, bias, 1e-5, silu, scale, smooth, segments


def image(shape, dtype):
    """Channels with means and deviations of their own."""
    by_channel = torch.randn(2, shape[1], 1, 1, device="cuda")
    x = torch.randn(shape, device="cuda") * by_channel[0].exp() + 2 * by_channel[1]
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def check(arguments):
    codes = quantize_group_norm(*arguments)
    bound.assert_codes_near(codes, *arguments)
    return codes


def check_values(arguments):
    values = group_norm(*arguments)
    bound.assert_values_near(values, *arguments)
    with backend.use_backend("reference"):
        reference = group_norm(*arguments)
    assert values.stride() == reference.stride()


@pytest.mark.parametrize(("shape", "groups", "segments"), PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes(shape, groups, segments, dtype):
    x = image(shape, dtype)
    for affine, rows, silu in ((True, shape[0], True), (False, 1, True), (True, 1, False)):
        arguments = arguments_of(x, groups, segments, affine, rows, silu)
        check(arguments)


@pytest.mark.parametrize(("shape", "groups", "segments"), PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(shape, groups, segments, dtype):
    x = image(shape, dtype)
    for affine, silu in ((True, True), (False, True), (True, False)):
        check_values(arguments_of(x, groups, segments, affine, silu=silu)[:6])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(dtype):
    for _ in range(60):
        groups = random.choice((8, 32))
        shape = (random.randint(1, 3), groups * random.randint(1, 24), random.randint(1, 40), random.randint(1, 40))
        cut = random.randint(0, shape[1] - 1)
        segments = [cut, shape[1] - cut] if cut else [shape[1]]
        arguments = arguments_of(image(shape, dtype), groups, segments, rows=shape[0])
        check(arguments)
        check_values(arguments[:6])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["large mean", "constant", "zeros", "outliers", "first pixel"])
def test_inputs_that_are_hard_to_sum(dtype, kind):
    for shape, groups in (((2, 320, 64, 64), 32), ((1, 64, 129, 65), 8)):
        x = torch.randn(shape, device="cuda")
        if kind == "large mean":
            x += 1e3
        elif kind in ("constant", "zeros"):
            x = torch.full_like(x, 37.0 if kind == "constant" else 0.0)
        elif kind == "outliers":
            x[:, ::7, ::5, ::11] = 1e4
        else:
            x[:, :, 0, 0] = 1e4
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        arguments = arguments_of(x, groups, [shape[1]])
        check(arguments)
        check_values(arguments[:6])


@pytest.mark.parametrize("shape", [(2, 320, 33, 31), (2, 44, 9, 7)])
def test_any_strides_and_addresses(shape):
    arguments = arguments_of(image(shape, torch.float16), 4, [shape[1]])
    x, *rest = arguments
    expected = quantize_group_norm(*arguments)
    flat = x.permute(0, 2, 3, 1).flatten()
    moved = torch.cat([flat[:1], flat])[1:].view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
    for other in (x.contiguous(), moved, x.flip(3).flip(3), x):
        for _ in range(2):
            assert torch.equal(quantize_group_norm(other, *rest), expected)
    values = group_norm(*arguments[:6])
    for other in (x.contiguous(), moved, x.flip(3).flip(3), x):
        for _ in range(2):
            assert torch.equal(group_norm(other, *rest[:5]), values)
    shifted = [torch.cat([v[:1], v])[1:] if isinstance(v, torch.Tensor) and v.dim() == 1 else v for v in rest]
    assert torch.equal(quantize_group_norm(x, *shifted), expected)
    assert torch.equal(group_norm(x, *shifted[:5]), values)


def test_results_are_the_same_every_time():
    """What is between the two kernels is in the same memory for all calls."""
    problems = [arguments_of(image((2, 320, 64, 64), torch.float16), 32, [320]) for _ in range(2)]
    problems.append(arguments_of(image((1, 1280, 16, 16), torch.float16), 32, [1280]))
    expected = [quantize_group_norm(*problem) for problem in problems]
    torch.cuda.synchronize()
    results = [quantize_group_norm(*problems[i % 3]) for i in range(300)]
    assert all(torch.equal(result, expected[i % 3]) for i, result in enumerate(results))


@pytest.mark.parametrize("operator", [quantize_group_norm, group_norm], ids=lambda operator: operator.__name__)
def test_in_a_graph_and_compiled(operator):
    x, *rest = arguments_of(image((2, 320, 32, 32), torch.float16), 32, [320])
    rest = rest if operator is quantize_group_norm else rest[:5]
    operator(x, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = operator(x, *rest)
    compiled = torch.compile(lambda x: operator(x, *rest), fullgraph=True)
    for _ in range(3):
        fresh = torch.randn_like(x)
        x.copy_(fresh)
        graph.replay()
        expected = operator(fresh, *rest)
        assert torch.equal(result, expected)
        assert torch.equal(compiled(fresh), expected)


def test_no_samples_and_what_is_refused():
    x = image((2, 2056, 3, 3), torch.float16)
    with pytest.raises(RuntimeError, match="2056 channels a group"):
        quantize_group_norm(*arguments_of(x, 1, [2056]))
    assert quantize_group_norm(*arguments_of(x[:0], 257, [2056])).shape == (0, 2056, 3, 3)
    with pytest.raises(RuntimeError, match="2056 channels a group"):
        group_norm(*arguments_of(x, 1, [2056])[:6])
    assert group_norm(*arguments_of(x[:0], 257, [2056])[:6]).shape == (0, 2056, 3, 3)
