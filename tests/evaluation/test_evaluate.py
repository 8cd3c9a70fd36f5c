"""`evaluate` on tiny pipelines and on folders of pictures; what it refuses is in test_bad_input.py."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from qdiff.evaluation import Record, Report, evaluate
from qdiff.evaluation.metrics import Metric, registry
from qdiff.evaluation.metrics.features import Features
from qdiff.evaluation.metrics.frechet import FrechetDistance
from qdiff.evaluation.pictures import PictureStore
from qdiff.evaluation.prompts import Item
from qdiff.evaluation.weights import Found

PROMPTS = [
    Item(index, prompt, 10 + index, group)
    for index, (prompt, group) in enumerate(
        [("red cat", "cats"), ("house", "houses"), ("green cat", "cats"), ("red house", "houses"), ("apple", None)]
    )
]
QUICK = {"steps": 2, "guidance_scale": 3.0, "batch_size": 2, "costs": False, "drift": 0, "progress": False}


def changed(pipe, amount=0.02):
    """A pipeline that draws something near."""
    generator = torch.Generator().manual_seed(0)
    pipe = copy.deepcopy(pipe)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1 + amount * torch.randn(parameter.shape, generator=generator))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipes(tiny_sd):
    reference = tiny_sd()
    return reference, {"near": changed(reference, 0.01), "far": changed(reference, 0.1)}


def figures(report):
    return {(r.name, *sorted(r.tags.items())): (r.value, r.low, r.high, r.n) for r in report.records}


def test_candidates_are_compared_with_the_reference(pipes, tmp_path):
    reference, candidates = pipes
    report = evaluate(reference, candidates, PROMPTS, ("psnr", "ssim"), out=tmp_path, **QUICK)
    near, far = (
        next(r for r in report.records if r.name == "psnr_db" and r.tags == {"candidate": name}) for name in candidates
    )
    assert near.n == far.n == 5
    assert near.value > far.value
    assert near.low <= near.value <= near.high
    assert {r.tags["group"] for r in report.records if "group" in r.tags} == {"cats", "houses"}
    assert report.find("psnr_db_group_gap", candidate="far").value >= 0
    assert report.find("pictures_nan", candidate="near").value == 0
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.html").is_file()
    assert "psnr" in (tmp_path / "report.md").read_text().lower()
    pair = next(pair for pair in report.pairs if pair["candidate"] == "far")
    assert (tmp_path / pair["reference_png"]).is_file()
    assert (tmp_path / pair["candidate_png"]).is_file()
    worst_first = [pair["psnr_db"] for pair in report.pairs if pair["candidate"] == "far"]
    assert worst_first == sorted(worst_first)


def test_psnr_is_that_of_the_pictures_on_disk(pipes, tmp_path):
    reference, candidates = pipes
    report = evaluate(reference, {"far": candidates["far"]}, PROMPTS, ("psnr",), out=tmp_path, **QUICK)
    for pair in report.pairs:
        one, other = (
            np.asarray(Image.open(tmp_path / pair[side]), float) for side in ("reference_png", "candidate_png")
        )
        assert pair["psnr_db"] == pytest.approx(10 * np.log10(255**2 / np.square(one - other).mean()), rel=1e-5)


def test_nothing_is_drawn_or_measured_twice(pipes, tmp_path, monkeypatch):
    reference, candidates = pipes
    first = evaluate(reference, candidates, PROMPTS[:3], ("psnr",), out=tmp_path, **QUICK)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    rows = sorted(path.read_bytes() for path in tmp_path.rglob("*.keys"))
    calls = []
    monkeypatch.setattr("qdiff.evaluation.drawing.draw", lambda *args: calls.append(args))
    again = evaluate(reference, candidates, PROMPTS[:3], ("psnr",), out=tmp_path, **QUICK)
    assert calls == []
    assert figures(again) == figures(first)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")} == made
    assert sorted(path.read_bytes() for path in tmp_path.rglob("*.keys")) == rows
    monkeypatch.undo()
    more = evaluate(reference, candidates, PROMPTS, ("psnr", "ssim"), out=tmp_path, **QUICK)
    assert {path: path.stat().st_mtime_ns for path in made} == made  # the pictures of before serve more metrics
    assert figures(more) == figures(
        evaluate(reference, candidates, PROMPTS, ("psnr", "ssim"), out=tmp_path / "at-once", **QUICK)
    )


def test_flawed_pictures_are_counted_named_and_left_out(tiny_sd, tmp_path):
    reference, candidate = tiny_sd(), changed(tiny_sd())
    whole = evaluate(reference, {"it": candidate}, PROMPTS, ("psnr",), out=tmp_path / "whole", **QUICK)
    shutil.copytree(tmp_path / "whole" / "pictures", tmp_path / "flawed" / "pictures")
    paths = {pair["prompt"]: tmp_path / "flawed" / pair["candidate_png"] for pair in whole.pairs}
    Image.new("RGB", (16, 16)).save(paths["apple"])
    path = paths["house"]
    PictureStore(path.parent).write(path.stem, torch.zeros(3, 16, 16, dtype=torch.uint8), finite=False)
    with pytest.warns(UserWarning, match="it: pictures left out of every metric: 1 nan, 1 black of 5"):
        report = evaluate(reference, {"it": candidate}, PROMPTS, ("psnr",), out=tmp_path / "flawed", **QUICK)
    assert report.find("pictures_black", candidate="it").value == 1
    assert report.find("pictures_nan", candidate="it").value == 1
    assert report.settings["left_out"] == {"it": {"nan": ["house"], "black": ["apple"]}}
    kept = [pair["psnr_db"] for pair in whole.pairs if pair["prompt"] not in ("apple", "house")]
    psnr = next(r for r in report.records if r.name == "psnr_db" and "group" not in r.tags)
    assert (psnr.n, psnr.value) == (3, pytest.approx(np.mean(kept), rel=1e-6))


def test_folders_of_pictures_are_paired_by_name(pipes, tmp_path):
    reference, candidates = pipes
    drawn = evaluate(reference, {"far": candidates["far"]}, PROMPTS, ("psnr",), out=tmp_path / "drawn", **QUICK)
    for pair in drawn.pairs:
        for side in ("reference", "candidate"):
            (tmp_path / side).mkdir(exist_ok=True)
            shutil.copy(tmp_path / "drawn" / pair[f"{side}_png"], tmp_path / side / f"{pair['prompt']}.png")
    report = evaluate(
        tmp_path / "reference", {"far": tmp_path / "candidate"}, metrics=("psnr",), out=tmp_path / "out", **QUICK
    )
    expected = next(r for r in drawn.records if r.name == "psnr_db" and "group" not in r.tags)
    assert report.find("psnr_db", candidate="far").value == pytest.approx(expected.value)
    named = [Item(i, item.prompt, i, reference=tmp_path / f"{item.prompt}.png") for i, item in enumerate(PROMPTS)]
    by_reference = evaluate(
        tmp_path / "reference", {"far": tmp_path / "candidate"}, named, ("psnr",), out=tmp_path / "named", **QUICK
    )
    assert by_reference.find("psnr_db", candidate="far").value == pytest.approx(expected.value)


class MeanColour(Metric):
    """A metric that compares sets: the distance of mean colours."""

    name = feature_key = "mean-colour"
    compares_sets = True
    higher_is_better = False

    def provenance(self):
        return {}

    def rows(self, candidate, reference=None, prompts=None):
        return candidate.float().mean((2, 3))

    def reduce(self, candidate, reference=None, tags=None):
        value = float(np.linalg.norm(candidate.mean(0) - reference.mean(0)))
        return [Record("mean_colour", value, value, value, len(candidate), tags or {}, {"m": str(len(reference))})]


@pytest.fixture
def mean_colour(monkeypatch):
    monkeypatch.setitem(registry.REGISTRY, "mean-colour", lambda weights, device: MeanColour())


def test_sets_of_other_sizes_are_compared_as_sets(tiny_sd, tmp_path, mean_colour):
    (tmp_path / "real").mkdir()
    for index in range(7):  # photographs need not have one size either
        Image.new("RGB", (20 + index, 30), (10 * index, 200, 30)).save(tmp_path / "real" / f"{index}.jpg")
    report = evaluate(tmp_path / "real", {"it": tiny_sd()}, PROMPTS, ("mean-colour",), out=tmp_path / "out", **QUICK)
    record = report.find("mean_colour", candidate="it")
    assert (record.n, record.provenance) == (5, {"m": "7"})
    assert report.settings["pictures"] == {"reference": 7, "it": 5}


class Colours(Features):
    """Three features of a picture: its mean colour."""

    name, width, resize = "colours", 3, "none"

    def provenance(self):
        return {"package": "none"}

    def load(self):
        pass

    def extract(self, pictures):
        return pictures.float().mean((2, 3))


def test_statistics_of_real_pictures_are_kept_and_serve_in_their_place(tiny_sd, tmp_path, monkeypatch):
    distance = FrechetDistance(Colours(Found(tmp_path, "0" * 64), torch.device("cpu")))
    monkeypatch.setitem(registry.REGISTRY, "fd-colours", lambda weights, device: distance)
    (tmp_path / "real").mkdir()
    for index in range(4):
        Image.new("RGB", (20, 30), (60 * index, 200, 30 * index**2)).save(tmp_path / "real" / f"{index}.png")

    def evaluated(reference, out):
        return evaluate(reference, {"it": pipe}, PROMPTS, ("fd-colours",), out=tmp_path / out, **QUICK)

    pipe = tiny_sd()
    from_pictures = evaluated(tmp_path / "real", "one")
    kept = tmp_path / "one" / from_pictures.settings["statistics"]["fd-colours"]
    from_statistics = evaluated(kept, "two")
    one, other = (report.find("fd_colours", candidate="it") for report in (from_pictures, from_statistics))
    assert one.value > 0
    assert other.value == pytest.approx(one.value, rel=1e-9)
    assert from_statistics.settings["statistics"] == {}
    written = kept.stat().st_mtime_ns
    evaluated(tmp_path / "real", "one")
    assert kept.stat().st_mtime_ns == written


def test_class_labels_are_drawn_and_paired(tiny_dit, tmp_path):
    candidate = tiny_dit()
    with torch.no_grad():
        candidate.transformer.pos_embed.proj.weight.mul_(1.1)
    report = evaluate(tiny_dit(), {"it": candidate}, [3, 5, 7], ("psnr",), out=tmp_path, **QUICK)
    assert report.find("psnr_db", candidate="it").n == 3


def test_json_is_the_published_schema(pipes, tmp_path):
    reference, candidates = pipes
    evaluate(reference, candidates, PROMPTS, ("psnr",), out=tmp_path, **QUICK)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["version"] == 2
    assert set(data["records"][0]) == {"name", "value", "low", "high", "n", "tags", "provenance"}
    assert data["settings"]["steps"] == 2
