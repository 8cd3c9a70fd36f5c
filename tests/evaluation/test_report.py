import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdiff.evaluation import Record, Report
from qdiff.evaluation.report import environment

SAMPLES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20)


@given(SAMPLES)
def test_the_mean_lies_in_its_interval(samples):
    record = Record.mean("x", samples)
    slack = 1e-9 * (1 + max(map(abs, samples)))  # rounding of the resampled means
    assert record.low - slack <= record.value <= record.high + slack
    assert record.n == len(samples)
    assert record == Record.mean("x", samples)


def test_the_interval_is_that_of_the_normal_approximation():
    samples = np.random.default_rng(1).normal(10, 2, size=400)
    record = Record.mean("x", samples)
    half_width = 1.96 * samples.std(ddof=1) / math.sqrt(400)
    # Percentile bootstrap against the central limit theorem, 2,000 resamples: within 10 %.
    assert record.high - record.value == pytest.approx(half_width, rel=0.1)
    assert record.value - record.low == pytest.approx(half_width, rel=0.1)


@pytest.mark.parametrize("samples", [[], [1.0, math.nan]], ids=["none", "nan"])
def test_samples_without_a_mean_are_refused(samples):
    with pytest.raises(ValueError, match="samples of 'x'"):
        Record.mean("x", samples)


def test_identical_pictures_give_an_infinite_mean():
    assert Record.mean("psnr_db", [30.0, math.inf]).value == math.inf


def report():
    return Report(
        title="A test",
        records=(Record.mean("psnr_db", [20.0, 22.0], recipe="a"), Record.mean("psnr_db", [math.inf], recipe="b")),
        settings={"steps": 20},
        series={"drift": [0.1, 0.2]},
    )


def test_json_round_trip(tmp_path):
    path = report().write(tmp_path / "new" / "report.json")
    assert Report.from_json(path.read_text()) == report()


def test_records_are_found_by_tag():
    assert report().find("psnr_db", recipe="a").value == 21
    with pytest.raises(KeyError, match="found 2"):
        report().find("psnr_db")
    with pytest.raises(KeyError, match="found 0"):
        report().find("ssim")


def test_another_version_is_refused():
    text = report().to_json().replace('"version": 2', '"version": 99')
    with pytest.raises(ValueError, match="version 1 to 2"):
        Report.from_json(text)


def test_the_environment_names_what_a_figure_depends_on():
    assert {"python", "cores", "torch", "diffusers"} <= environment().keys()


def test_provenance_goes_with_the_record():
    record = Record.exact("fid", 3.0).sourced({"resize": "clean"}).sourced({"package": "clean-fid 0.1.35"})
    assert record.provenance == {"resize": "clean", "package": "clean-fid 0.1.35"}
    again = Report.from_json(Report("A test", (record,)).to_json())
    assert again.records == (record,)


def test_version_1_is_read_as_having_no_provenance():
    data = json.loads(report().to_json())
    data["version"] = 1
    for name in ("tables", "pairs"):
        del data[name]
    for record in data["records"]:
        del record["provenance"]
    assert Report.from_json(json.dumps(data)) == report()
