"""The first call of a denoiser finds its kernels compiled together; on a GPU that computes nothing."""

import copy
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from qdiff.ops import _cupy, _tiles, checks, rehearsal


@pytest.fixture
def cuda(cuda, monkeypatch):
    """It is of capability 8.0, and takes CPU tensors for its own."""
    for path in (Path(__file__).parents[2] / "cuda").glob("*.cu"):
        (cuda.sources / path.name).write_text("code")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(_cupy, "multiprocessors", lambda device: 108)
    monkeypatch.setattr(_tiles, "_chosen", {})
    for name, module in list(sys.modules.items()):
        if name.startswith("qdiff.ops.") and hasattr(module, "runs_kernel"):
            monkeypatch.setattr(module, "runs_kernel", lambda op, x, refusal: refusal is None)
    checks.forget()
    with torch.no_grad():
        yield cuda
    checks.forget()


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def call(denoiser):
    """One of a step with guidance; the latents."""
    latents = torch.randn(2, 4, 8, 8)
    if hasattr(denoiser, "down_blocks"):
        denoiser(latents, 301, torch.randn(2, 77, 64))
    else:
        denoiser(latents, timestep=torch.tensor([301, 301]), class_labels=torch.tensor([3, 1000]))
    return latents


def shapes(launches):
    return [launch[1:8] for launch in launches]


def test_all_kernels_of_a_first_call_are_compiled_before_any_is_launched(quantized, cuda):
    denoiser = denoiser_of(quantized())
    call(denoiser)
    first = shapes(cuda.cupy.launches)
    assert len(cuda.nvrtc.before) > 3
    assert set(cuda.nvrtc.before) == {0}
    call(denoiser)
    assert shapes(cuda.cupy.launches)[len(first) :] == first  # so the first call launched each kernel once
    assert len(cuda.nvrtc.compiled) == len(cuda.nvrtc.before)


def test_so_are_those_of_a_copy(quantized_sd, cuda):
    call(copy.deepcopy(quantized_sd().unet))
    assert set(cuda.nvrtc.before) == {0}


def test_so_are_those_of_a_model_that_is_moved_as_a_whole(quantized_sd, cuda):
    unet, _ = cpu_offload_with_hook(quantized_sd().unet, "cpu")
    call(unet)
    assert set(cuda.nvrtc.before) == {0}


class Counting(AttnProcessor2_0):
    calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("how", ["processor", "module", "hook", "pre-hook", "forward"])
def test_whoever_could_notice_is_called_once(quantized_sd, cuda, how):
    unet = quantized_sd().unet
    block, calls = unet.down_blocks[0].attentions[0], []
    if how == "processor":
        attention = block.transformer_blocks[0].attn1
        attention.set_processor(counting := Counting())
    if how == "module":

        class Noticing(type(block)):
            def forward(self, *args, **kwargs):
                calls.append(1)
                return super().forward(*args, **kwargs)

        block.__class__ = Noticing
    if how == "hook":
        block.register_forward_hook(lambda *given: calls.append(1))
    if how == "pre-hook":
        block.register_forward_pre_hook(lambda *given: calls.append(1))
    if how == "forward":
        really = block.forward
        block.forward = lambda *args, **kwargs: (calls.append(1), really(*args, **kwargs))[1]
    call(unet)
    assert (counting.calls if how == "processor" else len(calls)) == 1
    assert len(set(cuda.nvrtc.before)) > 1  # compiled one by one


@pytest.mark.parametrize("how", ["a hook for all modules", "dropout"])
def test_nor_is_a_call_rehearsed_that_others_would_notice(quantized_sd, cuda, how):
    unet = quantized_sd().unet
    if how == "dropout":
        unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_out[1] = nn.Dropout(0.5)
        call(unet)
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda *given: None)
        try:
            call(unet)
        finally:
            handle.remove()
    assert len(set(cuda.nvrtc.before)) > 1


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_call_is_kept(quantized_sd, monkeypatch, fails):
    unet = quantized_sd().unet
    if fails:
        monkeypatch.setattr(unet, "conv_out", nn.Linear(3, 3))
    found = []
    handle = unet.register_forward_pre_hook(lambda module, args: found.append(weakref.ref(args[0])))
    if fails:
        with pytest.raises(RuntimeError):
            call(unet)
    else:
        call(unet)
    handle.remove()
    assert rehearsal._thread.call is None
    if not fails:  # pytest keeps an error's frames
        assert found[0]() is None


def test_a_denoiser_compiles_to_one_graph_without_rehearsals(quantized_sd):
    unet = quantized_sd().unet
    given = torch.randn(2, 4, 8, 8), torch.tensor(301), torch.randn(2, 77, 64)
    with torch.no_grad():
        expected = unet(*given).sample
        compiled = torch.compile(unet, fullgraph=True, backend="eager")
        assert torch.equal(compiled(*given).sample, expected)
    assert rehearsal._thread.call is None
