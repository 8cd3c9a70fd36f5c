import json

import pytest
from typer.testing import CliRunner

from qdiff import cli
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
    assert all(command in result.output for command in ("demo", "quantize", "summary"))


def test_a_pipeline_is_quantized_saved_and_summarized(folder):
    result = quantize(folder)
    assert result.exit_code == 0, result.output
    assert "MB in fp16" in result.output
    assert (folder / "out" / "qdiff.json").is_file()
    summary = run("summary", folder / "out")
    assert summary.exit_code == 0, summary.output
    assert "w4a8" in summary.output
    assert "conv_in" in summary.output


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


def test_an_error_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "check_pipeline_folder", broken)
    assert isinstance(run("summary", tmp_path).exception, KeyError)


def test_prompts_are_lines_and_whole_numbers_are_class_labels(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n 7 \n7 cats\n", encoding="utf-8")
    assert cli.read_prompts(tmp_path / "prompts.txt") == ["a cat", 7, "7 cats"]
