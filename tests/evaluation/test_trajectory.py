import pytest
import torch
from torch import nn

from qdiff.evaluation import latent_errors, record_denoiser, record_latents, relative_error

PROMPTS = ["red apple", "green cat"]


def generate(pipe, steps=3, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPTS, num_inference_steps=steps, generator=generator, output_type="np", **kwargs).images


def scale_weights(module, factor):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)


def test_the_denoiser_has_no_error_against_itself(tiny_sd):
    pipe = tiny_sd()
    with record_denoiser(pipe.unet) as trajectory:
        generate(pipe)
    error = relative_error(trajectory, pipe.unet)
    assert error.overall == 0
    assert error.steps == (0, 0, 0)
    assert len(error.rows) == 4  # two prompts, each with and without guidance


def test_a_doubled_output_is_an_error_of_one_at_every_step(tiny_sd):
    pipe = tiny_sd()
    with record_denoiser(pipe.unet) as trajectory:
        generate(pipe)
    scale_weights(pipe.unet.conv_out, 2)  # linear, so the output doubles
    error = relative_error(trajectory, pipe.unet)
    # Doubling is exact in binary floating point.
    assert error.overall == pytest.approx(1, rel=1e-6)
    assert error.steps == pytest.approx([1, 1, 1], rel=1e-6)


def test_the_recording_leaves_no_hook_and_the_run_alone(tiny_sd):
    pipe = tiny_sd()
    expected = generate(pipe)
    with record_denoiser(pipe.unet), record_latents(pipe.scheduler):
        recorded = generate(pipe)
    assert (recorded == expected).all()
    assert not pipe.unet._forward_hooks
    assert "step" not in vars(pipe.scheduler)


def test_hooks_are_gone_after_an_error(tiny_sd):
    pipe = tiny_sd()
    with pytest.raises(ZeroDivisionError), record_denoiser(pipe.unet), record_latents(pipe.scheduler):
        raise ZeroDivisionError
    assert not pipe.unet._forward_hooks
    assert "step" not in vars(pipe.scheduler)


def test_chosen_rows_are_the_rows_of_the_whole(tiny_sd):
    pipe = tiny_sd()
    with record_denoiser(pipe.unet) as whole, record_denoiser(pipe.unet, rows=[1, 3]) as part:
        generate(pipe)
    assert part.calls[0].output.shape[0] == 2
    assert part.memory_bytes < whole.memory_bytes
    assert torch.equal(part.calls[2].output, whole.calls[2].output[[1, 3]])
    # Replayed at another batch size: float32 sums in another order, over a few hundred layers' terms.
    assert relative_error(part, pipe.unet).overall < 1e-5


def test_a_row_beyond_the_batch_is_refused(tiny_sd):
    pipe = tiny_sd()
    with pytest.raises(ValueError, match=r"rows must be in \[0, 4\)"), record_denoiser(pipe.unet, rows=[4]):
        generate(pipe)


def test_the_class_conditional_pipeline_records_too(tiny_dit):
    pipe = tiny_dit()
    with record_denoiser(pipe.transformer, rows=[0, 2]) as trajectory, record_latents(pipe.scheduler) as latents:
        pipe([1, 2], num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    assert len(trajectory.calls) == len(latents) == 3
    assert relative_error(trajectory, pipe.transformer).overall < 1e-5  # another batch size, as above


def test_latents_of_the_last_step_are_the_pipelines(tiny_sd):
    pipe = tiny_sd()
    generator = torch.Generator().manual_seed(0)
    with record_latents(pipe.scheduler) as latents:
        last = pipe(PROMPTS, num_inference_steps=3, generator=generator, output_type="latent").images
    assert torch.equal(latents[-1], last)
    assert len(latents) == 3


def test_latent_errors_are_relative_and_per_picture():
    reference = [torch.ones(2, 4, 8, 8), torch.full((2, 4, 8, 8), 2.0)]
    candidate = [torch.stack([step[0], step[1] * 1.5]) for step in reference]
    # 0.5 is exact in binary.
    torch.testing.assert_close(latent_errors(reference, candidate), torch.tensor([[0.0, 0.5], [0.0, 0.5]]))


def test_runs_that_cannot_be_compared_are_refused():
    step = torch.ones(2, 4, 8, 8)
    with pytest.raises(ValueError, match="as many steps"):
        latent_errors([step], [step, step])
    with pytest.raises(ValueError, match="one or more"):
        latent_errors([], [])
    with pytest.raises(ValueError, match="equal shapes"):
        latent_errors([step], [step[:1]])


def test_an_empty_trajectory_is_refused():
    with record_denoiser(nn.Identity()) as trajectory:
        pass
    with pytest.raises(ValueError, match="got none"):
        relative_error(trajectory, nn.Identity())


def test_a_denoiser_of_another_shape_is_refused():
    denoiser = nn.Linear(4, 4)
    with record_denoiser(denoiser) as trajectory:
        denoiser(torch.ones(2, 4))
    with pytest.raises(ValueError, match="recorded shape"):
        relative_error(trajectory, nn.Linear(4, 5))
