"""The harness on a CUDA device."""

import copy

import pytest
import torch

from qdiff.evaluation import evaluate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `pytest -m gpu` on one"),
]


def test_everything_is_measured_on_a_gpu(tiny_sd, tmp_path):
    reference = tiny_sd()
    candidate = copy.deepcopy(reference)
    with torch.no_grad():
        candidate.unet.conv_in.weight.mul_(1.05)
    for name, pipe in (("reference", reference), ("candidate", candidate)):
        pipe.to(torch.float16).save_pretrained(tmp_path / name)
    settings = {"steps": 4, "guidance_scale": 3.0, "batch_size": 2, "progress": False, "out": tmp_path / "out"}
    prompts = ["red cat", "house", "green apple"]
    report = evaluate(tmp_path / "reference", {"it": tmp_path / "candidate"}, prompts, ("psnr", "ssim"), **settings)
    for name in ("psnr_db", "latent_relative_error", "seconds_per_image", "seconds_per_step", "peak_memory_bytes"):
        assert report.find(name, candidate="it").value > 0
    assert report.find("resident_memory_bytes", candidate="it").value < 1e9  # of this pipeline alone
    assert 0 < report.find("flops_of_ceiling", candidate="it").value < 1
    assert (
        report.find("cold_start_seconds", candidate="it").value > report.find("seconds_per_image", candidate="it").value
    )
    assert report.find("pictures_nan", candidate="it").value == 0
    provenance = report.find("seconds_per_image", candidate="it").provenance
    assert provenance["dtype"] == "torch.float16"


def test_noise_is_that_of_the_cpu(tiny_sd):
    from qdiff.evaluation.generation import Generation, draw
    from qdiff.evaluation.prompts import items_of

    items, generation = items_of(["red cat", "house"]), Generation(steps=4, guidance_scale=3.0)
    on_cpu = draw(tiny_sd(), items, generation)
    on_gpu = draw(tiny_sd().to("cuda"), items, generation)
    assert (on_cpu.pictures.int() - on_gpu.pictures.int()).abs().float().mean() < 1
