"""Statistics of layers that depend on the timestep alone, over all the timesteps there are.

A calibration sees as many timesteps as its schedule has steps; an embedding of time meets others under every other
schedule. Its inputs are a finite set, whatever is drawn, so they can all be shown to it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from qdiff.calibration import Statistics, collect
from qdiff.denoising import TimestepReader
from qdiff.plugin.calls import Call
from qdiff.recipe import LayerPlan, Recipe

TIMESTEPS = 128


def time_layers(recipe: Recipe, plans: Mapping[str, LayerPlan]) -> list[str]:
    """The layers that the recipe wants to be shown all timesteps.

    Raises:
        ValueError: one of them has a temporal range, whose table has a row for each *calibrated* timestep.
    """
    names = [name for name in plans if any(fnmatchcase(name, pattern) for pattern in recipe.all_timesteps)]
    for name in names:
        if plans[name].range_mode == "temporal":
            raise ValueError(
                f"{name}: recipe.all_timesteps does not go with a temporal activation range, which has the calibrated "
                "timesteps; give the layer a dynamic or static one"
            )
    return names


def over_all_timesteps(
    denoiser: nn.Module,
    call: Call,
    last: float,
    needs: Mapping[str, Collection[str]],
    seed: int,
) -> Statistics:
    """Inputs of these layers at `TIMESTEPS` timesteps, evenly from 0 to `last`.

    TFMQ-DM (arXiv 2311.16503) reconstructs the embedding of time and its projections, as one block, over the finite set
    of timesteps. Here each layer is rounded on inputs from all over that set, by whatever method the recipe has.

    Args:
        call: the arguments of a call of the denoiser; all but its timestep are used as they are.
        last: the largest timestep of the schedule that the denoiser was trained on.
        needs: of each layer, as in `collect`.
    """
    reader = TimestepReader.of(denoiser)
    recorded = reader(call.args, call.kwargs)
    like, rows = torch.as_tensor(recorded.timestep), recorded.latent.shape[0]
    values = torch.linspace(0, last, TIMESTEPS, dtype=torch.float64)
    values = (values if like.is_floating_point() else values.round()).to(like.dtype)
    name, position = reader.timestep

    def run() -> None:
        for start in range(0, TIMESTEPS, rows):
            # The last batch is filled up with the last timestep.
            batch = values[(torch.arange(rows) + start).clamp_max(TIMESTEPS - 1)].to(recorded.latent.device)
            denoiser(*_replaced(call.args, position, batch, name in call.kwargs), **_named(call.kwargs, name, batch))

    layers = {layer: denoiser.get_submodule(layer) for layer in needs}
    return collect(run, denoiser, layers, needs, progress=False, seed=seed)


def _replaced(args: tuple[object, ...], position: int, value: Tensor, by_name: bool) -> tuple[object, ...]:
    return args if by_name else (*args[:position], value, *args[position + 1 :])


def _named(kwargs: Mapping[str, object], name: str, value: Tensor) -> dict[str, object]:
    return {key: value if key == name else argument for key, argument in kwargs.items()}
