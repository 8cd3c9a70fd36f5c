import inspect

import pytest
import torch

from qdiff import ops
from qdiff.ops import low_rank_down, quantize_per_token, w8a8_linear

OPERATORS = [name for name in ops.__all__ if not name.endswith("_backend")]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_torchs_and_documented(name):
    operator, overload = getattr(ops, name), getattr(torch.ops.qdiff, name).default
    assert "Args:" in operator.__doc__
    assert operator.__doc__ == overload.__doc__
    assert list(inspect.signature(operator).parameters) == [argument.name for argument in overload._schema.arguments]


def linear(x, weight):
    codes, scale, _ = quantize_per_token(x, None, None)
    return w8a8_linear(codes, scale, weight, torch.ones(4), None, None, None, None, x.dtype)


def test_keywords_and_positions_are_the_same():
    x, down = torch.randn(2, 8), torch.randn(3, 8)
    assert torch.equal(low_rank_down(x, None, down), low_rank_down(down=down, smooth=None, x=x))


def test_compiles_whole():
    x, weight = torch.randn(3, 8), torch.randint(-9, 9, (4, 8), dtype=torch.int8)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), linear(x, weight))


@pytest.mark.filterwarnings("ignore:Error detected in _NoGradientBackward")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_trainable_input_gives_a_result_and_an_error_instead_of_a_gradient(compiled):
    x, down = torch.randn(2, 8), torch.randn(3, 8)
    trainable = x.clone().requires_grad_()

    def run():
        call = torch.compile(low_rank_down, fullgraph=True, backend="aot_eager") if compiled else low_rank_down
        return call(trainable, None, down)

    if not compiled:
        assert torch.equal(run().detach(), low_rank_down(x, None, down))
    with pytest.raises(RuntimeError, match=r"qdiff\.low_rank_down.* has no gradient"):
        run().sum().backward()
    with torch.no_grad():
        assert not run().requires_grad


def test_integer_results_of_a_trainable_input_are_constants():
    codes, _, _ = quantize_per_token(torch.randn(2, 8).requires_grad_(), None, None)
    assert not codes.requires_grad
