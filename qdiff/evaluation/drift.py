"""Where a candidate leaves the reference: step by step in the latents, and layer by layer on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdiff.evaluation.generation import Generation, draw
from qdiff.evaluation.prompts import Item
from qdiff.evaluation.sources import denoiser_of
from qdiff.evaluation.trajectory import (
    DenoiserCall,
    Trajectory,
    latent_errors,
    map_tensors,
    output_tensor,
    record_denoiser,
    record_latents,
)

if TYPE_CHECKING:
    from jaxtyping import Float

_LAYERS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class LayerErrors:
    """Relative errors ||candidate - reference|| / ||reference|| of outputs on the reference's inputs to the denoiser.

    layers: names.  values: of each layer at each step, with what the layers before it did wrong.  denoiser: of the
    denoiser's own output, over all steps.
    """

    layers: tuple[str, ...]
    values: Float[Tensor, "layers steps"]
    denoiser: float


@dataclass(frozen=True)
class Drift:
    """latents: relative error after each step of a free run.  timesteps: of the steps, or their numbers."""

    latents: Float[Tensor, "steps pictures"]
    timesteps: tuple[float, ...]
    layers: LayerErrors


def measure_drift(reference: Any, candidate: Any, items: Sequence[Item], generation: Generation) -> Drift:
    """Draw `items` with both pipelines from the same noise, and replay the reference's calls through both denoisers.

    Raises:
        ValueError: the pipelines differ in steps or in the shape of their latents.
    """
    with record_denoiser(denoiser_of(reference)) as trajectory, record_latents(reference.scheduler) as before:
        draw(reference, items, generation)
    with record_latents(candidate.scheduler) as after:
        draw(candidate, items, generation)
    count = len(items)  # guided class-conditional pipelines step their latents twice over
    return Drift(
        latents=latent_errors([step[:count] for step in before], [step[:count] for step in after]),
        timesteps=_timesteps(reference.scheduler, len(trajectory.calls)),
        layers=layer_errors(trajectory, denoiser_of(reference), denoiser_of(candidate)),
    )


@torch.no_grad()
def layer_errors(trajectory: Trajectory, reference: nn.Module, candidate: nn.Module) -> LayerErrors:
    """Run both denoisers on the recorded inputs and compare linear and convolution layers of the same name.

    One call's outputs are in memory at a time.

    Raises:
        ValueError: the trajectory is empty, or the denoisers have no such layer in common.
    """
    theirs = dict(candidate.named_modules())
    names = [name for name, layer in reference.named_modules() if isinstance(layer, _LAYERS) and name in theirs]
    if not names or not trajectory.calls:
        raise ValueError(
            f"the denoisers must share linear or convolution layers, and the trajectory have calls: got {len(names)} "
            f"and {len(trajectory.calls)}"
        )
    steps = []
    for call in trajectory.calls:
        with _outputs(reference, names) as expected:
            _call(reference, call)
        sums = {}
        with _outputs(candidate, names) as got:
            output = _call(candidate, call)
        for name in names:
            sums[name] = _squares(expected[name], got[name])
        sums[""] = _squares([call.output.to(output.device)], [output])
        steps.append(torch.stack([sums[name] for name in ("", *names)]).cpu())
    error, norm = torch.stack(steps, dim=1).unbind(-1)  # [1 + layers, steps] each
    values = torch.where(error == 0, torch.zeros_like(error), error / norm).sqrt()
    return LayerErrors(tuple(names), values[1:].float(), float((error[0].sum() / norm[0].sum()).sqrt()))


@contextmanager
def _outputs(denoiser: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What these layers return while the context is open; a layer may run several times."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        return lambda module, args, output: found[name].append(output_tensor(output))

    handles = [denoiser.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _call(denoiser: nn.Module, call: DenoiserCall) -> Tensor:
    parameter = next(denoiser.parameters())
    dtype = getattr(denoiser, "dtype", parameter.dtype)

    def place(tensor: Tensor) -> Tensor:
        # Timesteps have fewer dimensions, and bfloat16 cannot tell 999 from 1000.
        cast = tensor.is_floating_point() and tensor.ndim > 1
        return tensor.to(parameter.device, dtype) if cast else tensor.to(parameter.device)

    args, kwargs = map_tensors(place, (call.args, dict(call.kwargs)))
    return output_tensor(denoiser(*args, **kwargs))


def _squares(expected: Sequence[Tensor], got: Sequence[Tensor]) -> Float[Tensor, "2"]:
    """Sums of squares of the difference and of what is expected."""
    sums = torch.zeros(2, dtype=torch.float64, device=expected[0].device) if expected else torch.zeros(2)
    for one, other in zip(expected, got):
        # float32 sums on the device: error of a rounding in millions, and no float64 copy of every output.
        sums[0] += (other.float() - one.float()).square().sum()
        sums[1] += one.float().square().sum()
    return sums


def _timesteps(scheduler: Any, calls: int) -> tuple[float, ...]:
    known = [float(value) for value in getattr(scheduler, "timesteps", ())]
    return tuple(known) if len(known) == calls else tuple(float(step) for step in range(1, calls + 1))
