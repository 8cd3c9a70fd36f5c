"""The whole chain on a CUDA device, on the shipped pipeline: the same codes, the same pictures as on the CPU."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import qdiff
from qdiff.evaluation import paired_quality
from qdiff.layers import QuantConv2d, QuantLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `pytest -m gpu` on one"),
]
ASSETS = Path(__file__).parents[2] / "assets"
CAPTIONS = ["red heart, noto style", "croissant, flat style", "rabbit, twemoji style", "rocket, fluent style"]
CALIBRATION = qdiff.Calibration(prompts=CAPTIONS, steps=8)


def emoji_sd(dtype=torch.float32):
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji-sd").to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(CAPTIONS))]
    images = pipe(CAPTIONS, num_inference_steps=20, guidance_scale=4.0, generator=generators, output_type="pt").images
    return images.float().cpu()


@pytest.fixture(scope="module")
def quantized():
    return qdiff.quantize_pipeline(emoji_sd(), calibration=CALIBRATION, progress=False)


def test_a_denoiser_moved_to_the_gpu_agrees_with_the_cpu(quantized, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the float layers, in float32 on both
    unet, moved = quantized.unet, copy.deepcopy(quantized.unet).to("cuda")
    generator = torch.Generator().manual_seed(0)
    text = quantized.encode_prompt(CAPTIONS, "cpu", 1, False)[0]
    latents = torch.randn(len(CAPTIONS), 4, 16, 16, generator=generator)
    nudged = latents * (1 + 1e-5 * torch.randn(latents.shape, generator=generator))
    with torch.no_grad():
        expected = unet(latents, 301, text).sample
        sensitivity = (unet(nudged, 301, text).sample - expected).norm()
        got = moved(latents.cuda(), 301, text.cuda()).sample.cpu()
    # The integers agree to the bit, layer by layer (the next test). Norms and attention are float32 in another order,
    # which moves values across rounding thresholds, and that grows through the network: on the CPU too, a nudge of 1e-5
    # of the input changes the output by 1.5 %. The device must not change it by more.
    assert (got - expected).norm() <= 1.5 * sensitivity


@pytest.mark.parametrize("kind", [QuantLinear, QuantConv2d])
def test_a_layer_on_the_gpu_gives_the_same_integers(quantized, kind):
    layer = next(m for m in quantized.unet.modules() if isinstance(m, kind) and m.plan.weight_bits == 4)
    channels = sum(layer.plan.segments)
    x = torch.randn(4, channels, 8, 8) if kind is QuantConv2d else torch.randn(4, 16, channels)
    layer.tracker.set(301, 4)
    expected = layer(x)
    moved = copy.deepcopy(layer).to("cuda")
    moved.tracker.set(torch.tensor([301], device="cuda"), 4)
    # Same codes, same accumulators: what is left is the order of a few float32 operations.
    torch.testing.assert_close(moved(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantizing_on_the_gpu_keeps_the_pictures(dtype):
    pipe = emoji_sd(dtype).to("cuda")
    before = draw(pipe)
    qdiff.quantize_pipeline(pipe, calibration=CALIBRATION, progress=False)
    after = draw(pipe)
    assert torch.isfinite(after).all()
    assert paired_quality(before, after).psnr.mean() > 15  # naive W4A8 is near 10 dB
