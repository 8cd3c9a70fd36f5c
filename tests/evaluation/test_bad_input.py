"""What `evaluate` refuses, before anything is drawn, and what it says."""

import pytest
import torch
from PIL import Image

from qdiff.evaluation import evaluate, run
from qdiff.evaluation.generation import Generation, draw
from qdiff.evaluation.pipeline_facts import facts_of
from qdiff.evaluation.prompts import Item
from qdiff.evaluation.sources import source_of

QUICK = {"steps": 1, "batch_size": 2, "costs": False, "drift": 0, "progress": False}


def pictures(folder, names, size=(16, 16)):
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        Image.new("RGB", size, (200, 10 * index, 90)).save(folder / name)
    return folder


@pytest.fixture
def folders(tmp_path):
    return pictures(tmp_path / "before", ["a.png", "b.png"]), pictures(tmp_path / "after", ["a.png", "b.png"])


def refused(reference, candidates, *args, match, error=ValueError, **options):
    with pytest.raises(error, match=match):
        evaluate(reference, candidates, *args, **{**QUICK, "metrics": ("psnr",), **options})


def test_counts_that_differ(folders, tmp_path):
    before, after = folders
    pictures(after, ["c.png"])
    refused(before, {"it": after}, out=tmp_path / "o", match=r"reference has 2, it has 3; c is in .*after and not in")


def test_sizes_that_differ(folders, tmp_path):
    before, after = folders
    pictures(after, ["b.png"], size=(16, 24))
    match = r"after/b\.png is 16x24, .*before/b\.png is 16x16"
    refused(before, {"it": after}, out=tmp_path / "o", match=match)


def test_a_folder_with_something_else(folders, tmp_path):
    before, after = folders
    (after / "notes.txt").write_text("hello")
    refused(before, {"it": after}, out=tmp_path / "o", match=r"it: .*after must hold pictures .*got notes\.txt")


def test_a_picture_that_is_none(folders, tmp_path):
    before, after = folders
    (after / "b.png").write_text("hello")
    refused(before, {"it": after}, out=tmp_path / "o", match=r"b\.png is no picture")


def test_a_picture_that_vanishes_during_the_run(folders, tmp_path, monkeypatch):
    before, after = folders
    draw_and_measure = run.draw_and_measure

    def once_it_is_gone(source, *rest):
        (after / "b.png").unlink(missing_ok=True)
        draw_and_measure(source, *rest)

    monkeypatch.setattr(run, "draw_and_measure", once_it_is_gone)
    refused(before, {"it": after}, out=tmp_path / "o", match=r"b.png: expected a picture, as there was when this run")


def test_an_empty_folder_and_a_missing_one(folders, tmp_path):
    before, _ = folders
    (tmp_path / "empty").mkdir()
    refused(before, {"it": tmp_path / "empty"}, out=tmp_path / "o", match="is empty")
    refused(before, {"it": tmp_path / "none"}, out=tmp_path / "o", match="no folder", error=FileNotFoundError)


def test_the_same_name_twice(tmp_path):
    folder = pictures(tmp_path / "twice", ["a.png", "a.jpg"])
    with pytest.raises(ValueError, match="two pictures called a"):
        source_of("it", folder)


def test_all_black(folders, tmp_path):
    before, after = folders
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16)).save(after / name)
    with pytest.warns(UserWarning, match="2 black of 2"):
        refused(before, {"it": after}, out=tmp_path / "o", match="psnr: every picture of it is black or NaN")


def test_prompts_that_are_missing_or_malformed(tiny_sd, folders, tmp_path):
    pipe = tiny_sd()
    refused(pipe, {"it": tiny_sd()}, out=tmp_path / "o", match="reference is a pipeline: it needs prompts")
    (tmp_path / "p.txt").write_text("\n")
    refused(pipe, {"it": tiny_sd()}, tmp_path / "p.txt", out=tmp_path / "o", match="has no prompt")
    refused(pipe, {"it": folders[0]}, ["red cat", "house"], out=tmp_path / "o", match=r"none called 0 for prompt 0")
    assert not (tmp_path / "o").exists()


def test_class_labels_for_a_text_metric(tiny_dit, tmp_path, monkeypatch):
    from qdiff.evaluation.metrics import registry
    from qdiff.evaluation.metrics.pixels import Psnr

    class NeedsText(Psnr):
        needs_prompts = True

    monkeypatch.setitem(registry.REGISTRY, "text", lambda weights, device: NeedsText(device))
    refused(tiny_dit(), {"it": tiny_dit()}, [3], out=tmp_path / "o", metrics=("text",), match="got class labels")
    names = pictures(tmp_path / "a", ["a.png"]), pictures(tmp_path / "b", ["a.png"])
    refused(names[0], {"it": names[1]}, out=tmp_path / "o", metrics=("text",), match="got no prompts")


@pytest.mark.parametrize(
    ("candidates", "options", "match"),
    [
        pytest.param({}, {}, "candidates must be one or more", id="none"),
        pytest.param({"reference": "x"}, {}, "none called 'reference'", id="name-taken"),
        pytest.param({"it": 7}, {}, "it must be a diffusers pipeline", id="no-source"),
        pytest.param({"it": "."}, {"metrics": ("psnrr",)}, "unknown metric 'psnrr'", id="metric"),
        pytest.param({"it": "."}, {"steps": 0}, "steps must be 1 or more", id="steps"),
        pytest.param({"it": "."}, {"dtype": "int8"}, "dtype must be auto", id="dtype"),
    ],
)
def test_arguments(folders, tmp_path, candidates, options, match):
    refused(folders[0], candidates, out=tmp_path / "o", match=match, **options)


def test_pairs_with_statistics(folders, tmp_path):
    import numpy as np

    from qdiff.evaluation.metrics import Statistics

    statistics = Statistics(5, np.zeros(3), np.eye(3), "some-features")
    path = statistics.save(tmp_path / "real.npz")
    refused(path, {"it": folders[0]}, out=tmp_path / "o", match="the reference is saved statistics")
    items = [Item(0, "a", 0, reference=folders[0] / "a.png")]
    refused(
        path,
        {"it": folders[0]},
        items,
        out=tmp_path / "o",
        metrics=("fd-efficientnet-lite0",),
        match="some-features",
    )
    assert not (tmp_path / "o").exists()
    refused(path, {"it": folders[0]}, out=tmp_path / "o", metrics=("kd-efficientnet-lite0",), match="single pictures")


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing anything fails the test."""
    monkeypatch.setattr("qdiff.evaluation.drawing.draw", lambda *_: pytest.fail("drawn"))


@pytest.mark.parametrize("saved", [False, True], ids=["in-memory", "in-a-folder"])
def test_pictures_that_are_too_small_are_refused_before_the_first_one(tiny_sd, undrawn, tmp_path, saved):
    reference = candidate = tiny_sd()
    if saved:
        reference.save_pretrained(tmp_path / "sd")
        reference = candidate = tmp_path / "sd"
    match = r"ms_ssim needs pictures of 176 pixels a side or more: reference draws 16x16"
    refused(reference, {"it": candidate}, ["red cat"], metrics=("ms_ssim",), out=tmp_path / "o", match=match)
    # The pipeline's own size does not matter where it is told another.
    match = r"ms_ssim needs .* reference draws 512x160"
    size = {"width": 512, "height": 160}
    refused(reference, {"it": candidate}, ["red cat"], metrics=("ms_ssim",), out=tmp_path / "o", match=match, **size)


def test_pictures_that_are_too_few_are_refused_before_the_first_one(tiny_sd, undrawn, tmp_path):
    for metric, fewest in (("precision-recall-efficientnet-lite0", 4), ("kd-efficientnet-lite0", 2)):
        match = f"{metric} needs {fewest} pictures or more: reference has {fewest - 1}"
        prompts = ["red cat"] * (fewest - 1)
        refused(tiny_sd(), {"it": tiny_sd()}, prompts, metrics=(metric,), out=tmp_path / "o", match=match)


def test_sizes_of_a_pipeline_and_of_a_folder_that_differ_are_refused_before_the_first_one(tiny_sd, undrawn, tmp_path):
    after = pictures(tmp_path / "after", ["0.png"], size=(16, 24))
    match = r"after/0\.png is 16x24, reference draws 16x16"
    refused(tiny_sd(), {"it": after}, ["red cat"], out=tmp_path / "o", match=match)


def test_a_candidate_that_takes_other_prompts_is_refused_before_the_reference_is_drawn(
    tiny_sd, tiny_dit, undrawn, tmp_path
):
    tiny_dit().save_pretrained(tmp_path / "dit")
    folder = tmp_path / "dit"
    refused(tiny_sd(), {"it": folder}, ["a"], out=tmp_path / "o", match="DiTPipeline takes class labels")
    match = "class labels must be below 1000, the number of classes of it: item 1 has 1000"
    refused(tiny_dit(), {"it": folder}, [3, 1000], out=tmp_path / "o", match="below 1000, the number of classes of ref")
    refused(pictures(tmp_path / "b", ["0.png", "1.png"]), {"it": folder}, [3, 1000], out=tmp_path / "o", match=match)


def test_a_configuration_that_is_cut_short_is_named(tiny_sd, undrawn, tmp_path):
    tiny_sd().save_pretrained(tmp_path / "sd")
    (tmp_path / "sd" / "vae" / "config.json").write_text("{")
    match = r"vae/config\.json is no JSON that can be read"
    refused(tiny_sd(), {"it": tmp_path / "sd"}, ["red cat"], out=tmp_path / "o", match=match)


def test_the_size_that_is_expected_is_the_one_that_is_drawn(tiny_sd, tiny_dit, tmp_path):
    for index, (pipe, prompt) in enumerate([(tiny_sd(), "red cat"), (tiny_dit(), 3)]):
        pipe.save_pretrained(tmp_path / str(index))
        for source in (source_of("it", pipe), source_of("it", tmp_path / str(index))):
            facts = facts_of(source)
            drawn = draw(pipe, [Item(0, prompt, 0)], Generation(steps=1))
            assert drawn.pictures.shape[2:] == (facts.side, facts.side)
            assert facts.kind is type(pipe)


def test_weights_that_cannot_be_loaded_are_named_before_anything_is_drawn(tiny_sd, undrawn, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "squeeze-random.pth").write_bytes(b"no state dict")
    torch.save({"features.0.weight": torch.zeros(3)}, folder / "alex-random.pth")
    for net, why in (("squeeze", "UnpicklingError"), ("alex", "KeyError")):
        match = rf"lpips-{net}-random: .*{net}-random\.pth cannot be loaded as its weights \({why}"
        options = {"metrics": (f"lpips-{net}-random",), "weights": folder, "height": 32, "width": 32}
        refused(tiny_sd(), {"it": tiny_sd()}, ["red cat"], out=tmp_path / "o", match=match, **options)
    model = folder / "openai" / "clip-vit-base-patch32"
    model.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"):
        (model / name).write_text("{}")
    match = rf"clip-score-vit-b-32: {model} cannot be loaded as its weights"
    options = {"metrics": ("clip-score-vit-b-32",), "weights": folder}
    refused(tiny_sd(), {"it": tiny_sd()}, ["red cat"], out=tmp_path / "o", match=match, **options)
