from __future__ import annotations

import pytest
import torch

from qdiff.calibration import Calibration, collect, run_pipeline
from qdiff.calibration.prompts import BUILTIN_PROMPTS, builtin_labels


class Recorder:
    """Stands where a diffusers pipeline would, and writes down how it is called."""

    def __init__(self):
        self.calls = []
        self._progress_bar_config = {"leave": False}

    def set_progress_bar_config(self, **config):
        self._progress_bar_config = config


class TextPipeline(Recorder):
    def __call__(self, prompt, num_inference_steps=50, guidance_scale=7.5, generator=None, output_type="pil"):
        assert self._progress_bar_config == {"leave": False, "disable": True}
        self.calls.append(
            (prompt, num_inference_steps, guidance_scale, [g.initial_seed() for g in generator], output_type)
        )


class ClassPipeline(Recorder):
    def __init__(self):
        super().__init__()
        self.labels = {f"thing {index}": index * 10 for index in range(4)}

    def get_label_ids(self, names):
        return [self.labels[name] for name in names]

    def __call__(self, class_labels, num_inference_steps=50, generator=None, output_type="pil"):
        self.calls.append((class_labels, num_inference_steps, None, [g.initial_seed() for g in generator], output_type))


class PlainPipeline(Recorder):
    def __call__(self, batch_size=1, num_inference_steps=50, generator=None):
        self.calls.append((batch_size, num_inference_steps))


def test_text_pipelines_get_prompts_in_batches_and_stop_at_latents():
    pipe = TextPipeline()
    run_pipeline(pipe, Calibration(["a", "b", "c"], steps=4, guidance_scale=2.0, batch_size=2, seed=10))
    assert pipe.calls == [(["a", "b"], 4, 2.0, [10, 11], "latent"), (["c"], 4, 2.0, [12], "latent")]
    assert pipe._progress_bar_config == {"leave": False}


def test_class_pipelines_get_labels_by_number_or_name():
    pipe = ClassPipeline()
    run_pipeline(pipe, Calibration([3, "thing 2"], steps=4))
    assert pipe.calls == [([3, 20], 4, None, [0, 1], "pt")]


def test_builtin_conditions():
    text, labels, plain = TextPipeline(), ClassPipeline(), PlainPipeline()
    for pipe in (text, labels, plain):
        run_pipeline(pipe, Calibration(steps=1, batch_size=100))
    assert text.calls[0][0] == list(BUILTIN_PROMPTS)
    assert text.calls[0][2] == 7.5
    assert labels.calls[0][0] == [0, 10, 20, 30]
    assert plain.calls == [(len(BUILTIN_PROMPTS), 1)]
    assert builtin_labels(range(1000), 4) == (0, 250, 500, 750)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Calibration([]), "at least one prompt"),
        (lambda: Calibration("a cat"), r"use \['a cat'\]"),
        (lambda: Calibration(steps=0), "steps must be at least 1: got 0"),
        (lambda: Calibration(batch_size=0), "batch_size must be at least 1: got 0"),
        (lambda: run_pipeline(TextPipeline(), Calibration([3])), "must be strings: got 3"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_bar_is_restored_when_the_pipeline_fails():
    pipe = TextPipeline()
    pipe.__class__ = type("Failing", (TextPipeline,), {"__call__": lambda self, prompt: 1 / 0})
    with pytest.raises(TypeError):
        run_pipeline(pipe, Calibration(["a"], steps=1))
    assert pipe._progress_bar_config == {"leave": False}


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_dit"])
def test_a_real_pipeline_gives_the_same_statistics_twice(kind, request):
    pipe = request.getfixturevalue(kind)()
    denoiser = pipe.unet if kind == "tiny_sd" else pipe.transformer
    layers = {
        name: layer for name, layer in denoiser.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }
    prompts = ["red apple", "green house"] if kind == "tiny_sd" else [1, 2]

    def statistics():
        calibration = Calibration(prompts, steps=3)
        return collect(lambda: run_pipeline(pipe, calibration), denoiser, layers, ("samples", "histograms"), False)

    first, second = statistics(), statistics()
    assert len(first.timesteps) == 3
    assert set(first.layers) == set(layers)
    for name, layer in first.layers.items():
        assert torch.equal(layer.samples.values, second.layers[name].samples.values)
        assert torch.equal(layer.histograms.counts, second.layers[name].histograms.counts)
