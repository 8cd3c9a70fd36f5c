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


@pytest.mark.parametrize(
    ("sampling", "count", "steps"),
    [("uniform", 4, (2, 7, 12, 17)), ("uniform", 20, tuple(range(20))), ("normal", 20, tuple(range(20)))],
)
def test_uniform_steps_are_at_equal_distances(sampling, count, steps):
    assert Calibration(steps=20, sampling=sampling, sampled_steps=count).observed_steps == steps
    assert Calibration(steps=20).observed_steps is None


def test_normal_steps_are_distributed_as_said():
    steps = torch.tensor(
        Calibration(steps=1000, sampling="normal", sampled_steps=200, mean=0.3, std=0.1).observed_steps
    )
    times = 1 - (steps + 0.5) / 1000
    assert len(steps.unique()) == 200
    assert times.mean().item() == pytest.approx(0.3, abs=0.005)  # half a step of 1/200
    assert times.std().item() == pytest.approx(0.1, abs=0.005)
    default = Calibration(steps=1000, sampling="normal", sampled_steps=100).observed_steps
    assert sum(step >= 500 for step in default) > 55  # nearer to the picture than to the noise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling": "random", "sampled_steps": 3}, "sampling must be one of all, uniform, normal: got 'random'"),
        ({"sampling": "uniform"}, "sampled_steps goes with sampling 'uniform' or 'normal': got sampling='uniform'"),
        ({"sampled_steps": 3}, "got sampling='all', sampled_steps=3"),
        ({"sampling": "uniform", "sampled_steps": 21}, "sampled_steps must be in 1 to 20: got 21"),
        ({"sampling": "normal", "sampled_steps": 2, "std": 0.0}, "std above 0: got mean=0.4, std=0.0"),
        ({"sampling": "normal", "sampled_steps": 2, "mean": 400.0}, r"mean must be in \[0, 1\]"),
    ],
)
def test_sampling_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Calibration(steps=20, **arguments)


def layers_of(denoiser, *patterns):
    return {name: layer for name, layer in denoiser.named_modules() if name.endswith(patterns)}


def test_chosen_steps_are_those_of_the_whole_trajectory(tiny_sd):
    """Three batches of two prompts: the trajectory is run in full every time, and looked at where it was asked for."""
    pipe = tiny_sd()
    layers = layers_of(pipe.unet, "conv1", "to_q")
    prompts = ["red", "green", "apple", "cat", "house"]

    def statistics(**sampling):
        calibration = Calibration(prompts, steps=6, batch_size=2, **sampling)
        run = lambda: run_pipeline(pipe, calibration)  # noqa: E731
        return collect(run, pipe.unet, layers, (), False, 0, calibration.observed_steps)

    everything, some = statistics(), statistics(sampling="uniform", sampled_steps=3)
    rows = [everything.timesteps.index(timestep) for timestep in some.timesteps]
    assert rows == [0, 2, 4]  # ascending in time: steps 5, 3 and 1
    for name, layer in some.layers.items():
        assert torch.equal(layer.channel_absmax, everything.layers[name].channel_absmax[rows])


def test_both_halves_of_guidance_are_seen(tiny_sd):
    """The text keys' input is the text itself: of the prompt, and of the empty prompt beside it."""
    pipe = tiny_sd()
    layers = layers_of(pipe.unet, "attn2.to_k")
    calibration = Calibration(["red apple"], steps=2, guidance_scale=4.0)
    statistics = collect(lambda: run_pipeline(pipe, calibration), pipe.unet, layers, (), False)
    with torch.no_grad():
        halves = [half.abs().amax((0, 1)) for half in pipe.encode_prompt("red apple", "cpu", 1, True)]
    assert not (halves[0] >= halves[1]).all()
    assert not (halves[1] >= halves[0]).all()
    for layer in statistics.layers.values():
        torch.testing.assert_close(layer.channel_absmax, torch.maximum(*halves).expand(2, -1))
