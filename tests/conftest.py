"""Tiny random pipelines, complete with text encoder, tokenizer, VAE and scheduler, for tests of all that takes one.

`tiny_sd` and `tiny_dit` are factories: every call gives a pipeline of its own, so a test may quantize or damage it.
They are built once a session, from a fixed seed and without a network, and load and save like any trained pipeline.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's client is imported: no test reaches for the network

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

_spec = importlib.util.spec_from_file_location("fake_cuda", Path(__file__).parent / "fake_cuda.py")
_fake_cuda = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fake_cuda)

# Words of the shape "caption, style" that the tiny tokenizer knows whole; anything else is spelled letter by letter.
WORDS = ("red", "green", "apple", "cat", "house", "style", "noto")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A GPU of capability 9.0, without any kernel, whose CuPy, compiler and driver write down what they are asked."""
    with _fake_cuda.installed(tmp_path, monkeypatch) as fake:
        yield fake


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder that the session's processes have in common: for what is made once, under a lock."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], StableDiffusionPipeline]:
    """Factory of a text-to-image pipeline with Stable Diffusion's block types (denoiser: `pipe.unet`, 8x8 latents)."""
    original = build_tiny_sd(tmp_path_factory.mktemp("tokenizer"))
    return lambda: copy_pipeline(original)


@pytest.fixture(scope="session")
def tiny_dit() -> Callable[[], DiTPipeline]:
    """Factory of a class-conditional transformer pipeline (denoiser: `pipe.transformer`, 8x8 latents, 1000 labels)."""
    original = build_tiny_dit()
    return lambda: copy_pipeline(original)


def copy_pipeline(pipe):
    """Return a pipeline of the same class that shares no tensor, scheduler state or configuration with `pipe`."""
    fresh = copy.deepcopy(pipe)
    fresh.set_progress_bar_config(disable=True)
    return fresh


def build_tiny_sd(folder: Path) -> StableDiffusionPipeline:
    """Build the Stable Diffusion-like pipeline; `folder` takes the tokenizer's files."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=2,
        norm_num_groups=32,
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=tiny_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_tiny_dit() -> DiTPipeline:
    """Build the DiT-like pipeline. The pipeline hard-codes 1000 as the class of no class, hence 1000 labels."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        attention_bias=True,
    )
    labels = {index: f"thing {index}" for index in range(10)}
    return DiTPipeline(transformer=transformer.eval(), vae=tiny_vae(), scheduler=tiny_scheduler(), id2label=labels)


def tiny_vae() -> AutoencoderKL:
    """Return an autoencoder from 4x8x8 latents to 3x16x16 pictures."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )
    return vae.eval()


def tiny_scheduler() -> DDIMScheduler:
    """Return the deterministic scheduler of Stable Diffusion."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return a CLIP tokenizer over bytes and a few whole words, made from files written to `folder`."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0]
        for position, letter in enumerate(word[1:], start=1):
            right = letter + "</w>" if position == len(word) - 1 else letter
            if (left, right) not in merges:
                merges.append((left, right))
                pieces.append(left + right)
            left += right
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    # Through files, because the constructor's arguments differ between transformers 4 and 5.
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)
