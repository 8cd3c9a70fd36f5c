"""How the literature evaluates diffusion models and their quantization, as data: see reproduce_protocol.py.

Read in the papers' own repositories and model cards, on 2026-11-23; `open` says what is not in them. MixDQ (arXiv
2405.17873) is missing: its repository has the captions (COCO val2014) and the settings (SDXL-turbo, one step, guidance
0), but lists its evaluation scripts as still to come, so how many pictures it takes is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

LABELS = "class labels"
PAIRED = ("psnr", "ssim", "lpips-alex")


@dataclass(frozen=True)
class Protocol:
    """pictures: how many.  subject: what they show.  size: pixels a side.  passes: rows through the denoiser a step.

    sampler: the pipeline's own scheduler must be it.  real: its distances are to real pictures.  source: who uses it,
    and where that was read.  open: what could not be confirmed, or cannot be had here.
    """

    pictures: int
    subject: str
    sampler: str
    steps: int
    guidance_scale: float
    passes: int
    size: int
    metrics: tuple[str, ...]
    real: bool
    source: str
    open: str


def like_svdquant(sampler: str, steps: int, guidance_scale: float, passes: int, model: str) -> Protocol:
    """SVDQuant's, of one model: the reference is what it draws in 16 bits."""
    return Protocol(
        5_000,
        "prompts of MJHQ-30K",
        sampler,
        steps,
        guidance_scale,
        passes,
        1024,
        (*PAIRED, "fid", "clip-score", "image-reward"),
        False,
        "SVDQuant (arXiv 2411.05007). mit-han-lab/deepcompressor: examples/diffusion/configs/__default__.yaml and "
        f"model/{model}.yaml; app/diffusion/eval/metrics (clean-fid, torchmetrics' LPIPS of AlexNet and CLIP score of "
        "ViT-L/14)",
        "which 5,000 of the prompts; the size is the pipeline's own there. For its FID to the benchmark's pictures, "
        "run once more with --metrics fid --statistics FOLDER",
    )


PROTOCOLS = {
    "coco-1k-pixart-alpha": Protocol(
        1_024,
        "COCO captions",
        "DPM-Solver",
        20,
        4.5,
        2,
        1024,
        ("fid", "clip-score", "image-reward"),
        True,
        "ViDiT-Q (arXiv 2406.02540). thu-nics/ViDiT-Q: t2i/asset/coco_1024.txt and the defaults of "
        "t2i/scripts/quant_txt2img.py",
        "the metrics and their code, which are not in the repository; FID of so few pictures is biased upwards",
    ),
    "coco-10k": Protocol(
        10_000,
        "captions, drawn at random from COCO 2017 val",
        "PLMS",
        50,
        7.5,
        2,
        512,
        ("fid-legacy-tensorflow", "clip-score"),
        True,
        "Stable Diffusion v1. CompVis/stable-diffusion: Stable_Diffusion_v1_Model_Card.md (50 PLMS steps, 10,000 "
        "prompts, 512 pixels, guidance 1.5 to 8). Guidance 7.5 is the default of txt2img.py there and in "
        "Xiuyu-Li/q-diffusion (arXiv 2302.04304), which measures FID with torch-fidelity (its README)",
        "the FID code and the real pictures of the model card; how many captions Q-Diffusion takes",
    ),
    "coco-30k": Protocol(
        30_000,
        "captions of COCO 2014 val, one a picture",
        "the model's own",
        50,
        7.5,
        2,
        512,
        ("fid-legacy-pytorch", "clip-score"),
        True,
        "zero-shot FID-30K of text-to-image papers. Captions: j-min/DallEval, quality/; the data set "
        "sayakpaul/coco-30-val-2014",
        "steps and guidance are each paper's own (these are Stable Diffusion v1's), and so is the FID code: "
        "pytorch-fid in many, clean-fid on pictures brought to 256 pixels first in GigaGAN's, which is not done here",
    ),
    "mjhq-5k-pixart-sigma": like_svdquant("DPM-Solver", 20, 4.5, 2, "pixart-sigma"),
    "mjhq-5k-flux-dev": like_svdquant("flow-matching Euler", 50, 3.5, 1, "flux.1-dev"),
    "mjhq-5k-flux-schnell": like_svdquant("flow-matching Euler", 4, 0.0, 1, "flux.1-schnell"),
    "imagenet-50k": Protocol(
        50_000,
        LABELS,
        "DDPM",
        250,
        1.5,
        2,
        256,
        ("fid-legacy-tensorflow", "inception-score", "precision-recall"),
        True,
        "DiT-XL/2 (arXiv 2212.09748). facebookresearch/DiT: defaults of sample_ddp.py; figures by "
        "openai/guided-diffusion, evaluations/ (FID, sFID, precision and recall, Inception Score)",
        "there labels are drawn at random, here they are equally many; there precision and recall are to 10,000 real "
        "pictures; no sFID here; there guidance is on three of the four latent channels, in diffusers on all. With "
        "--statistics VIRTUAL_imagenet256_labeled.npz (theirs), leave out precision-recall, which needs pictures",
    ),
    "imagenet-50k-20-steps": Protocol(
        50_000,
        LABELS,
        "DDIM, eta 0",
        20,
        3.0,
        2,
        256,
        ("fid-legacy-tensorflow", "inception-score"),
        True,
        "PTQD (arXiv 2305.10657), LDM-4. ziplab/PTQD: quant_scripts/main_brecq_imagenet.py",
        "the number of pictures and the FID code, which are not in the repository; diffusers has no class-conditional "
        "pipeline for LDM-4: run it on DiT",
    ),
}
