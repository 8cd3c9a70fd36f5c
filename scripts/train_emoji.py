"""Train the two small pipelines of `assets/` on the emoji data set, in resumable pieces.

    python scripts/build_emoji_dataset.py --out data/emoji
    accelerate launch --num_processes 4 scripts/train_emoji.py vae     --minutes 3  --plan 3
    accelerate launch --num_processes 1 scripts/train_emoji.py decoder --minutes 8  --plan 8
    accelerate launch --num_processes 2 scripts/train_emoji.py sd      --minutes 9  --plan 20
    accelerate launch --num_processes 1 scripts/train_emoji.py dit     --minutes 9  --plan 20
    python scripts/train_emoji.py export --assets assets
    python scripts/train_emoji.py import --assets assets    # go on from exported weights, on another machine

Stages: `vae` trains an AutoencoderKL; `decoder` goes on with its decoder alone (latents stay what they were, so it may
run beside the next two); `sd` a text encoder and a UNet, `dit` a class-conditional transformer, both on the VAE's
latents; `export` writes `emoji-sd` (StableDiffusionPipeline), `emoji-dit` (DiTPipeline) as float16 safetensors and the
log beside them; `import` makes checkpoints of these again, without optimizer state.

`--minutes` is the length of this piece, `--plan` the length of the whole stage: the learning rate follows the share of
the plan that is done, over all pieces. Each piece ends with a checkpoint in `--work`, from which the next one resumes,
and appends to `--work/log.jsonl`: stage, step, seconds, loss, images a second, device, number of processes.

bf16 autocast, channels-last, torch.compile (`--no-compile` turns it off), EMA weights are what is exported.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENT = {"channels": 4, "size": 16}
TOKENS = 20  # the longest caption has 10 words and a comma
TEXT_WIDTH = 256
LOG = "emoji-training-log.jsonl"
MAX_SHARD = "18MB"  # no file of the assets above 20 MB
NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAMPLING = NOISE | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


# --- models ----------------------------------------------------------------------------------------------------------


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT["channels"],
        layers_per_block=1,
        sample_size=64,
    )


def make_unet() -> UNet2DConditionModel:
    """Stable Diffusion's blocks at a size that fits a repository: 11.7 M parameters."""
    channels = (128, 128, 192)
    return UNet2DConditionModel(
        sample_size=LATENT["size"],
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=tuple(c // 64 for c in channels),  # diffusers reads this as the number of heads
    )


def make_transformer() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=LATENT["channels"],
        out_channels=LATENT["channels"],
        num_layers=5,
        sample_size=LATENT["size"],
        patch_size=1,
        num_embeds_ada_norm=1000,  # DiTPipeline's null class is number 1000 whatever the data set
    )


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-pair encoding, learned from these captions."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    start, end = "<|startoftext|>", "<|endoftext|>"
    learner = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        end_of_word_suffix="</w>",
        special_tokens=[start, end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    model = json.loads(learner.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(m) for m in model["merges"]]
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=end,
        model_max_length=TOKENS,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


# --- what is trained: modules whose forward is the loss of one batch -------------------------------------------------


class ReconstructionLoss(nn.Module):
    """L1 + 2 MSE (both in [-1, 1] units) + a whiff of KL, enough to keep the latents' scale bounded."""

    def __init__(self, vae: AutoencoderKL, decoder_only: bool):
        super().__init__()
        self.vae = vae
        self.decoder_only = decoder_only
        if decoder_only:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample()
        decoded = self.vae.decode(latents).sample
        loss = F.l1_loss(decoded, images) + 2 * F.mse_loss(decoded, images)
        return loss if self.decoder_only else loss + 1e-5 * posterior.kl().mean() / posterior.mean[0].numel()


class NoiseLoss(nn.Module):
    """Noise prediction, weighted by min(SNR, 5) / SNR (Hang et al., arXiv 2303.09556), 10 % of conditions dropped."""

    def __init__(self) -> None:
        super().__init__()
        alphas = DDPMScheduler(**NOISE).alphas_cumprod
        self.register_buffer("alphas", alphas, persistent=False)

    def forward(self, latents: Tensor, condition: Tensor) -> Tensor:
        batch = latents.shape[0]
        t = torch.randint(0, len(self.alphas), (batch,), device=latents.device)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        predicted = self.predict(noisy, t, condition).float()
        snr = (alpha / (1 - alpha)).flatten()
        weight = snr.clamp(max=5) / snr
        return (weight * (predicted - noise).square().mean((1, 2, 3))).mean()

    def predict(self, noisy: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        raise NotImplementedError


class TextToImageLoss(NoiseLoss):
    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder = make_text_encoder(tokenizer)
        self.unet = make_unet()
        self.register_buffer("empty", tokenize(tokenizer, [""]), persistent=False)

    def predict(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        dropped = torch.rand(len(tokens), 1, device=tokens.device) < 0.1
        tokens = torch.where(dropped, self.empty, tokens)
        return self.unet(noisy, t, self.text_encoder(tokens)[0], return_dict=False)[0]


class ClassToImageLoss(NoiseLoss):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = make_transformer()
        for block in self.transformer.transformer_blocks:  # adaLN-Zero: every block starts as the identity
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1.linear.bias)
        self.transformer.eval()  # its own label dropout draws one mask a block; ours draws one for all of them

    def predict(self, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        labels = torch.where(torch.rand(len(labels), device=labels.device) < 0.1, 1000, labels)
        return self.transformer(noisy, timestep=t, class_labels=labels, return_dict=False)[0]


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


# --- data ------------------------------------------------------------------------------------------------------------


def load_icons(folder: Path) -> tuple[Tensor, dict]:
    """All images uint8 [n, 3, 64, 64] and the table of `build_emoji_dataset.py`."""
    images = torch.from_numpy(np.load(folder / "icons.npz")["images"]).permute(0, 3, 1, 2)
    return images, json.loads((folder / "icons.json").read_text())


def to_range(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor, device: torch.device) -> Tensor:
    return torch.cat([vae.encode(to_range(b.to(device))).latent_dist.mean.float() for b in images.split(256)])


# --- the loop --------------------------------------------------------------------------------------------------------


# Images a process and step, peak learning rate, EMA decay.
SETTINGS = {
    "vae": {"batch": 64, "rate": 6e-4, "ema": 0.998},
    "decoder": {"batch": 128, "rate": 4e-4, "ema": 0.998},
    "sd": {"batch": 384, "rate": 6e-4, "ema": 0.9995},
    "dit": {"batch": 384, "rate": 5e-4, "ema": 0.9995},
}


def learning_rate(share: float, step: int) -> float:
    """Relative rate: 300 steps of warm-up, flat for 30 % of the plan, then a cosine to nothing."""
    decay = 1.0 if share < 0.3 else 0.5 * (1 + math.cos(math.pi * min(1.0, (share - 0.3) / 0.7)))
    return min(1.0, (step + 1) / 300) * decay


def train(
    stage: str, trainee: nn.Module, data: tuple[Tensor, ...], accelerator: Accelerator, args: argparse.Namespace
) -> dict:
    """Run one piece; returns the checkpoint: EMA weights, and what is needed to go on."""
    settings = SETTINGS[stage] | ({"batch": args.batch} if args.batch else {})
    device = accelerator.device
    path = args.work / f"{stage}.pt"
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    if state:
        trainee.load_state_dict(state["ema"] if "model" not in state else state["model"])
    trainee = trainee.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(trainee).requires_grad_(False)
    if state:
        ema.load_state_dict(state["ema"])
    parameters = [p for p in trainee.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings["rate"], betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    if state and "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    step, spent = (state["step"], state["seconds"]) if state else (0, 0.0)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # one graph: the gradients are too small to be worth overlapping
        trainee.compile()
    model, optimizer = accelerator.prepare(trainee, optimizer)
    first = 0 if state and "optimizer" in state else step  # Adam without its averages needs a new warm-up
    pairs = [(e, p) for e, p in zip(ema.parameters(), trainee.parameters(), strict=True) if p.requires_grad]

    generator = torch.Generator(device).manual_seed(1000 * step + accelerator.process_index)
    start, lap, losses, images = time.time(), time.time(), [], 0
    while True:
        elapsed = time.time() - start
        # All processes must stop at the same step; the check costs a synchronization, hence not every step.
        if step % 20 == 0:
            stop = torch.tensor(float(elapsed > 60 * args.minutes or step >= args.max_steps), device=device)
            if accelerator.reduce(stop, "max").item() > 0:
                break
        share = (spent + elapsed) / (60 * args.plan)
        for group in optimizer.param_groups:
            group["lr"] = settings["rate"] * learning_rate(share, step - first)
        rows = torch.randint(0, len(data[0]), (settings["batch"],), device=device, generator=generator)
        batch = [part[rows] for part in data]
        if batch[0].dtype == torch.uint8:
            batch[0] = to_range(batch[0])
        batch[0] = batch[0].contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            loss = model(*batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(settings["ema"], (1 + step) / (10 + step))
        torch._foreach_lerp_([e for e, _ in pairs], [p.detach() for _, p in pairs], 1 - decay)
        losses.append(loss.detach())
        images += settings["batch"] * accelerator.num_processes
        step += 1
        if step % 20 == 0 and time.time() - lap > 10:
            log(
                accelerator,
                args.work,
                stage,
                step,
                spent + time.time() - start,
                torch.stack(losses).mean().item(),
                images / (time.time() - lap),
            )
            lap, losses, images = time.time(), [], 0
    checkpoint = {
        "ema": ema.state_dict(),
        "model": accelerator.unwrap_model(model).state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": spent + time.time() - start,
    }
    if accelerator.is_main_process:
        torch.save(checkpoint, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)
    return checkpoint


def log(accelerator: Accelerator, work: Path, stage: str, step: int, seconds: float, loss: float, speed: float) -> None:
    if not accelerator.is_main_process:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = {
        "stage": stage,
        "step": step,
        "seconds": round(seconds, 1),
        "loss": round(loss, 5),
        "images_per_second": round(speed),
    }
    record |= {"device": device, "processes": accelerator.num_processes, "torch": torch.__version__}
    with (work / "log.jsonl").open("a") as f:
        f.write(json.dumps(record) + "\n")
    print(record, flush=True)


# --- stages ----------------------------------------------------------------------------------------------------------


def load_vae(work: Path, stages: tuple[str, ...] = ("decoder", "vae")) -> AutoencoderKL:
    path = next(work / f"{stage}.pt" for stage in stages if (work / f"{stage}.pt").exists())
    weights = torch.load(path, map_location="cpu", weights_only=True)["ema"]
    vae = make_vae()
    vae.load_state_dict({k.removeprefix("vae."): v for k, v in weights.items()})
    return vae.eval()


def part_of(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}


def run_stage(args: argparse.Namespace) -> None:
    # The null class's rows of unused labels get no gradient; DDP only minds parameters no rank ever uses.
    accelerator = Accelerator(
        mixed_precision="bf16", kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    )
    torch.manual_seed(0)  # the same initial weights in every process
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device = accelerator.device
    images, table = load_icons(args.data)
    icons = table["icons"]
    kept = torch.tensor([i for i, icon in enumerate(icons) if not icon["held_out"]])
    if args.stage in ("vae", "decoder"):
        vae = make_vae() if args.stage == "vae" else load_vae(args.work)
        trainee: nn.Module = ReconstructionLoss(vae, decoder_only=args.stage == "decoder")
        data: tuple[Tensor, ...] = (images[kept].to(device),)
    else:
        vae = load_vae(args.work).to(device)
        latents = encode_all(vae, images, device)
        # One number for the scale, as AutoencoderKL's config wants it; `export` computes the same.
        latents = latents[kept.to(device)] * scaling_factor(latents)
        if args.stage == "sd":
            tokenizer = make_tokenizer([icon["caption"] for icon in icons])
            trainee = TextToImageLoss(tokenizer)
            condition = tokenize(tokenizer, [icons[i]["caption"] for i in kept])
        else:
            trainee = ClassToImageLoss()
            condition = torch.tensor([icons[i]["label"] for i in kept])
        data = (latents, condition.to(device))
    torch.manual_seed(1 + accelerator.process_index + int(time.time()))  # noise differs between processes and pieces
    train(args.stage, trainee, data, accelerator, args)
    accelerator.end_training()


def scaling_factor(latents: Tensor) -> float:
    return 1 / latents.std().item()


def export(args: argparse.Namespace) -> None:
    """Write the pipelines, float16, and the captions kept out of training."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, table = load_icons(args.data)
    icons = table["icons"]
    # The encoder is the same in both stages, so the latents' scale is too.
    factor = scaling_factor(encode_all(load_vae(args.work, ("vae", "decoder")).to(device), images, device))
    vae = load_vae(args.work)
    vae.register_to_config(scaling_factor=factor)
    ddim = DDIMScheduler(**SAMPLING)

    sd = torch.load(args.work / "sd.pt", map_location="cpu", weights_only=True)["ema"]
    tokenizer = make_tokenizer([icon["caption"] for icon in icons])
    text_encoder, unet = make_text_encoder(tokenizer), make_unet()
    text_encoder.load_state_dict(part_of(sd, "text_encoder"))
    unet.load_state_dict(part_of(sd, "unet"))
    pipe = StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, ddim, None, None, requires_safety_checker=False)  # type: ignore[arg-type]
    pipe.to(torch.float16).save_pretrained(args.assets / "emoji-sd", max_shard_size=MAX_SHARD)
    # Loaded without a dtype, transformers takes the config's and diffusers float32: they must agree.
    config = args.assets / "emoji-sd" / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))

    transformer = make_transformer()
    transformer.load_state_dict(
        part_of(torch.load(args.work / "dit.pt", map_location="cpu", weights_only=True)["ema"], "transformer")
    )
    # The names contain commas, which DiTPipeline would take for synonyms.
    names = {i: name.replace(",", " ·") for i, name in enumerate(table["classes"])}
    dit = DiTPipeline(transformer.half(), vae, ddim, id2label=names)
    dit.register_to_config(id2label=names)  # the pipeline reads it from its config, and does not put it there
    dit.save_pretrained(args.assets / "emoji-dit", max_shard_size=MAX_SHARD)

    shutil.copy(args.work / "log.jsonl", args.assets / LOG)
    held_out = [{k: icon[k] for k in ("caption", "name", "style", "group")} for icon in icons if icon["held_out"]]
    (args.assets / "emoji-heldout.json").write_text(json.dumps(held_out, indent=0) + "\n")


def import_weights(args: argparse.Namespace) -> None:
    """Checkpoints from exported pipelines: EMA weights, and how far each stage had come."""
    shutil.copy(args.assets / LOG, args.work / "log.jsonl")
    records = [json.loads(line) for line in (args.work / "log.jsonl").read_text().splitlines()]
    vae = AutoencoderKL.from_pretrained(args.assets / "emoji-sd", subfolder="vae")
    trained: dict[str, dict[str, nn.Module]] = {
        "decoder": {"vae": vae},
        "sd": {
            "text_encoder": CLIPTextModel.from_pretrained(
                args.assets / "emoji-sd", subfolder="text_encoder", dtype=torch.float32
            ),
            "unet": UNet2DConditionModel.from_pretrained(args.assets / "emoji-sd", subfolder="unet"),
        },
        "dit": {
            "transformer": DiTTransformer2DModel.from_pretrained(args.assets / "emoji-dit", subfolder="transformer")
        },
    }
    for stage, modules in trained.items():
        last = [r for r in records if r["stage"] == stage][-1]
        weights = {f"{name}.{k}": v.float() for name, module in modules.items() for k, v in module.state_dict().items()}
        torch.save({"ema": weights, "step": last["step"], "seconds": last["seconds"]}, args.work / f"{stage}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*SETTINGS, "export", "import"])
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--work", type=Path, default=Path("out/emoji"), help="checkpoints and the log")
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--plan", type=float, default=20.0)
    parser.add_argument("--batch", type=int, help="images a process and step; default: per stage")
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    {"export": export, "import": import_weights}.get(args.stage, run_stage)(args)


if __name__ == "__main__":
    main()
