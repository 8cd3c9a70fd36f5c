"""Error of a denoiser along a sampling trajectory: on fixed inputs, and running freely.

The two questions differ. *Replayed* on the inputs that the full-precision run saw, a denoiser shows its own error and
nothing else: a figure of low variance, to choose between variants by. *Running freely*, its errors feed back through
the sampler: that is what the pictures show.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class DenoiserCall:
    """One call of a denoiser: its arguments and what it returned, copied to the CPU."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor


@dataclass
class Trajectory:
    """The calls of a denoiser during one run, in order; filled while `record_denoiser` is open."""

    calls: list[DenoiserCall] = field(default_factory=list)

    @property
    def memory_bytes(self) -> int:
        """Bytes of all recorded tensors."""
        tensors: list[Tensor] = []
        for call in self.calls:
            map_tensors(tensors.append, (call.args, dict(call.kwargs), call.output))
        return sum(tensor.nbytes for tensor in tensors)


@contextlib.contextmanager
def record_denoiser(denoiser: nn.Module, rows: Sequence[int] | None = None) -> Iterator[Trajectory]:
    """Record every call of `denoiser` while the context is open; its hook is gone afterwards, whatever happened.

    rows: the batch rows to keep of every tensor whose first dimension is the batch (all of them when None), which
    bounds the memory. With classifier-free guidance the batch holds each picture twice, half a batch apart.

    Raises:
        ValueError: a row that the batch does not have, or an output that is no tensor.
    """
    trajectory = Trajectory()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensor = output_tensor(output)
        keep = _row_keeper(len(tensor), rows)
        trajectory.calls.append(DenoiserCall(map_tensors(keep, args), map_tensors(keep, kwargs), keep(tensor)))

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    try:
        yield trajectory
    finally:
        handle.remove()


@dataclass(frozen=True)
class TrajectoryError:
    """Relative error ||candidate - reference|| / ||reference|| of a denoiser's output (Euclidean norms).

    steps: of each step of the trajectory.  overall: of all steps' outputs together.  rows: of each batch row.
    """

    steps: tuple[float, ...]
    overall: float
    rows: tuple[float, ...]


@torch.no_grad()
def relative_error(trajectory: Trajectory, denoiser: Callable[..., Any]) -> TrajectoryError:
    """Run `denoiser` on the recorded inputs and compare its outputs with the recorded ones.

    It should be the case that the recorded denoiser itself has error zero, up to the rounding of another batch size.

    Raises:
        ValueError: the trajectory is empty, or the denoiser's output has another shape.
    """
    if not trajectory.calls:
        raise ValueError("trajectory must have one call or more: got none; run the pipeline inside record_denoiser")
    device = _device_of(denoiser)
    errors, norms = [], []
    for call in trajectory.calls:
        args, kwargs = map_tensors(lambda tensor: tensor.to(device), (call.args, dict(call.kwargs)))
        output = output_tensor(denoiser(*args, **kwargs)).cpu()
        if output.shape != call.output.shape:
            raise ValueError(
                f"denoiser must return the recorded shape {tuple(call.output.shape)}: got {tuple(output.shape)}"
            )
        errors.append(_squares(output.double() - call.output.double()))
        norms.append(_squares(call.output.double()))
    error, norm = torch.stack(errors), torch.stack(norms)  # [steps, rows]
    return TrajectoryError(
        steps=tuple(_ratio(error.sum(1), norm.sum(1)).tolist()),
        overall=float(_ratio(error.sum(), norm.sum())),
        rows=tuple(_ratio(error.sum(0), norm.sum(0)).tolist()),
    )


@contextlib.contextmanager
def record_latents(scheduler: Any) -> Iterator[list[Tensor]]:
    """Record what `scheduler.step` returns (the latents after each step) while the context is open.

    Works for every pipeline that samples with a diffusers scheduler, with or without callbacks. The scheduler gets its
    own `step` back afterwards, whatever happened.
    """
    latents: list[Tensor] = []
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at the signature of `step`
    def recording_step(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        previous = result[0] if isinstance(result, tuple) else result.prev_sample
        latents.append(previous.detach().float().cpu().clone())
        return result

    scheduler.step = recording_step
    try:
        yield latents
    finally:
        del scheduler.step


def latent_errors(
    reference: Sequence[Float[Tensor, "pictures ..."]], candidate: Sequence[Float[Tensor, "pictures ..."]]
) -> Float[Tensor, "steps pictures"]:
    """Return ||candidate - reference|| / ||reference|| of two runs' latents, after each step and for each picture.

    Raises:
        ValueError: the runs differ in steps or shapes, or have no step.
    """
    if len(reference) != len(candidate) or not reference:
        raise ValueError(
            f"candidate must have as many steps as reference, one or more: got {len(candidate)} and {len(reference)}"
        )
    rows = []
    for before, after in zip(reference, candidate):
        if before.shape != after.shape:
            raise ValueError(f"latents must have equal shapes: got {tuple(after.shape)} against {tuple(before.shape)}")
        rows.append(_ratio(_squares(after.double() - before.double()), _squares(before.double())))
    return torch.stack(rows).float()


def _row_keeper(batch: int, rows: Sequence[int] | None) -> Callable[[Tensor], Tensor]:
    if rows is not None and not all(0 <= row < batch for row in rows):
        raise ValueError(f"rows must be in [0, {batch}), the denoiser's batch: got {list(rows)}")
    index = None if rows is None else torch.tensor(rows)

    def keep(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if index is not None and tensor.ndim > 0 and len(tensor) == batch:
            tensor = tensor[index.to(tensor.device)]
        return tensor.cpu().clone()

    return keep


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply `function` to every tensor in nested tuples, lists and dicts; anything else stays itself."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


def output_tensor(output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"a denoiser must return a tensor, a tuple or an output with .sample: got {type(output)}")
    return tensor


def _device_of(denoiser: Callable[..., Any]) -> torch.device:
    if isinstance(denoiser, nn.Module):
        for tensor in (*denoiser.parameters(), *denoiser.buffers()):
            return tensor.device
    return torch.device("cpu")


def _squares(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).square().sum(1)


def _ratio(error: Tensor, norm: Tensor) -> Tensor:
    """Square root of error / norm, where nothing by nothing is no error."""
    return torch.where(error == 0, torch.zeros_like(error), error / norm).sqrt()
