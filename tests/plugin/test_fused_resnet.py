"""Residual blocks of a quantized UNet: in fewer passes where nobody can tell, as diffusers computes them otherwise."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import qdiff
from qdiff.denoising import StepTracker
from qdiff.layers import QuantConv2d, QuantizedWeights
from qdiff.numerics.gemm_layout import to_gemm
from qdiff.numerics.ranges import LEVELS
from qdiff.numerics.two_level import fit_two_level, round_two_level
from qdiff.ops import backend
from qdiff.plugin.fuse import fuse_blocks
from qdiff.plugin.fused_resnet import FusedResnetBlock2D
from qdiff.recipe import LayerPlan, MethodSpec

pytestmark = pytest.mark.usefixtures("inference")

TEMB = 24


@pytest.fixture
def fused(monkeypatch) -> list[QuantConv2d]:
    """The convolutions that normalized their input, one entry a call."""
    called, forward = [], QuantConv2d.forward_normalized

    def and_tell(layer, *args, **kwargs):
        called.append(layer)
        return forward(layer, *args, **kwargs)

    monkeypatch.setattr(QuantConv2d, "forward_normalized", and_tell)
    return called


def quantized(layer: nn.Conv2d, mode: str = "temporal", bits: int = 8) -> QuantConv2d:
    plan = LayerPlan(
        name="conv",
        kind="conv2d",
        weight_bits=4,
        group_size=16,
        granularity="group",
        activation_bits=16 if mode == "none" else bits,
        range_mode=mode,
        range=MethodSpec("temporal"),
        transforms=(),
        rounding=MethodSpec("nearest"),
        segments=(layer.in_channels,),
    )
    matrix = to_gemm(layer.weight.float(), plan.segments)
    scale, multipliers = fit_two_level(matrix, 16)
    codes = round_two_level(matrix, scale, multipliers, 16)
    table = None if mode == "none" else torch.tensor([[3.0], [4.0]]) / LEVELS
    smooth = torch.rand(layer.in_channels) + 0.5
    made = QuantConv2d.from_float(layer, plan, QuantizedWeights(codes, multipliers, scale, smooth, act_scales=table))
    made.tracker = StepTracker((1.0, 999.0))
    made.tracker.set(400, 2)
    return made


def block_of(dtype: torch.dtype = torch.float32, mode: str = "temporal", bits: int = 8, **options) -> ResnetBlock2D:
    options = {"in_channels": 32, "out_channels": 48, "temb_channels": TEMB, "groups": 8} | options
    block = ResnetBlock2D(**options).to(dtype).eval()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    block.conv1, block.conv2 = quantized(block.conv1, mode, bits), quantized(block.conv2, mode, bits)
    fuse_blocks(block)
    assert type(block) is FusedResnetBlock2D
    return block


def inputs(block: ResnetBlock2D, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor | None]:
    x = 2 * torch.randn(2, block.in_channels, 7, 5) + 1
    temb = None if block.time_emb_proj is None else torch.randn(2, TEMB).to(dtype)
    return x.to(dtype).contiguous(memory_format=torch.channels_last), temb


OPTIONS = {
    "shortcut": {},
    "no shortcut": {"out_channels": 32},
    "no time": {"temb_channels": None},
    "time as it is": {"skip_time_act": True},
    "scaled": {"output_scale_factor": 2.0},
    "wide": {"in_channels": 64, "groups_out": 3},
    "dropout": {"dropout": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_is_the_unfused_block(options, fused):
    block = block_of(**options)
    x, temb = inputs(block)
    expected = ResnetBlock2D.forward(block, x, temb)
    assert not fused
    result = block(x, temb)
    assert fused == [block.conv1, block.conv2]
    # In float32 the epilogue rounds as the modules do, addition by addition.
    assert torch.equal(result, expected)
    # Another order of the pixels is another order of the norms' sums.
    torch.testing.assert_close(block(x.contiguous(), temb), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_is_no_farther_from_float32_than_the_unfused_block(dtype, fused):
    block = block_of(dtype)
    x, temb = inputs(block, dtype)
    exact = copy.deepcopy(block).float()(x.float(), temb.float())
    own, result = ResnetBlock2D.forward(block, x, temb), block(x, temb)
    assert result.dtype == dtype
    errors = [float((y.float() - exact).norm() / exact.norm()) for y in (result, own)]
    assert errors[0] < 1.1 * errors[1] < 0.02


def hook(module_name: str) -> Callable:
    return lambda block: block.get_submodule(module_name).register_forward_hook(lambda *_: None)


def pre_hook(module_name: str) -> Callable:
    return lambda block: block.get_submodule(module_name).register_forward_pre_hook(lambda *_: None)


def replace(name: str, change: Callable) -> Callable:
    return lambda block: setattr(block, name, change(getattr(block, name)))


def offload(block: ResnetBlock2D) -> None:
    """As accelerate and diffusers do: their `forward` over the class's, on the module itself."""
    block.conv1.forward = block.conv1.forward


class OtherNorm(nn.GroupNorm):
    pass


DAMAGE = {
    **{f"a hook on {name}": hook(name) for name in ("norm1", "nonlinearity", "conv1", "norm2", "dropout", "conv2")},
    "a pre-hook on conv2": pre_hook("conv2"),
    "a forward of its own": offload,
    "a wrapped convolution": replace("conv1", nn.Sequential),
    "another norm": replace("norm2", lambda norm: OtherNorm(8, norm.num_channels)),
    "another activation": replace("nonlinearity", lambda _: nn.GELU()),
    "a norm of another dtype": replace("norm2", lambda norm: norm.double()),
    "float convolution": replace("conv2", lambda conv: nn.Conv2d(48, 48, 3, padding=1)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_is_diffusers_own_where_something_is_in_between(damage, fused):
    block = block_of()
    damage(block)
    x, temb = inputs(block)
    try:
        expected = ResnetBlock2D.forward(block, x, temb)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            block(x, temb)
    else:
        assert torch.equal(block(x, temb), expected)
    assert not fused


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "none"},
        {"bits": 6},
        {"up": True},
        {"down": True},
        {"time_embedding_norm": "scale_shift"},
    ],
    ids=str,
)
def test_is_diffusers_own_for_other_blocks(options, fused):
    block = block_of(**options)
    x, temb = inputs(block)
    assert torch.equal(block(x, temb), ResnetBlock2D.forward(block, x, temb))
    assert not fused


def test_a_residual_of_other_channels_is_diffusers_error(fused):
    block = block_of()
    block.conv_shortcut = None
    with pytest.raises(RuntimeError, match="size of tensor"):
        block(*inputs(block))
    assert not fused


def test_is_diffusers_own_in_states_that_would_show(fused):
    block = block_of(dropout=0.5)
    x, temb = inputs(block)
    block.dropout.train()
    block(x, temb)
    block.dropout.eval()
    with torch.enable_grad():
        block(x, temb)
    with torch.autocast("cpu", torch.bfloat16):
        block(x, temb)
    handle = register_module_forward_hook(lambda *_: None)
    block(x, temb)
    handle.remove()
    block(x, temb[:1])
    with pytest.warns(FutureWarning, match="scale"):
        block(x, temb, scale=1.0)
    assert not fused
    block(x, temb)
    assert len(fused) == 2


def test_only_plain_blocks_are_fused():
    class Own(ResnetBlock2D):
        pass

    blocks = nn.ModuleList([Own(in_channels=32), ResnetBlock2D(in_channels=32)])
    fuse_blocks(blocks)
    assert [type(block) for block in blocks] == [Own, FusedResnetBlock2D]
    assert all(isinstance(block, ResnetBlock2D) for block in blocks)


def test_compiles_whole(fused):
    block = block_of()
    x, temb = inputs(block)
    expected = block(x, temb)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    assert torch.equal(torch.compile(block, fullgraph=True, backend=keep)(x, temb), expected)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called.count("qdiff.quantize_group_norm.default") == 2
    assert not any("group_norm" in name and "qdiff" not in name for name in called)


def test_survives_copies(fused):
    block = block_of()
    x, temb = inputs(block)
    expected = block(x, temb)
    copies = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), copy.deepcopy(block).half().float()]
    for again in copies[:2]:
        again.load_state_dict(block.state_dict())
        assert torch.equal(again(x, temb), expected)
    copies[2](x, temb)
    assert len(fused) == 8


def test_pipelines(quantized_sd, generate, fused, tmp_path):
    pipe = quantized_sd()
    blocks = [module for module in pipe.unet.modules() if isinstance(module, ResnetBlock2D)]
    assert {type(block) for block in blocks} == {FusedResnetBlock2D}
    images = generate(pipe)
    assert len(fused) == 3 * 2 * len(blocks)
    qdiff.save(pipe, tmp_path / "saved")
    loaded = qdiff.load(tmp_path / "saved")
    assert torch.equal(generate(loaded), images)
    assert len(fused) == 2 * 3 * 2 * len(blocks)
    for block in blocks:
        block.__class__ = ResnetBlock2D
    assert (generate(pipe) - images).abs().max() < 0.05
    assert len(fused) == 2 * 3 * 2 * len(blocks)


def test_lora(quantized_sd, generate, fused):
    pipe = quantized_sd()
    images, before = generate(pipe), len(fused)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["conv1"]))
    # A branch of zeros: the same pictures, by diffusers' own blocks.
    assert (generate(pipe) - images).abs().max() < 0.05
    assert len(fused) == before
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), images)
    assert len(fused) == 2 * before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_on_a_gpu(options, dtype, fused):
    block = block_of(dtype, **options)
    x, temb = inputs(block, dtype)
    expected = block(x, temb)
    block.cuda()
    for layer in (block.conv1, block.conv2):
        layer.tracker.set(torch.tensor(400.0, device="cuda"), 2)
    x, temb = x.cuda(), None if temb is None else temb.cuda()
    with backend.use_backend("cuda"):
        result = block(x, temb)
        own = ResnetBlock2D.forward(block, x, temb)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = block(x, temb)
        graph.replay()
    assert torch.equal(again, result)
    assert len(fused) == 6
    for other in (expected.cuda(), own):
        assert float((result - other).norm() / other.norm()) < 0.02
