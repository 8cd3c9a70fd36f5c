"""Judge the pipelines in `assets/` as models: do they draw what they are asked for?

    python scripts/build_emoji_dataset.py
    pip install "diffusers-qdiff[eval]"
    python scripts/evaluate_emoji.py

* VAE: mean PSNR of the reconstruction over all icons of the data set.
* Text to image: 256 random training captions (and 256 held-out ones), 20 DDIM steps, guidance 4. A sample counts as
  recognised when its five nearest real icons (EfficientNet-Lite0 features, cosine) contain one of the same name, in any
  style.
* `assets/emoji-sd-samples.png`: 64 captions drawn at random; `assets/emoji-dit-samples.png`: one image a class.

Writes `assets/benchmarks/emoji_models.json`. About ten minutes on two cores, seconds on a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTPipeline, StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from qdiff.evaluation.metrics.efficientnet import efficientnet_lite0

STEPS, GUIDANCE, NEIGHBOURS, COUNT = 20, 4.0, 5, 256


def feature_extractor(device: torch.device):
    """Images uint8 [B, 64, 64, 3] -> unit features [B, 1280] of the packaged EfficientNet-Lite0, on the CPU."""
    network = efficientnet_lite0(device)

    def extract(images: np.ndarray) -> Tensor:
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(64)
        return F.normalize(torch.cat([network.extract(batch) for batch in batches]), dim=1)

    return extract


def sample(pipe: StableDiffusionPipeline, captions: list[str], batch: int) -> np.ndarray:
    """uint8 [n, 64, 64, 3]; caption i always starts from the noise of seed i."""
    images = []
    for start in range(0, len(captions), batch):
        part = captions[start : start + batch]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        out = pipe(part, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="np")
        images.append(out.images)
    return (np.concatenate(images) * 255).round().astype(np.uint8)


def recognised(features: Tensor, names: list[str], real: Tensor, real_names: list[str]) -> float:
    """Share of samples with an icon of the same name among the nearest real ones."""
    nearest = (features @ real.T).topk(NEIGHBOURS, dim=1).indices.tolist()
    return float(np.mean([name in {real_names[j] for j in row} for name, row in zip(names, nearest, strict=True)]))


@torch.no_grad()
def reconstruction_psnr(vae: torch.nn.Module, images: np.ndarray) -> float:
    """Mean over images of the PSNR in dB of decode(encode(image)), both as 8-bit images."""
    values = []
    for batch in torch.from_numpy(images).split(64):
        x = batch.to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
        y = ((y.clamp(-1, 1) + 1) * 127.5).round()
        error = (y - (x + 1) * 127.5).square().mean((1, 2, 3)).clamp(min=1e-3)
        values.append(10 * torch.log10(255**2 / error))
    return torch.cat(values).mean().item()


def grid(images: np.ndarray, captions: list[str], columns: int) -> Image.Image:
    """Pictures at twice their size over their captions."""
    cell, text = 128, 30
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell + 16), rows * (cell + text + 8)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, words) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * (cell + 16) + 8, i // columns * (cell + text + 8)
        sheet.paste(Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        name, _, style = words.rpartition(", ")
        pen.text((x, y + cell + 1), name[:24], fill="black")
        pen.text((x, y + cell + 13), style, fill="gray")
    return sheet


def judge_text_to_image(args: argparse.Namespace, device: torch.device) -> dict:
    images = np.load(args.data / "icons.npz")["images"]
    icons = json.loads((args.data / "icons.json").read_text())["icons"]
    names = [icon["name"] for icon in icons]
    rng = random.Random(0)
    seen = rng.sample([icon for icon in icons if not icon["held_out"]], COUNT)
    unseen = rng.sample([icon for icon in icons if icon["held_out"]], COUNT)

    pipe = StableDiffusionPipeline.from_pretrained(args.assets / "emoji-sd").to(device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    extract = feature_extractor(device)
    real = extract(images)
    result: dict = {"vae_psnr_db": round(reconstruction_psnr(pipe.vae, images), 2), "icons": len(icons)}
    for key, chosen in (("training", seen), ("held_out", unseen)):
        captions = [icon["caption"] for icon in chosen]
        drawn = sample(pipe, captions, args.batch)
        if key == "training":
            grid(drawn[:64], captions[:64], columns=8).save(args.assets / "emoji-sd-samples.png")
        share = recognised(extract(drawn), [icon["name"] for icon in chosen], real, names)
        result[f"{key}_captions_recognised"] = round(share, 4)
        print(result, flush=True)
    return result


def draw_classes(args: argparse.Namespace, device: torch.device) -> None:
    pipe = DiTPipeline.from_pretrained(args.assets / "emoji-dit").to(device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    names = sorted(pipe.labels, key=pipe.labels.get)
    generator = torch.Generator().manual_seed(0)
    settings = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "generator": generator, "output_type": "np"}
    drawn = pipe([pipe.labels[name] for name in names], **settings).images
    captions = [name.replace(" · ", ", ") for name in names]
    grid((drawn * 255).round().astype(np.uint8), captions, columns=9).save(args.assets / "emoji-dit-samples.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--models", nargs="+", choices=["emoji-sd", "emoji-dit"], default=["emoji-sd", "emoji-dit"])
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "emoji-dit" in args.models:
        draw_classes(args, device)
    if "emoji-sd" in args.models:
        result = judge_text_to_image(args, device)
        settings = {"steps": STEPS, "guidance": GUIDANCE, "scheduler": "DDIM", "captions": COUNT}
        where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
        result |= {"settings": settings | {"neighbours": NEIGHBOURS}, "device": where, "torch": torch.__version__}
        result["date"] = datetime.date.today().isoformat()
        out = args.assets / "benchmarks" / "emoji_models.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
