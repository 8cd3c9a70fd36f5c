"""Quantized pipelines to look at, and the means to say that a pipeline is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from qdiff import Calibration, Recipe, quantize_pipeline
from qdiff.plugin.structure import find_denoiser


def quick_calibration(pipe: DiffusionPipeline, **changes: object) -> Calibration:
    """Two prompts, three steps: enough to run every layer at several timesteps."""
    subject = ["red apple, noto style", "green cat"] if hasattr(pipe, "unet") else [1, 7]
    return Calibration(**({"prompts": subject, "steps": 3} | changes))


@pytest.fixture(params=["sd", "dit"])
def tiny(request, tiny_sd, tiny_dit) -> Callable[[], DiffusionPipeline]:
    """Factory of a float pipeline: one with a UNet, then one with a transformer."""
    return {"sd": tiny_sd, "dit": tiny_dit}[request.param]


@pytest.fixture
def inference() -> Iterator[None]:
    """Modules and inputs are random, and the same in every run; nothing there trains."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def quantized_once(tiny_sd, tiny_dit) -> dict[str, DiffusionPipeline]:
    pipes = {"sd": tiny_sd(), "dit": tiny_dit()}
    return {
        key: quantize_pipeline(pipe, calibration=quick_calibration(pipe), progress=False) for key, pipe in pipes.items()
    }


@pytest.fixture(params=["sd", "dit"])
def quantized(request, quantized_once) -> Callable[[], DiffusionPipeline]:
    """Factory of a pipeline quantized with the default recipe: one with a UNet, then one with a transformer."""
    return lambda: copy.deepcopy(quantized_once[request.param])


@pytest.fixture
def quantized_sd(quantized_once) -> Callable[[], DiffusionPipeline]:
    return lambda: copy.deepcopy(quantized_once["sd"])


def generate(pipe: DiffusionPipeline, steps: int = 3, seed: int = 0) -> Tensor:
    """Images [2, 3, 16, 16] (or latents, where the pipeline can stop there), always of the same prompts."""
    subject = {"prompt": ["green house", "red cat"]} if hasattr(pipe, "unet") else {"class_labels": [3, 5]}
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(**subject, num_inference_steps=steps, generator=generator, output_type="pt").images


@pytest.fixture(name="generate")
def generate_fixture() -> Callable[..., Tensor]:
    return generate


@pytest.fixture(scope="session")
def quantize() -> Callable[..., DiffusionPipeline]:
    """`quantize_pipeline` with a short calibration and no progress bars, unless told otherwise."""
    return lambda pipe, **arguments: quantize_pipeline(
        pipe, **({"calibration": quick_calibration(pipe), "progress": False} | arguments)
    )


@pytest.fixture(scope="session")
def shortened() -> Callable[[Recipe, DiffusionPipeline], Recipe]:
    """`shortened(recipe, pipe)`: of a UNet, which has many layers that take their time, the way up alone."""

    def shorten(recipe: Recipe, pipe: DiffusionPipeline) -> Recipe:
        unet = hasattr(pipe, "unet")
        return recipe.replace(keep=(*recipe.keep, "down_blocks.*", "mid_block.*")) if unet else recipe

    return shorten


@pytest.fixture(scope="session")
def snapshot() -> Callable[[DiffusionPipeline], Snapshot]:
    return Snapshot


class Snapshot:
    """A pipeline's tensors, modules, hooks, training flags and scheduler, to compare with later ones."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.tensors = {key: tensor.clone() for key, tensor in self._tensors().items()}
        self.rest = copy.deepcopy(self._rest())
        self.modules = self._modules()

    def assert_unchanged(self) -> None:
        tensors = self._tensors()
        assert tensors.keys() == self.tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, self.tensors[key]) or torch.equal(tensor.isnan(), self.tensors[key].isnan()), key
        assert self._rest() == self.rest
        assert self._modules() == self.modules

    def _parts(self) -> dict[str, nn.Module]:
        return {key: part for key, part in self.pipe.components.items() if isinstance(part, nn.Module)}

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{key}.{k}": v for key, part in self._parts().items() for k, v in part.state_dict().items()}

    def _modules(self) -> dict[str, tuple]:
        """Same module objects, of the same classes, with as many hooks and the same flags."""
        return {
            f"{key}.{name}": (
                id(module),
                type(module),
                module.training,
                [len(hooks) for attribute, hooks in sorted(vars(module).items()) if attribute.endswith("_hooks")],
                [parameter.requires_grad for parameter in module.parameters(recurse=False)],
            )
            for key, part in self._parts().items()
            for name, module in part.named_modules()
        }

    def _rest(self) -> dict[str, object]:
        scheduler = {key: _plain(value) for key, value in vars(self.pipe.scheduler).items()}
        own = {key: _plain(value) for key, value in vars(self.pipe).items() if key not in self.pipe.components}
        return {
            "scheduler": scheduler,
            "pipe": own,
            "denoiser": sorted(vars(find_denoiser(self.pipe)[1])),
            "random": torch.get_rng_state().tolist(),
        }


def _plain(value: object) -> object:
    """Something that can be compared. diffusers adds private entries to a config when it is printed or saved."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: repr(item) for key, item in value.items() if not str(key).startswith("_")}
    return repr(value)
