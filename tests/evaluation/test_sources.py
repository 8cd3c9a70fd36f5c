import copy
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from qdiff import Calibration, quantize_pipeline, save
from qdiff.evaluation.sources import FolderSource, PipelineSource, source_of

CPU = torch.device("cpu")


@pytest.fixture
def saved(tiny_sd, tmp_path):
    tiny_sd().to(torch.float16).save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def test_a_folder_is_what_it_holds(saved, tmp_path):
    assert isinstance(source_of("it", saved), PipelineSource)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "one.JPG", format="jpeg")
    (tmp_path / "pictures" / ".hidden").write_text("")
    found = source_of("it", str(tmp_path / "pictures"))
    assert isinstance(found, FolderSource)
    assert list(found.pictures) == ["one"]


def test_pipelines_compute_in_float32_on_a_cpu_unless_told_otherwise(saved):
    assert source_of("it", saved).load(CPU).unet.dtype == torch.float32
    assert source_of("it", saved, "bfloat16").load(CPU).unet.dtype == torch.bfloat16


def test_elsewhere_they_compute_in_what_they_are_stored_in(saved):
    source = source_of("it", saved)
    assert source._dtype(source.load(CPU), torch.device("cuda")) == torch.float16


def test_a_quantized_checkpoint_is_loaded_by_its_own_reader(tiny_sd, tmp_path):
    calibration = Calibration(prompts=["red cat"], steps=2)
    pipe = quantize_pipeline(tiny_sd(), recipe="naive", calibration=calibration, progress=False)
    save(pipe, tmp_path / "quantized")
    loaded = source_of("it", tmp_path / "quantized").load(CPU)
    assert loaded.unet.qdiff.plans.keys() == pipe.unet.qdiff.plans.keys()


def test_a_pipelines_id_changes_with_what_it_draws_and_with_nothing_else(tiny_sd, saved):
    pipe = tiny_sd()
    before = PipelineSource("it", pipe).id
    assert PipelineSource("other", copy.deepcopy(pipe)).id == before
    pipe.scheduler.register_to_config(beta_end=0.013)
    assert PipelineSource("it", pipe).id != before
    other = tiny_sd()
    with torch.no_grad():
        other.vae.decoder.conv_out.bias[0] += 1e-4
    assert PipelineSource("it", other).id != before


def test_a_folders_id_changes_with_its_files(saved):
    before = source_of("it", saved).id
    moved = saved.parent / "moved"
    shutil.copytree(saved, moved)
    assert source_of("it", moved).id == before
    path = Path(moved / "scheduler" / "scheduler_config.json")
    path.write_text(path.read_text().replace("0.012", "0.013"))
    assert source_of("it", moved).id != before
