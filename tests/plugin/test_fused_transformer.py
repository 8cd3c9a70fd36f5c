"""Transformer and feed-forward blocks: in fewer passes where nobody can tell, as diffusers computes them otherwise."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import qdiff
from qdiff.layers import QuantizedWeights, QuantLinear
from qdiff.numerics.two_level import fit_two_level, round_two_level
from qdiff.ops import backend
from qdiff.plugin.fuse import fuse_blocks
from qdiff.plugin.fused_feed_forward import FusedFeedForward
from qdiff.plugin.fused_transformer import FusedTransformerBlock
from qdiff.recipe import LayerPlan, MethodSpec

pytestmark = pytest.mark.usefixtures("inference")

DIM, TEXT = 64, 32


@pytest.fixture
def fused(monkeypatch) -> list[str]:
    """The calls of layers that left a pass out: of codes ("quantized"), or after an activation."""
    calls, quantized, activated = [], QuantLinear.forward_quantized, QuantLinear.forward_activated

    def of_codes(layer, *args, **kwargs):
        calls.append("quantized")
        return quantized(layer, *args, **kwargs)

    def after(layer, x, activation, *args):
        calls.append(activation)
        return activated(layer, x, activation, *args)

    monkeypatch.setattr(QuantLinear, "forward_quantized", of_codes)
    monkeypatch.setattr(QuantLinear, "forward_activated", after)
    return calls


def quantized(
    layer: nn.Linear, bits: int = 8, mode: str = "dynamic", smoothed: bool = False, rank: int = 0
) -> QuantLinear:
    plan = LayerPlan(
        name="linear",
        kind="linear",
        weight_bits=4,
        group_size=32,
        granularity="group",
        activation_bits=16 if mode == "none" else bits,
        range_mode=mode,
        range=MethodSpec("dynamic"),
        transforms=(),
        rounding=MethodSpec("nearest"),
        segments=(layer.in_features,),
    )
    matrix = layer.weight.float()
    scale, multipliers = fit_two_level(matrix, 32)
    codes = round_two_level(matrix, scale, multipliers, 32)
    smooth = torch.rand(layer.in_features) + 0.5 if smoothed else None
    low_rank = (torch.randn(rank, layer.in_features) / 50, torch.randn(layer.out_features, rank)) if rank else None
    return QuantLinear.from_float(layer, plan, QuantizedWeights(codes, multipliers, scale, smooth, low_rank=low_rank))


def quantize_all(module: nn.Module, **options) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, quantized(child, **options))
    fuse_blocks(module)


def block_of(dtype: torch.dtype = torch.float32, layers: dict | None = None, **options) -> BasicTransformerBlock:
    options = {"activation_fn": "geglu", "cross_attention_dim": TEXT, "attention_bias": True} | options
    block = BasicTransformerBlock(DIM, 2, DIM // 2, **options).to(dtype).eval()
    for vector in (*block.norm1.parameters(), *block.norm3.parameters()):
        nn.init.normal_(vector)
    quantize_all(block, **(layers or {}))
    assert type(block) is FusedTransformerBlock
    return block


def inputs(dtype: torch.dtype = torch.float32, tokens: int = 40) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(2, tokens, DIM).to(dtype),
        "encoder_hidden_states": torch.randn(2, 17, TEXT).to(dtype),
    }


def unfused(block: BasicTransformerBlock) -> BasicTransformerBlock:
    """The same, of diffusers' own classes."""
    plain = copy.deepcopy(block)
    plain.__class__ = BasicTransformerBlock
    if type(plain.ff) is FusedFeedForward:
        plain.ff.__class__ = FeedForward
    return plain


OPTIONS = {
    "geglu": {},
    "gelu": {"activation_fn": "gelu"},
    "gelu-approximate": {"activation_fn": "gelu-approximate"},
    "no text": {"cross_attention_dim": None},
    "self-attention twice": {"double_self_attention": True},
    "dropout": {"dropout": 0.5},
    "no affine": {"norm_elementwise_affine": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_is_the_unfused_block(options, fused):
    block = block_of(**options)
    given = inputs()
    if "cross_attention_dim" in options or "double_self_attention" in options:
        given["encoder_hidden_states"] = None
    expected = unfused(block)(**given)
    assert not fused
    # In float32 the additions round as the modules' do.
    assert torch.equal(block(**given), expected)
    activation = options.get("activation_fn", "geglu").replace("-approximate", "_tanh")
    # Queries, keys and values of the same tokens are one product, and so are keys and values of a text.
    attentions = ["quantized", "none"]
    if block.attn2 is not None:
        attentions += ["quantized"] * (1 if given["encoder_hidden_states"] is None else 2) + ["none"]
    assert fused == [*attentions, "quantized", activation]
    # What diffusers' UNets hand on besides.
    more = {
        "timestep": torch.ones(1),
        "cross_attention_kwargs": {},
        "attention_mask": None,
        "added_cond_kwargs": {"a": 1},
    }
    assert torch.equal(block(**given, **more), expected)


def test_queries_keys_and_values_are_one_product(fused):
    block, given = block_of(), inputs()

    def products(block: BasicTransformerBlock) -> int:
        fused.clear()
        assert torch.equal(block(**given), expected)
        return fused.count("quantized")

    expected = block(**given)
    assert products(block) == 4  # with queries for the text, its keys and values, and the first of the feed-forward
    again = copy.deepcopy(block)
    assert products(again) == 7  # a copy's weights lie apart
    assert products(again.to(torch.float32)) == 4  # until it is moved
    again.attn1.to_k.scale = again.attn1.to_k.scale.clone()
    assert products(again) == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_is_no_farther_from_float32_than_the_unfused_block(dtype, fused):
    block = block_of(dtype)
    given = inputs(dtype)
    exact = copy.deepcopy(block).float()(**{name: value.float() for name, value in given.items()})
    result, own = block(**given), unfused(block)(**given)
    assert result.dtype == dtype
    errors = [float((y.float() - exact).norm() / exact.norm()) for y in (result, own)]
    assert errors[0] < 1.1 * errors[1] < 0.02


def hook(name: str) -> Callable:
    return lambda block: block.get_submodule(name).register_forward_hook(lambda *_: None)


def offload(block: BasicTransformerBlock) -> None:
    block.attn1.to_k.forward = block.attn1.to_k.forward


PARTS = (
    "norm1",
    "attn1",
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn1.to_out.1",
    "norm2",
    "attn2",
)
PARTS = (*PARTS, "attn2.to_k", "norm3", "ff", "ff.net.0", "ff.net.0.proj", "ff.net.1", "ff.net.2")
DAMAGE = {
    **{f"a hook on {name}": hook(name) for name in PARTS},
    "a forward of its own": offload,
    "another processor": lambda block: block.attn1.set_processor(AttnProcessor()),
    "chunks": lambda block: block.set_chunk_feed_forward(20, 1),
    "a wrapped layer": lambda block: setattr(block.attn2, "to_v", nn.Sequential(block.attn2.to_v)),
    "a float layer": lambda block: setattr(block.attn1, "to_q", nn.Linear(DIM, DIM)),
    "another norm": lambda block: setattr(block, "norm3", nn.Identity()),
    "a norm of another dtype": lambda block: block.norm3.double() and setattr(block.norm3, "forward", lambda x: x),
    "a rescaled attention": lambda block: setattr(block.attn1, "rescale_output_factor", 2.0),
    "a norm of queries": lambda block: setattr(block.attn2, "norm_q", nn.LayerNorm(DIM // 2)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_is_diffusers_own_where_something_is_in_between(damage, fused):
    block = block_of()
    damage(block)
    given = inputs()
    expected = unfused(block)(**given)
    assert torch.equal(block(**given), expected)
    assert "quantized" not in fused


@pytest.mark.parametrize("layers", [{"bits": 6}, {"mode": "none"}, {"smoothed": True}, {"rank": 4}], ids=str)
def test_layers_that_cannot_share_codes(layers, fused):
    block = block_of(layers=layers)
    given = inputs()
    assert torch.equal(block(**given), unfused(block)(**given))
    # Smoothing and the low-rank branch go together with an activation all the same.
    assert fused == ["geglu"]


def test_is_diffusers_own_in_states_that_would_show(fused):
    block = block_of(dropout=0.5)
    given = inputs()
    mask = torch.zeros(2, 1, 17)
    assert torch.equal(
        block(**given, encoder_attention_mask=mask), unfused(block)(**given, encoder_attention_mask=mask)
    )
    with torch.enable_grad():
        block(**given)
    with torch.autocast("cpu", torch.bfloat16):
        block(**given)
    handle = register_module_forward_hook(lambda *_: None)
    block(**given)
    handle.remove()
    block.train()
    block(**given)
    assert fused == ["geglu"]  # with the mask, for that part does not see it
    # So few tokens stay float.
    block.eval()
    few = inputs(tokens=8)
    assert torch.equal(block(**few), unfused(block)(**few))
    assert "quantized" not in fused


def test_only_plain_blocks_are_fused():
    class Own(FeedForward):
        pass

    blocks = nn.ModuleList([Own(DIM), FeedForward(DIM)])
    fuse_blocks(blocks)
    assert [type(block) for block in blocks] == [Own, FusedFeedForward]


@pytest.mark.parametrize("activation", ["geglu", "gelu", "gelu-approximate", "swiglu"])
@pytest.mark.parametrize("final", [False, True])
def test_a_feed_forward_alone(activation, final, fused):
    feed = FeedForward(DIM, activation_fn=activation, final_dropout=final, dropout=0.1).eval()
    quantize_all(feed)
    x = torch.randn(2, 40, DIM)
    result, fused_as = feed(x), list(fused)
    feed.__class__ = FeedForward
    assert torch.equal(result, feed(x))
    assert fused_as == ([] if activation == "swiglu" else [activation.replace("-approximate", "_tanh")])


def test_compiles_whole(fused):
    block, given = block_of(), inputs()
    expected, graphs = block(**given), []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    assert torch.equal(torch.compile(block, fullgraph=True, backend=keep)(**given), expected)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called.count("qdiff.quantize_layer_norm.default") == 3
    assert not any("layer_norm" in name and "qdiff" not in name for name in called)


def test_survives_copies(fused):
    block, given = block_of(), inputs()
    expected = block(**given)
    for again in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        again.load_state_dict(block.state_dict())
        fused.clear()
        assert torch.equal(again(**given), expected)
        assert "geglu" in fused


def test_pipelines(quantized_sd, generate, fused, tmp_path):
    pipe = quantized_sd().to("cpu")  # a copy, whose weights lie apart until then
    blocks = [module for module in pipe.unet.modules() if isinstance(module, BasicTransformerBlock)]
    assert {type(block) for block in blocks} == {FusedTransformerBlock}
    images = generate(pipe)
    calls = len(fused)
    assert calls
    qdiff.save(pipe, tmp_path / "saved")
    assert torch.equal(generate(qdiff.load(tmp_path / "saved")), images)
    assert len(fused) == 2 * calls
    for block in blocks:
        block.__class__, block.ff.__class__ = BasicTransformerBlock, FeedForward
    assert (generate(pipe) - images).abs().max() < 0.05
    assert len(fused) == 2 * calls


def test_lora(quantized_sd, generate, fused):
    pipe = quantized_sd()
    images, before = generate(pipe), fused.count("quantized")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert (generate(pipe) - images).abs().max() < 0.05
    assert fused.count("quantized") == before
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), images)
    assert fused.count("quantized") == 2 * before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", list(OPTIONS.values())[:4], ids=list(OPTIONS)[:4])
def test_on_a_gpu(options, dtype, fused):
    block, given = block_of(dtype, layers={}, **options), inputs(dtype)
    if "cross_attention_dim" in options:
        given["encoder_hidden_states"] = None
    expected = block(**given)
    block.cuda()
    given = {name: None if value is None else value.cuda() for name, value in given.items()}
    with backend.use_backend("cuda"):
        result, own = block(**given), unfused(block)(**given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = block(**given)
        graph.replay()
    assert torch.equal(again, result)
    assert fused.count("quantized") >= 6
    for other in (expected.cuda(), own):
        assert float((result - other).norm() / other.norm()) < 0.02
