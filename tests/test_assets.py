"""The shipped pipelines: they load with plain diffusers, and fit where they must."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline, StableDiffusionPipeline

ASSETS = Path(__file__).parent.parent / "assets"
PIPELINES = {"emoji-sd": StableDiffusionPipeline, "emoji-dit": DiTPipeline}
TOTAL_BYTES, FILE_BYTES = 60_000_000, 20_000_000


def files():
    return [path for name in PIPELINES for path in (ASSETS / name).rglob("*") if path.is_file()]


def test_they_are_small():
    sizes = {path.relative_to(ASSETS).as_posix(): path.stat().st_size for path in files()}
    assert sum(sizes.values()) <= TOTAL_BYTES
    assert not {name: size for name, size in sizes.items() if size > FILE_BYTES}


@pytest.mark.parametrize("name", PIPELINES)
def test_they_load_with_diffusers_alone_and_draw_something(name):
    pipe = PIPELINES[name].from_pretrained(ASSETS / name)
    pipe.set_progress_bar_config(disable=True)
    subject = "red heart, noto style" if name == "emoji-sd" else pipe.labels["Smileys & Emotion · noto style"]
    picture = pipe(
        [subject],
        num_inference_steps=8,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    assert picture.shape == (64, 64, 3)
    # Icons stand on white and are not white: noise, grey and black all fail one of these.
    corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() > 0.9
    assert picture.std() > 0.15


def test_a_red_heart_is_red():
    pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    heart = pipe("red heart, twemoji style", num_inference_steps=8, generator=generator, output_type="np").images[0]
    red, green, blue = heart[24:40, 24:40].mean((0, 1))
    assert red > 0.7
    assert max(green, blue) < 0.5


def test_weights_are_half_precision_and_finite():
    from safetensors.torch import load_file

    for path in files():
        if path.suffix == ".safetensors":
            for key, tensor in load_file(path).items():
                assert tensor.dtype in (torch.float16, torch.int64), (path, key)
                assert torch.isfinite(tensor.float()).all(), (path, key)


def test_held_out_captions_keep_their_names_in_training_data():
    held_out = json.loads((ASSETS / "emoji-heldout.json").read_text())
    assert len(held_out) == 500
    assert len({entry["name"] for entry in held_out}) == 500  # one style a name: three others were trained on


def test_the_training_log_covers_every_stage():
    records = [json.loads(line) for line in (ASSETS / "emoji-training-log.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in records} == {"vae", "decoder", "sd", "dit"}
    assert all({"step", "seconds", "loss", "device"} <= record.keys() for record in records)
