"""save and load: the same pictures, bit for bit; a failing save changes nothing; a bad checkpoint is refused, unrun."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import qdiff
from qdiff import Recipe
from qdiff.plugin import checkpoint
from qdiff.plugin.checkpoint import load, save
from qdiff.plugin.structure import find_denoiser, quantization_of


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit_manifest(folder: Path, **changes: object) -> None:
    """Changes fields of qdiff.json; None deletes one."""
    path = folder / "qdiff.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))


def edit_and_sign(folder: Path, name: str, text: str) -> None:
    """What someone who means harm can do: change a file and its recorded size and hash."""
    (folder / name).write_text(text)
    from qdiff.plugin.directory import fingerprints

    edit_manifest(folder, files={k: v for k, v in fingerprints(folder).items() if k != "qdiff.json"})


@pytest.fixture
def saved(quantized_sd, tmp_path) -> Path:
    save(quantized_sd(), tmp_path / "saved")
    return tmp_path / "saved"


# The round trip


def test_round_trip_is_bit_identical(quantized, tmp_path, generate):
    pipe = quantized()
    expected = generate(pipe)
    save(pipe, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert type(again) is type(pipe)
    state, again_state = (find_denoiser(p)[1].state_dict() for p in (pipe, again))
    assert state.keys() == again_state.keys()
    for key, tensor in state.items():
        assert tensor.dtype == again_state[key].dtype, key
        assert torch.equal(tensor, again_state[key]), key
    assert torch.equal(generate(again), expected)
    assert torch.equal(generate(again, steps=7), generate(pipe, steps=7))


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "naive", "w4a8-static"])
def test_round_trip_of_every_preset(tiny, quantize, shortened, recipe, tmp_path, generate):
    pipe = tiny()
    quantize(pipe, recipe=shortened(Recipe.preset(recipe), pipe))
    expected = generate(pipe)
    assert torch.isfinite(expected).all()
    assert expected.std() > 0
    save(pipe, tmp_path / "saved")
    assert torch.equal(generate(load(tmp_path / "saved")), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_keeps_every_dtype(quantized, dtype, tmp_path, generate):
    pipe = quantized().to(dtype)
    pipe.vae.to(torch.float32)
    save(pipe, tmp_path / "saved")
    again = load(tmp_path / "saved")
    for key, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            before = {name: tensor.dtype for name, tensor in [*part.named_parameters(), *part.named_buffers()]}
            part = again.components[key]
            assert {name: tensor.dtype for name, tensor in [*part.named_parameters(), *part.named_buffers()]} == before
    pipe.vae.to(dtype), again.vae.to(dtype)
    assert torch.equal(generate(again), generate(pipe))


def test_torch_dtype_converts_what_is_floating_point(saved):
    pipe = load(saved, torch_dtype=torch.bfloat16)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    assert pipe.unet.mid_block.resnets[0].conv1.scale.dtype == torch.float32


def test_record_and_scheduler_come_back(quantized, tmp_path):
    pipe = quantized()
    save(pipe, tmp_path / "saved")
    again = load(tmp_path / "saved")
    record, other = (quantization_of(find_denoiser(p)[1]) for p in (pipe, again))
    assert (other.recipe, other.plans, other.kept) == (record.recipe, record.plans, record.kept)
    assert other.tracker.timesteps == record.tracker.timesteps
    config, other_config = (
        {key: value for key, value in p.scheduler.config.items() if not key.startswith("_")} for p in (pipe, again)
    )
    assert other_config == config
    assert str(qdiff.summary(again)) == str(qdiff.summary(pipe))


def test_a_loaded_pipeline_can_be_saved_again_in_place(saved, generate):
    pipe = load(saved)
    expected = generate(pipe)
    save(pipe, saved)
    assert torch.equal(generate(pipe), expected), "its tensors do not depend on the file that was replaced"
    assert torch.equal(generate(load(saved)), expected)


def test_saving_twice_gives_the_same_bytes(quantized_sd, tmp_path):
    pipe = quantized_sd()
    save(pipe, tmp_path / "a")
    save(pipe, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_fresh_process(saved, quantized_sd, tmp_path, generate):
    """Nothing but `import qdiff` and `qdiff.load`: no state of the saving process is needed."""
    program = (
        "import sys, torch, qdiff\n"
        "assert 'diffusers' not in sys.modules, 'only load needs it'\n"
        "pipe = qdiff.load(sys.argv[1])\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "g = torch.Generator('cpu').manual_seed(0)\n"
        "prompts = ['green house', 'red cat']\n"
        "images = pipe(prompt=prompts, num_inference_steps=3, generator=g, output_type='pt').images\n"
        "torch.save(images, sys.argv[2])\n"
    )
    out = tmp_path / "images.pt"
    root = Path(qdiff.__file__).parents[1]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    subprocess.run([sys.executable, "-c", program, saved, out], check=True, env=environment, cwd=tmp_path, timeout=300)
    assert torch.equal(torch.load(out), generate(quantized_sd()))


def test_buffers_that_a_state_dict_leaves_out_are_kept(tiny_dit, quantize, tmp_path):
    pipe = quantize(tiny_dit())
    assert "pos_embed.pos_embed" not in pipe.transformer.state_dict()
    pipe.transformer.pos_embed.pos_embed.mul_(1.5)  # one rebuilt from the configuration would be the original
    save(pipe, tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved").transformer.pos_embed.pos_embed, pipe.transformer.pos_embed.pos_embed)


def test_only_safetensors_and_json(saved):
    assert {path.suffix for path in saved.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".txt"}


def test_plain_diffusers_refuses_the_directory(saved):
    with pytest.raises(Exception, match="diffusion_pytorch_model"):
        StableDiffusionPipeline.from_pretrained(saved)


# A save that fails


def test_disk_full_at_any_file(quantized_sd, saved, monkeypatch, snapshot):
    """Every write but one succeeds: each time another one fails, as it does on a full disk."""
    pipe = quantized_sd()
    pipe.unet.conv_in.weight.data += 1  # so that a half-written checkpoint would show
    before, state = contents(saved.parent), snapshot(pipe)
    original, failed = os.fsync, 0
    while True:
        calls = 0

        def full(descriptor, fatal=failed):
            nonlocal calls
            calls += 1
            if calls - 1 == fatal:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        try:
            save(pipe, saved)
            break
        except OSError as caught:
            error = caught
        assert error.errno == errno.ENOSPC
        assert "what was there is unchanged" in str(error)
        assert "No space left on device" in str(error)
        assert contents(saved.parent) == before
        state.assert_unchanged()
        failed += 1
    assert failed >= len(contents(saved)), "every file was the failing one, once"
    assert contents(saved.parent) != before


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_disk_full_in_the_middle_of_a_file(quantized_sd, saved):
    """The kernel itself refuses to write past a limit, in whatever library the write is; at every file's last byte."""
    import resource

    pipe = quantized_sd()
    before = contents(saved.parent)
    sizes = sorted({len(data) for data in before.values()})
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in sizes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
        try:
            with pytest.raises(OSError, match="what was there is unchanged"):
                save(pipe, saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert contents(saved.parent) == before


@pytest.mark.parametrize("writer", ["save_file", "fingerprints"])
def test_disk_full_in_our_own_writers(quantized_sd, saved, monkeypatch, writer):
    before = contents(saved.parent)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, writer, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save(quantized_sd(), saved)
    assert caught.value.errno == errno.ENOSPC
    assert contents(saved.parent) == before


def test_failing_first_save_leaves_nothing(quantized_sd, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(quantized_sd(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_save_changes_nothing(quantized_sd, saved, monkeypatch):
    before = contents(saved.parent)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(quantized_sd(), saved)
    assert contents(saved.parent) == before


# What save refuses


def test_save_refuses_what_is_not_quantized(tiny_sd, tmp_path):
    with pytest.raises(ValueError, match="not quantized: call quantize_pipeline first"):
        save(tiny_sd(), tmp_path / "saved")
    with pytest.raises(ValueError, match="must be a diffusers pipeline"):
        save(torch.nn.Linear(2, 2), tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_save_deletes_nobody_elses_files(quantized_sd, tmp_path, saved):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(ValueError, match=r"photos holds cat\.png.*save elsewhere"):
        save(quantized_sd(), tmp_path / "photos")
    (saved / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds README\.md"):
        save(quantized_sd(), saved)
    with pytest.raises(ValueError, match="is a file"):
        save(quantized_sd(), tmp_path / "photos" / "cat.png")
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"
    assert (saved / "README.md").read_text() == "mine"


def test_save_into_an_empty_directory(quantized_sd, tmp_path):
    save(quantized_sd(), tmp_path)
    assert (tmp_path / "qdiff.json").is_file()


def test_save_refuses_lora_and_replaced_layers(quantized_sd, tmp_path):
    peft = pytest.importorskip("peft")
    pipe = quantized_sd()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="unload_lora_weights"):
        save(pipe, tmp_path / "saved")
    pipe = quantized_sd()
    pipe.unet.mid_block.resnets[0].conv1 = torch.nn.Conv2d(128, 128, 3, padding=1)
    with pytest.raises(ValueError, match=r"'mid_block\.resnets\.0\.conv1' was replaced"):
        save(pipe, tmp_path / "saved")


# What load refuses


def test_no_checkpoint(tmp_path, tiny_sd):
    with pytest.raises(ValueError, match=r"no qdiff checkpoint at .*nowhere: qdiff\.json is missing"):
        load(tmp_path / "nowhere")
    tiny_sd().save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"qdiff\.json is missing"):
        load(tmp_path / "float")
    (tmp_path / ".gone.0a1b.old").mkdir()
    with pytest.raises(ValueError, match=r"left the old one at .*\.gone\.0a1b\.old"):
        load(tmp_path / "gone")


@pytest.mark.parametrize(("version", "advice"), [(3, "update qdiff"), (1, "quantize the model again")])
def test_another_format(saved, version, advice):
    edit_manifest(saved, format_version=version, layers=None)
    with pytest.raises(ValueError, match=rf"format_version {version}; .*reads 2; {advice}"):
        load(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": "one"}', '{"format_version": 1}'])
def test_damaged_manifest(saved, text):
    (saved / "qdiff.json").write_text(text)
    with pytest.raises(ValueError, match=r"checkpoint .*saved (is damaged|has format_version)"):
        load(saved)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
@pytest.mark.parametrize(
    "name",
    ["unet/qdiff.safetensors", "unet/config.json", "vae/diffusion_pytorch_model.safetensors", "model_index.json"],
)
def test_truncated_file(saved, name, keep):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match=rf"truncated: {name} has \d+ bytes, expected {len(data)}"):
        load(saved)


@pytest.mark.parametrize("name", ["unet/qdiff.safetensors", "text_encoder/model.safetensors"])
def test_one_flipped_bit(saved, name):
    data = bytearray((saved / name).read_bytes())
    data[-5] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"damaged: the sha256 of {name}"):
        load(saved)


def test_missing_file(saved):
    (saved / "unet" / "qdiff.safetensors").unlink()
    with pytest.raises(ValueError, match=r"unet/qdiff\.safetensors is missing"):
        load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: {"layers": {}},
        lambda m: {"layers": m["layers"] | {"no.such.layer": next(iter(m["layers"].values()))}},
        lambda m: {"layers": {k: v | {"rank": 99} for k, v in m["layers"].items()}},
        lambda m: {"layers": {k: {"plan": {}} for k in m["layers"]}},
        lambda m: {"recipe": {"name": "x", "colour": "red"}},
        lambda m: {"timesteps": "soon"},
        lambda m: {"dtypes": {"vae": "load"}},
        lambda m: {"files": []},
        lambda m: {"denoiser": "vae"},
    ],
    ids=[
        "no layers",
        "unknown layer",
        "wrong rank",
        "empty plan",
        "unknown field",
        "timesteps",
        "dtype",
        "files",
        "denoiser",
    ],
)
def test_manifest_that_does_not_fit_the_tensors(saved, change):
    edit_manifest(saved, **change(json.loads((saved / "qdiff.json").read_text())))
    with pytest.raises(ValueError, match=r"checkpoint .*saved is damaged"):
        load(saved)


# Nothing in a checkpoint is run


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_refused(saved, tmp_path):
    mark = tmp_path / "ran"
    edit_and_sign(saved, "unet/diffusers.py", f"open({str(mark)!r}, 'w')")
    with pytest.raises(ValueError, match=r"holds code \(unet/diffusers\.py\)"):
        load(saved)
    assert not mark.exists()


@pytest.mark.parametrize("entry", [["evil", "Model"], ["os", "system"], [["a"], "b"]])
def test_components_of_other_libraries_are_refused(saved, entry):
    index = json.loads((saved / "model_index.json").read_text()) | {"text_encoder": entry}
    edit_and_sign(saved, "model_index.json", json.dumps(index))
    with pytest.raises(ValueError, match="only diffusers and transformers may"):
        load(saved)


@pytest.mark.parametrize("name", [["pipeline", "Evil"], "Evil", "logging", None, "AutoencoderKL"])
def test_other_pipeline_classes_are_refused(saved, name):
    index = json.loads((saved / "model_index.json").read_text()) | {"_class_name": name}
    edit_and_sign(saved, "model_index.json", json.dumps(index))
    with pytest.raises(ValueError, match="which is no DiffusionPipeline of diffusers"):
        load(saved)


@pytest.mark.parametrize("name", ["DDIMScheduler", "nope", 3])
def test_other_denoiser_classes_are_refused(saved, name):
    index = json.loads((saved / "model_index.json").read_text()) | {"unet": ["diffusers", name]}
    edit_and_sign(saved, "model_index.json", json.dumps(index))
    with pytest.raises(ValueError, match="which is no ModelMixin of diffusers"):
        load(saved)


@pytest.mark.parametrize(
    ("name", "pickled"),
    [
        ("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"),
    ],
)
def test_pickles_are_not_read(saved, name, pickled, tmp_path):
    (saved / name).unlink()
    with (saved / pickled).open("wb") as file:
        pickle.dump(Bomb(tmp_path / "ran"), file)
    edit_and_sign(saved, "unet/note.txt", "signed again")
    with pytest.raises((ValueError, OSError)):
        load(saved)
    assert not (tmp_path / "ran").exists()


def test_own_pipeline_class(quantized_sd, tmp_path, generate):
    class Mine(StableDiffusionPipeline):
        pass

    pipe = quantized_sd()
    mine = Mine(**pipe.components, requires_safety_checker=False)
    save(mine, tmp_path / "saved")
    with pytest.raises(ValueError, match="pass pipeline_class"):
        load(tmp_path / "saved")
    again = load(tmp_path / "saved", pipeline_class=Mine)
    assert isinstance(again, Mine)
    assert isinstance(again, DiffusionPipeline)
    assert torch.equal(generate(again), generate(pipe))
