"""List every linear layer and convolution that a forward pass of four denoisers runs.

    python scripts/kernel_shapes.py    # writes assets/benchmarks/kernel_shapes.json

The models are built from their published hyper-parameters on the meta device (no download, no memory) and run once;
hooks note the shapes. `scripts/bench_kernels.py` reads the file, so that it needs no diffusers.

Left out: the first and last layers that the default recipe keeps in floating point (`conv_in`, `conv_out`, patch
embeddings, `x_embedder`, the final `proj_out`): 4 to 64 channels on one side, and no integer kernel runs them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from qdiff.plugin.structure import skip_segments
from qdiff.recipe import DEFAULT_KEEP, Recipe

# A model, and its forward pass.
Built = tuple[nn.Module, Callable[[], Any]]
OUT = Path(__file__).parents[1] / "assets" / "benchmarks" / "kernel_shapes.json"


def build_sdxl() -> Built:
    unet = UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
    return (unet, lambda: unet(torch.empty(2, 4, 128, 128), 1, torch.empty(2, 77, 2048), added_cond_kwargs=added))


def build_sd15() -> Built:
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768
    )  # the class's defaults are Stable Diffusion 1's
    return (unet, lambda: unet(torch.empty(2, 4, 64, 64), 1, torch.empty(2, 77, 768)))


def build_pixart() -> Built:
    dit = PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        num_layers=28,
        sample_size=128,
        cross_attention_dim=1152,
        caption_channels=4096,
        use_additional_conditions=False,
    )
    added = {"resolution": None, "aspect_ratio": None}
    arguments = (torch.empty(2, 4, 128, 128), torch.empty(2, 300, 4096), torch.empty(2))
    return (dit, lambda: dit(*arguments, added_cond_kwargs=added))


def build_flux() -> Built:
    dit = FluxTransformer2DModel(guidance_embeds=True)  # the class's defaults are FLUX.1's
    tokens = (torch.empty(1, 4096, 64), torch.empty(1, 512, 4096), torch.empty(1, 768), torch.empty(1))
    return (dit, lambda: dit(*tokens, torch.empty(4096, 3), torch.empty(512, 3), torch.empty(1)))


# name -> what the file says about it, and how it is built and run
MODELS: dict[str, tuple[str, Callable[[], Built]]] = {
    "sdxl": ("Stable Diffusion XL UNet, batch 2, 128x128 latents, 77 text tokens", build_sdxl),
    "sd15": ("Stable Diffusion 1.5 UNet, batch 2, 64x64 latents, 77 text tokens", build_sd15),
    "pixart": ("PixArt-XL, 28 blocks 1152 wide, batch 2, 4096 tokens, 300 text tokens", build_pixart),
    "flux": ("FLUX.1, 19 double and 38 single blocks 3072 wide, batch 1, 4096 + 512 tokens", build_flux),
}


@torch.no_grad()
def shapes_of(build: Callable[[], Built]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The distinct linear layers and convolutions of one forward pass, each with how often it runs."""
    with torch.device("meta"):
        model, forward = build()
        split = skip_segments(model)
        linears: Counter[tuple] = Counter()
        convs: Counter[tuple] = Counter()
        example: dict[tuple, str] = {}

        def note(name: str, layer: nn.Module, x: Tensor) -> None:
            if isinstance(layer, nn.Linear):
                counter, key = linears, (x.shape[:-1].numel(), layer.out_features, layer.in_features)
            else:
                segments = split.get(name, (layer.in_channels,))
                counter = convs
                key = (x.shape[0], segments, *x.shape[2:], layer.out_channels)
                key += (layer.kernel_size, layer.stride, layer.padding)
            counter[(*key, layer.bias is not None)] += 1
            example.setdefault((*key, layer.bias is not None), name)

        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and not Recipe("", keep=DEFAULT_KEEP).kept_by(name):
                layer.register_forward_pre_hook(lambda layer, args, name=name: note(name, layer, args[0]))
        forward()
    linear_fields = ("m", "n", "k", "bias")
    conv_fields = ("batch", "segments", "height", "width", "n", "kernel", "stride", "padding", "bias")
    return listed(linears, linear_fields, example), listed(convs, conv_fields, example)


def listed(counter: Counter[tuple], fields: tuple[str, ...], example: dict[tuple, str]) -> list[dict[str, Any]]:
    ordered = sorted(counter.items(), reverse=True)
    return [dict(zip(fields, key), count=count, layer=example[key]) for key, count in ordered]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    linears, convs = [], []
    for model, (_, build) in MODELS.items():
        for target, rows in zip((linears, convs), shapes_of(build)):
            target += [{"model": model, **row} for row in rows]
    # One shape a line: a change of the file then shows which.
    sections = {"linear": linears, "conv2d": convs}
    lines = [
        f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"
        for name, rows in sections.items()
    ]
    models = json.dumps({name: text for name, (text, _) in MODELS.items()})
    out.write_text("{\n" + ",\n".join([f' "models": {models}', *lines]) + "\n}\n")
    print(f"{len(linears)} linear layers, {len(convs)} convolutions: {out}")


if __name__ == "__main__":
    main()
