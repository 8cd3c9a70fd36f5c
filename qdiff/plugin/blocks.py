"""The blocks of a denoiser: which layers belong together, what goes in and out, and what an output's error costs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qdiff.denoising import StepTracker, TimestepReader
from qdiff.plugin.calls import Call, StopError, float_tensors


class BlockCall(NamedTuple):
    """One call of a block in full precision.

    call: its arguments, as they arrive when all before it is quantized.
    timestep_weights: of the `StepTracker`, then.
    outputs: the floating-point tensors that it gives.
    costs: of each output, float32 [C]: what a squared error there adds to the denoiser's.
    """

    call: Call
    timestep_weights: Tensor | None
    outputs: list[Tensor]
    costs: list[Tensor]


def blocks_of(names: Collection[str]) -> dict[str, str]:
    """The block of every layer that has one: the innermost entry of a module list that holds several of these layers.

    In diffusers these are the resnets of a UNet and the blocks of a transformer. Layers around other blocks, such as
    the projections before and after a UNet's transformer, have none, and single ones, such as samplers' convolutions.
    """
    found: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        entries = [".".join(parts[:end]) for end in range(2, len(parts)) if parts[end - 1].isdigit()]
        several = [entry for entry in entries if sum(other.startswith(f"{entry}.") for other in names) > 1]
        if several:
            found[name] = several[-1]
    blocks = set(found.values())
    outer = {block for block in blocks if any(other.startswith(f"{block}.") for other in blocks)}
    return {name: block for name, block in found.items() if block not in outer}


def channels_last(tensor: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H, W, C]; anything else has its channels last."""
    return tensor.movedim(1, -1) if tensor.dim() == 4 else tensor


def output_costs(
    denoiser: nn.Module, blocks: Collection[str], calls: Sequence[Call], seed: int
) -> dict[str, list[list[Tensor]]]:
    """What a squared error in a block's outputs adds to the squared error of the denoiser's: by block, call and output.

    float32 [C]: the diagonal of J^T J, J the derivative of the denoiser's output by the block's, mean over samples and
    positions. For random signs v, it is the expectation of (J^T v)^2: one backward pass. An output that the
    denoiser's does not depend on gets zeros.
    """
    reader = TimestepReader.of(denoiser)
    draw = torch.Generator().manual_seed(seed)
    found: dict[str, list[list[Tensor]]] = {block: [] for block in blocks}
    for call in calls:
        outputs: dict[str, list[Tensor]] = {}
        with ExitStack() as stack, torch.enable_grad():
            for block in blocks:
                keep = _keeper(outputs, block)
                stack.callback(denoiser.get_submodule(block).register_forward_hook(keep).remove)
            latent = reader(call.args, call.kwargs).latent
            # So that a graph is made even where no parameter asks for one.
            latent = latent.requires_grad_()
            result = next(float_tensors(denoiser(*call.args, **call.kwargs)))
        latent.requires_grad_(False)
        signs = torch.randint(0, 2, result.shape, generator=draw).to(result).mul_(2).sub_(1)
        signs[:, latent.shape[1] :] = 0  # variances, where the denoiser learned them
        flat = [tensor for block in blocks for tensor in outputs[block]]
        slopes = iter(torch.autograd.grad(result, flat, signs, allow_unused=True))
        for block in blocks:
            found[block].append([_by_channel(next(slopes), tensor) for tensor in outputs[block]])
    return found


def _keeper(outputs: dict[str, list[Tensor]], block: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        outputs.setdefault(block, list(float_tensors(output)))

    return hook


def _by_channel(slope: Tensor | None, output: Tensor) -> Tensor:
    if slope is None:
        return torch.zeros(channels_last(output).shape[-1], device=output.device)
    return channels_last(slope.float()).square().flatten(0, -2).mean(0)


def block_calls(
    denoiser: nn.Module, block: str, calls: Sequence[Call], costs: Sequence[list[Tensor]], tracker: StepTracker
) -> list[BlockCall]:
    """What goes in and out of a block in these calls of the denoiser, which runs no further; copies."""
    found: list[BlockCall] = []
    arguments: list[Call] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments.append(Call(args, kwargs).mapped(torch.clone))

    def after(module: nn.Module, args: object, output: object) -> None:
        found.append(BlockCall(arguments[-1], tracker.weights, [*float_tensors(output)], costs[len(found)]))
        raise StopError

    module = denoiser.get_submodule(block)
    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after).remove)
        for call in calls:
            with suppress(StopError):
                denoiser(*call.args, **call.kwargs)
    return found
