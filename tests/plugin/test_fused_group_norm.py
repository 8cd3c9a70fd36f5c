"""Group norms of a quantized denoiser: by the operator for channels-last images, torch's own for all else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from qdiff.plugin import fused_group_norm
from qdiff.plugin.fuse import fuse_blocks
from qdiff.plugin.fused_group_norm import FusedGroupNorm

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def fused(monkeypatch) -> list[tuple]:
    """The calls of the operator."""
    calls, operator = [], fused_group_norm.group_norm

    def and_tell(*args):
        calls.append(args)
        return operator(*args)

    monkeypatch.setattr(fused_group_norm, "group_norm", and_tell)
    return calls


def norm_of(affine: bool = True, dtype: torch.dtype = torch.float32) -> nn.GroupNorm:
    parent = nn.Sequential(nn.GroupNorm(4, 24, eps=1e-6, affine=affine))
    if affine:
        nn.init.normal_(parent[0].weight)
        nn.init.normal_(parent[0].bias)
    fuse_blocks(parent)
    assert type(parent[0]) is FusedGroupNorm
    return parent[0].to(dtype)


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    x = 2 * torch.randn(2, 24, 5, 3) + 1
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_is_torchs(affine, dtype, fused):
    norm, x = norm_of(affine, dtype), image(dtype)
    expected = nn.GroupNorm.forward(norm, x)
    y = norm(x)
    assert len(fused) == 1
    assert y.stride() == expected.stride()
    assert torch.equal(y, expected)


INPUTS = {
    "another order": lambda x: x.contiguous(),
    "a view": lambda x: x[:, :, ::2],
    "tokens": lambda x: x.flatten(2),
    "float64": lambda x: x.double(),
    "other channels": lambda x: x[:, :20],
}


@pytest.mark.parametrize("change", INPUTS.values(), ids=INPUTS)
def test_is_torchs_own_for_other_inputs(change, fused):
    norm, x = norm_of(), change(image())
    try:
        expected = nn.GroupNorm.forward(norm, x)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            norm(x)
    else:
        y = norm(x)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
    assert not fused


def test_is_torchs_own_in_states_that_would_show(fused):
    norm, x = norm_of(), image()
    with torch.enable_grad():
        norm(x).sum().backward()
    assert norm.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        norm(x)
    norm(image(torch.bfloat16))  # of float32 weights
    assert not fused
    norm(x)
    assert len(fused) == 1


def test_hooks_are_called(fused):
    norm, seen = norm_of(), []
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    y = norm(image())
    assert seen[0] is y
    assert len(fused) == 1


def test_only_torchs_class_is_fused():
    class Own(nn.GroupNorm):
        pass

    norms = nn.Sequential(Own(4, 24), nn.GroupNorm(4, 24))
    fuse_blocks(norms)
    assert [type(norm) for norm in norms] == [Own, FusedGroupNorm]


def test_compiles_whole():
    norm, x = norm_of(), image()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    assert torch.equal(torch.compile(norm, fullgraph=True, backend=keep)(x), norm(x))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert "qdiff.group_norm.default" in called


def test_survives_copies(fused):
    norm, x = norm_of(), image()
    expected = norm(x)
    for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        again.load_state_dict(norm.state_dict())
        assert torch.equal(again(x), expected)
    copy.deepcopy(norm).half()(x.half())
    assert len(fused) == 4


def test_pipelines(quantized_sd, generate, fused):
    pipe = quantized_sd()
    norms = [module for module in pipe.unet.modules() if isinstance(module, nn.GroupNorm)]
    assert {type(norm) for norm in norms} == {FusedGroupNorm}
    images = generate(pipe)
    assert fused
    for norm in norms:
        norm.__class__ = nn.GroupNorm
    assert torch.equal(generate(pipe), images)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype, fused):
    norm, x = norm_of(dtype=dtype), image(dtype)
    expected, norm, x = norm(x).cuda(), norm.cuda(), x.cuda()
    y = norm(x)
    assert len(fused) == 2
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=torch.finfo(dtype).eps + 1e-5)
