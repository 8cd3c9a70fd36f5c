import inspect
import json
import math
import shutil

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from qdiff import Calibration, cli
from qdiff.evaluation import Report
from qdiff.plugin.verify import Check, Difference
from qdiff.recipe import Recipe

PROMPTS = "red apple\n\ngreen cat\n"


@pytest.fixture
def folder(tiny_sd, tmp_path):
    tiny_sd().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def quantize(folder, *options):
    prompts = folder / "prompts.txt"
    return run("quantize", folder / "pipeline", folder / "out", "--prompts", prompts, "--steps", 2, *options)


def test_help_names_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in ("demo", "quantize", "evaluate", "verify", "summary"))


def test_a_pipeline_is_quantized_saved_and_summarized(folder):
    result = quantize(folder)
    assert result.exit_code == 0, result.output
    assert "MB in fp16" in result.output
    assert (folder / "out" / "qdiff.json").is_file()
    summary = run("summary", folder / "out")
    assert summary.exit_code == 0, summary.output
    assert "w4a8" in summary.output
    assert "conv_in" in summary.output


def test_calibration_is_as_long_as_in_python():
    assert inspect.signature(cli.quantize).parameters["steps"].default == Calibration().steps


def test_a_recipe_comes_from_a_file_too(folder):
    recipe = Recipe.preset("w8a8").replace(name="mine")
    (folder / "mine.json").write_text(recipe.to_json())
    assert quantize(folder, "--recipe", folder / "mine.json").exit_code == 0
    assert json.loads((folder / "out" / "qdiff.json").read_text())["recipe"]["name"] == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--recipe", "w4a9"], "'w4a8'", id="unknown-recipe"),
        pytest.param(["--recipe", "none.json"], "none.json", id="missing-recipe"),
        pytest.param(["--prompts", "none.txt"], "none.txt", id="missing-prompts"),
    ],
)
def test_a_mistake_is_one_line(folder, options, message):
    result = quantize(folder, *options)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (folder / "out").exists()


def test_an_empty_prompt_file_is_refused(folder):
    (folder / "prompts.txt").write_text("\n \n")
    result = quantize(folder)
    assert result.exit_code == 1
    assert "at least one prompt" in result.output


@pytest.mark.parametrize(
    "command", [["quantize", "nowhere", "out"], ["summary", "nowhere"]], ids=["quantize", "summary"]
)
def test_a_folder_without_a_pipeline_is_refused(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*command)
    assert result.exit_code == 1
    assert "no pipeline in nowhere" in result.output


def test_the_demo_says_where_it_looked_for_its_models(tmp_path):
    result = run("demo", "--assets", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "emoji-sd" in result.output
    assert "--assets" in result.output
    assert not (tmp_path / "out").exists()


def pictures(folder, colours):
    folder.mkdir(parents=True)
    for index, colour in enumerate(colours):
        Image.new("RGB", (16, 16), colour).save(folder / f"{index}.png")
    return folder


def test_folders_of_pictures_are_compared(tmp_path):
    before = pictures(tmp_path / "before", [(200, 10, 10), (10, 200, 10)])
    after = pictures(tmp_path / "after", [(190, 10, 10), (10, 200, 20)])
    result = run("evaluate", before, f"mine={after}", "--metrics", "psnr, ssim", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "mine" in result.output
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    expected = 10 * math.log10(255**2 * 3 / 100)  # one channel of three is ten levels off in each
    assert report.find("psnr_db", candidate="mine").value == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "out" / "report.html").is_file()


def test_pipelines_are_compared_on_a_prompt_file(folder):
    copy = folder / "copy"
    shutil.copytree(folder / "pipeline", copy)
    options = ["--steps", 2, "--metrics", "psnr", "--no-costs", "--limit", 1, "--out", folder / "out"]
    result = run("evaluate", folder / "pipeline", copy, "--prompts", folder / "prompts.txt", *options)
    assert result.exit_code == 0, result.output
    report = Report.from_json((folder / "out" / "report.json").read_text())
    assert report.find("psnr_db", candidate="copy").value == math.inf
    assert report.settings["pictures"] == {"reference": 1, "copy": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["nowhere"], "no folder nowhere", id="candidate"),
        pytest.param(["before", "before"], "two candidates are called 'before'", id="names"),
        pytest.param(["before", "--prompts", "emoji"], "emoji-sd-held-out", id="built-in"),
        pytest.param(["before", "--prompts", "none.csv"], "none.csv", id="prompts"),
        pytest.param(["x=before", "--metrics", "psnrr"], "'psnrr'", id="metric"),
        pytest.param(["x=before", "--metrics", "fid", "--offline", "--weights", "."], "https://", id="weights"),
    ],
)
def test_a_mistake_in_an_evaluation_is_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "before", [(9, 9, 9)])
    result = run("evaluate", "before", *arguments)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert message in result.output


def test_a_checkpoint_is_verified(folder, monkeypatch):
    assert quantize(folder, "--recipe", "naive").exit_code == 0
    result = run("verify", folder / "out", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "no difference" in result.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    without = run("verify", folder / "out")
    assert without.exit_code == 2
    assert "no CUDA device" in without.output
    wrong = Check("conv_in", "w4a8_conv2d", "integer sums", Difference(1, 8, (0,), 1.0, 2.0, 1.0))
    monkeypatch.setattr("qdiff.plugin.verify.verify", lambda *_: iter([wrong]))
    result = run("verify", folder / "out", "--device", "cpu")
    assert result.exit_code == 1
    assert "first difference: layer conv_in, w4a8_conv2d" in result.output


def test_an_error_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "check_pipeline_folder", broken)
    assert isinstance(run("summary", tmp_path).exception, KeyError)


def test_prompts_are_lines_and_whole_numbers_are_class_labels(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n 7 \n7 cats\n", encoding="utf-8")
    assert cli.read_prompts(tmp_path / "prompts.txt") == ["a cat", 7, "7 cats"]
