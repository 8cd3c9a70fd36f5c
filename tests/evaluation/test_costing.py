import shutil
import sys

import pytest
import torch
from torch import nn

from qdiff.evaluation import evaluate, flops
from qdiff.evaluation.costing import costs_of_folder, measure_costs
from qdiff.evaluation.energy import energy_counter
from qdiff.evaluation.flops import Ceilings, count_first_call, matmul_flops_per_second
from qdiff.evaluation.generation import Generation
from qdiff.evaluation.prompts import items_of
from qdiff.evaluation.sources import PipelineSource
from qdiff.evaluation.timing import Marks, median_and_range, step_marks

CPU = torch.device("cpu")
GENERATION = Generation(steps=3, guidance_scale=3.0)


def test_a_loaded_pipeline_is_timed_where_it_is(tiny_sd):
    pipe = tiny_sd()
    costs = measure_costs(pipe, items_of(["red cat", "house"]), GENERATION)
    assert len(costs.samples["seconds_per_image"]) == 3
    assert len(costs.samples["seconds_per_step"]) == 3 * 2  # three runs, from the first step's end to the last's
    assert costs.samples["stored_bytes"] == [2.0 * sum(p.numel() for p in pipe.unet.parameters())]
    costs.compare_with(Ceilings(), CPU)
    assert 0 < costs.samples["flops_of_ceiling"][0] < 2
    assert "peak_memory_bytes" in costs.not_measured
    by_name = {record.name: record for record in costs.records({"candidate": "it"})}
    image = by_name["seconds_per_image"]
    assert image.low <= image.value <= image.high
    assert image.provenance == {"device": image.provenance["device"], "dtype": "torch.float32", "batch": "2"}
    assert "TFLOP/s" in by_name["flops_of_ceiling"].provenance["ceiling"]
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.slow
def test_a_folder_is_measured_in_a_fresh_process(tiny_sd, tmp_path):
    tiny_sd().save_pretrained(tmp_path / "pipe")
    ballast = torch.ones(400_000_000, dtype=torch.uint8)  # which the fresh process does not have
    source = PipelineSource("it", tmp_path / "pipe")
    costs = costs_of_folder(source, items_of(["red cat"]), GENERATION, CPU)
    assert ballast.all()
    assert costs.samples["cold_start_seconds"][0] > costs.samples["seconds_per_image"][0]
    assert 1e8 < costs.samples["resident_memory_bytes"][0] <= costs.samples["peak_memory_bytes"][0] < 2e9
    sizes = sum(path.stat().st_size for path in (tmp_path / "pipe").rglob("*") if path.is_file())
    assert costs.samples["disk_bytes"] == [sizes]


def test_a_fresh_process_that_dies_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="measuring the cost of it failed with exit code 1"):
        costs_of_folder(PipelineSource("it", tmp_path), items_of(["red cat"]), GENERATION, CPU)


def test_operations_are_counted_once_and_the_same_when_quantized(quantized_once):
    reference, quantized = quantized_once
    x, time, text = torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 7, 64)
    counts = []
    for unet in (reference.unet, quantized.unet):
        with torch.no_grad(), count_first_call(unet) as found:
            unet(x, time, text)
            unet(x, time, text)
        counts += found
    assert len(counts) == 2
    assert counts[0] == counts[1] > 0


@pytest.fixture(scope="module")
def quantized_once(tiny_sd):
    from qdiff import Calibration, quantize_pipeline

    calibration = Calibration(prompts=["red cat"], steps=2)
    return tiny_sd(), quantize_pipeline(tiny_sd(), recipe="naive", calibration=calibration, progress=False)


def test_a_product_counts_two_operations_a_multiplication():
    layer = nn.Linear(8, 16)
    with count_first_call(layer) as counts:
        layer(torch.randn(4, 8))
    assert counts == [2 * 4 * 8 * 16]
    assert matmul_flops_per_second(CPU, torch.float32) > 1e8


def test_the_ceiling_is_measured_once_for_each_device_and_dtype(monkeypatch):
    measured = []
    monkeypatch.setattr(flops, "matmul_flops_per_second", lambda *what: measured.append(what) or 10.0 * len(measured))
    ceilings = Ceilings()
    asked = [("cuda:0", "float16"), ("cuda:0", "float16"), ("cuda:0", "float32"), ("cuda:1", "float16")]
    found = [ceilings.of(torch.device(device), f"torch.{dtype}") for device, dtype in asked]
    assert found == [10.0, 10.0, 20.0, 30.0]
    assert measured[1] == (torch.device("cuda:0"), torch.float32)


def test_sources_of_one_run_share_their_ceiling(tiny_sd, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(flops, "matmul_flops_per_second", lambda *what: measured.append(what) or 1e12)
    pipes = tiny_sd(), {"one": tiny_sd(), "two": tiny_sd()}
    report = evaluate(*pipes, ["red cat"], ("psnr",), out=tmp_path, steps=2, drift=0, progress=False)
    assert len(measured) == 1
    records = [record for record in report.records if record.name == "flops_of_ceiling"]
    assert {record.tags["candidate"] for record in records} == {"reference", "one", "two"}
    assert {record.provenance["ceiling"] for record in records} == {"1 TFLOP/s, a square product in torch.float32"}


def test_marks_and_medians():
    marks = Marks(CPU)
    for _ in range(3):
        marks.mark()
    assert len(marks.seconds()) == 2
    assert all(second >= 0 for second in marks.seconds())
    assert median_and_range([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert median_and_range([4.0, 1.0]) == (2.5, 1.0, 4.0)


def test_the_scheduler_gets_its_step_back_after_an_error(tiny_sd):
    scheduler = tiny_sd().scheduler
    with pytest.raises(KeyError), step_marks(scheduler, CPU):
        raise KeyError("anything")
    assert "step" not in vars(scheduler)


def rapl(folder, packages):
    for index, (energy, most) in enumerate(packages):
        zone = folder / f"intel-rapl:{index}"
        (zone / "core").mkdir(parents=True, exist_ok=True)
        (folder / f"intel-rapl:{index}:0").mkdir(exist_ok=True)  # a part of the package: not to be added
        (zone / "energy_uj").write_text(str(energy))
        (zone / "max_energy_range_uj").write_text(str(most))


def test_joules_of_all_packages_go_on_after_their_range(tmp_path):
    rapl(tmp_path, [(900, 1000), (10, 10**9)])
    counter = energy_counter(CPU, tmp_path)
    assert counter() == 0
    rapl(tmp_path, [(99, 1000), (2_000_010, 10**9)])
    assert counter() == pytest.approx((200 + 2_000_000) / 1e6)
    assert counter() == pytest.approx((200 + 2_000_000) / 1e6)


def test_where_nothing_counts_joules_it_is_said(tmp_path):
    assert "no RAPL counters" in energy_counter(CPU, tmp_path)
    (tmp_path / "intel-rapl:0").mkdir()
    assert "cannot be read" in energy_counter(CPU, tmp_path)
