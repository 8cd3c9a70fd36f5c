import numpy as np
import pytest
from PIL import Image

from qdiff.evaluation import Record, Report

BLOCK = 16  # pixels: a picture of 8 x 8 blocks of one colour each, so that a screenshot's pixel can be looked up
STYLES = ("noto", "openmoji", "twemoji", "fluent")
DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
QUALITY = {"w4a8": 27.9, "naive w4a8": 13.2, "SDNQ int4": 24.4}
BYTES = {"reference": 23.4e6, "w4a8": 7.5e6, "naive w4a8": 6.4e6, "SDNQ int4": 7.6e6}
SECONDS = {"reference": 0.412, "w4a8": 0.233, "naive w4a8": 0.228, "SDNQ int4": 0.47}


SETTINGS = {
    "reference": "reference",
    "pictures": {"reference": 2000, "w4a8": 2000},
    "steps": 20,
    "guidance_scale": 4.0,
    "sources": {"reference": {"id": "5ad1", "from": "assets/emoji-sd"}},
    "not_measured": {
        "cold_start_seconds/w4a8": "known of a pipeline's folder alone",
        "joules_per_image/reference": "no counter",
        "joules_per_image/w4a8": "no counter",
    },
    "left_out": {"naive w4a8": {"black": ["a cat, noto style", "a house, noto style"]}},
}


def likeness_records(name, psnr, rng):
    lpips = {"backbone": "alex", "package": "lpips 0.1.4", "weights_sha256": DIGEST, "resize": "none"}
    tags = {"candidate": name}
    worst = STYLES[2]
    error = 0.6 / psnr
    gap = 9.6 if name == "naive w4a8" else 0.8
    records = [
        Record.mean("psnr_db", rng.normal(psnr, 3, 2000), **tags).sourced({"package": "torchmetrics 1.9.0"}),
        Record("ssim", 1 - 2 * error, 1 - 2.1 * error, 1 - 1.9 * error, 2000, tags, {"package": "torchmetrics 1.9.0"}),
        Record("lpips_alex", 3 * error, 2.9 * error, 3.1 * error, 2000, tags, lpips),
        Record("psnr_db_group_gap", gap, gap - 0.5, gap + 0.5, 2000, tags, {"worst": worst, "best": STYLES[0]}),
        Record.exact("psnr_db_group_p_value", 0.0002 if gap > 1 else 0.41, **tags),
        Record("psnr_db_worst_group", psnr - gap, psnr - gap - 0.4, psnr - gap + 0.4, 500, tags),
    ]
    for index, style in enumerate(STYLES):
        value = psnr - gap * (style == worst) + 0.2 * index
        records.append(Record("psnr_db", value, value - 0.4, value + 0.4, 500, {**tags, "group": style}))
        records.append(
            Record("ssim", 0.9 - 0.02 * index, 0.88 - 0.02 * index, 0.91 - 0.02 * index, 500, {**tags, "group": style})
        )
    return records


def cost_records(name):
    fd = {"backbone": "efficientnet-lite0", "resize": "clean", "warning": "2,000 pictures for 1,280 features"}
    distance = 700 / QUALITY.get(name, 60)
    seconds, tags = SECONDS[name], {"candidate": name}
    device = {"device": "NVIDIA H200", "dtype": "float16", "batch": "16"}
    return [
        Record("fd_efficientnet_lite0", distance, 0.96 * distance, 1.05 * distance, 2000, tags, fd),
        Record("seconds_per_image", seconds, seconds * 0.97, seconds * 1.05, 3, tags, device),
        Record.exact("stored_bytes", BYTES[name], **tags),
        Record("joules_per_image", 500 * seconds, 490 * seconds, 520 * seconds, 3, tags, device),
        Record.exact("pictures_black", 2 if name == "naive w4a8" else 0, **tags),
        Record.exact("pictures_nan", 0, **tags),
    ]


def picture(rng, base, spread):
    blocks = np.clip(rng.normal(base, spread, size=(8, 8, 3)), 0, 255).round().astype(np.uint8)
    return Image.fromarray(blocks.repeat(BLOCK, 0).repeat(BLOCK, 1))


def draw_pairs(folder, rng):
    (folder / "pictures").mkdir(parents=True)
    pairs = []
    for index in range(10):
        picture(rng, (230, 120, 60), 20).save(folder / f"pictures/full-{index}.png")
        for name, psnr in QUALITY.items():
            path = f"pictures/{name.replace(' ', '-')}-{index}.png"
            picture(rng, (60, 120, 230), 20).save(folder / path)
            pairs.append(
                {
                    "key": f"{index:03}",
                    "prompt": f"prompt {index} <b>of many</b>, {STYLES[index % 4]} style",
                    "group": STYLES[index % 4],
                    "candidate": name,
                    "reference_png": f"pictures/full-{index}.png",
                    "candidate_png": path,
                    "psnr_db": psnr - 8 + index,
                }
            )
    return tuple(pairs)


def layer_table(rng, scale):
    """The layers of a UNet by their diffusers names, each worse in the first steps."""
    rows = ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2"]
    for place in (
        "down_blocks.0",
        "down_blocks.1",
        "down_blocks.2",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
        "up_blocks.2",
    ):
        for block in range(2):
            rows += [f"{place}.resnets.{block}.{layer}" for layer in ("conv1", "conv2", "time_emb_proj")]
            attention = f"{place}.attentions.{block}"
            rows += [f"{attention}.proj_in", f"{attention}.proj_out"]
            layers = (
                "attn1.to_q",
                "attn1.to_k",
                "attn1.to_v",
                "attn1.to_out.0",
                "attn2.to_q",
                "ff.net.0.proj",
                "ff.net.2",
            )
            rows += [f"{attention}.transformer_blocks.0.{layer}" for layer in layers]
    columns = [951 - 50 * step for step in range(20)]
    decay = np.linspace(1.5, 0.5, 20)
    values = scale * rng.lognormal(0, 0.6, size=(len(rows), 1)) * decay * rng.uniform(0.8, 1.2, size=(len(rows), 20))
    return {"rows": rows, "columns": columns, "values": values.tolist()}


def fabricate(folder):
    """A report as an evaluation writes it, and its pictures in the folder."""
    rng = np.random.default_rng(0)
    records = cost_records("reference")
    for name, psnr in QUALITY.items():
        records += likeness_records(name, psnr, rng) + cost_records(name)
    drift = {f"drift/{name}": (np.linspace(0.1, 1, 20) ** 2 * 6 / psnr).tolist() for name, psnr in QUALITY.items()}
    return Report(
        "emoji-sd: three ways to 4 bits",
        tuple(records),
        SETTINGS,
        drift,
        {f"layer-error/{name}": layer_table(rng, 1 / psnr) for name, psnr in QUALITY.items()},
        draw_pairs(folder, rng),
    )


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory):
    """(folder, report) of a fabricated evaluation of three candidates; not to be changed."""
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, fabricate(folder)
