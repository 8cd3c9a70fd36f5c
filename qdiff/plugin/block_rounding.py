"""BRECQ: the roundings of all layers of a block are learned together, for the block's output."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qdiff.denoising import StepTracker
from qdiff.layers import OpenLayer
from qdiff.methods import Draft
from qdiff.numerics.soft_rounding import SoftRounding
from qdiff.numerics.two_level import codes_of
from qdiff.plugin.blocks import BlockCall, block_calls, channels_last, output_costs
from qdiff.plugin.calls import Call, float_tensors, some_samples

# Samples of every recorded call to learn from, on a CPU and elsewhere, and to take the costs of a block's errors of.
SAMPLES_CPU, SAMPLES, COST_SAMPLES = 2, 8, 1
# Calls that a step sees; and one in so many is not learned from, and says whether the codes are better.
CALLS_A_STEP, HELD_OUT = 4, 4
# lambda, over the mean share of a weight in the block's loss; the fraction of the steps before it counts; and Adam's
# rate.
REGULARIZATION, WARM_START, LEARNING_RATE = 10.0, 0.2, 0.1
# How far h starts from the weight as it is towards the codes chosen before.
DECIDED = 0.5


class Reconstruction:
    """BRECQ (arXiv 2102.05426, equation 10): with AdaRound's soft roundings of all weights of a block,

        min  E sum_i F_i (z_i - z^_i)^2 + lambda f(V)

    z being the block's output, z^ the same as quantized, and F the Fisher information's diagonal. The denoiser's own
    squared error stands for the paper's task loss; as a likelihood it is Gaussian, and F the diagonal of J^T J, see
    `output_costs`.

    What differs: F is a mean over the positions of a channel, for each timestep apart, and scaled so that every
    timestep counts alike. Learning starts half way between the weights and the codes chosen layer by layer. z is of the
    same inputs as z^, which carry the quantization of the blocks before; against the z of full-precision inputs, the
    error that arrives would be most of the loss (measured on the third block of emoji-dit: 0.88 of it stays without
    any rounding), and noise to the gradients. A quarter of the calls is not learned from, and chooses between the codes
    before and after. Steps of activations stay as they are.

    Measured on emoji-dit (W4A8, 40 steps, 16 calls of 2 samples): no block came out better on the calls held out than
    layer by layer, where every layer's loss is exact over the whole calibration; so all kept their codes. Where layers
    are rounded less well, blocks gain (a quarter of the error and more, on two layers of 3 bits close to the nearest).

    Law: on the calls held out (on all, with a warning, where they are too few for that), a block's loss is never above
    that of the codes chosen layer by layer.
    """

    def __init__(
        self, denoiser: nn.Module, blocks: Collection[str], calls: Sequence[Call], tracker: StepTracker, seed: int
    ) -> None:
        self._denoiser, self._tracker = denoiser, tracker
        on_cpu = next(denoiser.parameters()).device.type == "cpu"
        count = SAMPLES_CPU if on_cpu else SAMPLES
        self._calls = [some_samples(denoiser, call, count, turn) for turn, call in enumerate(calls)]
        few = [some_samples(denoiser, call, COST_SAMPLES, turn) for turn, call in enumerate(calls)]
        self._costs = output_costs(denoiser, blocks, few, seed) if blocks else {}

    def learn(self, block: str, drafts: Mapping[str, Draft]) -> dict[str, Tensor]:
        """Codes int8 [N, K] by the names of the block's layers in the denoiser; those not named keep their draft's.

        drafts: of all layers of the block that are to be quantized; there they are in full precision.
        """
        calls = block_calls(self._denoiser, block, self._calls, self._costs[block], self._tracker)
        inside = {name.removeprefix(f"{block}."): draft for name, draft in drafts.items()}
        codes = learn_block(self._denoiser.get_submodule(block), inside, calls, self._tracker)
        return {f"{block}.{name}": learned for name, learned in codes.items()}


@torch.no_grad()
def learn_block(
    block: nn.Module, drafts: Mapping[str, Draft], calls: Sequence[BlockCall], tracker: StepTracker
) -> dict[str, Tensor]:
    """The codes that differ, by the layers' names in the block, which is in the end as it was."""
    if len(calls) < HELD_OUT:
        warnings.warn(
            f"too few calibration samples: a block is learned from {len(calls)} calls of the denoiser and judged by "
            f"the same, with {HELD_OUT} one of them would be held out; calibrate with more steps",
            stacklevel=2,
        )
    steps = max(draft.state.rounding.block_steps for draft in drafts.values())
    with _opened(block, drafts, tracker) as layers:
        calls = _alike(block, calls, tracker)
        seen = [call for turn, call in enumerate(calls) if turn % HELD_OUT != HELD_OUT - 1]
        unseen = calls[HELD_OUT - 1 :: HELD_OUT] or seen
        choices = {name: _Choice(draft, steps) for name, draft in drafts.items() if draft.state.rounding.block_steps}
        # A call's loss is one to begin with.
        share = CALLS_A_STEP / sum(choice.base.numel() for choice in choices.values())
        draw = torch.Generator().manual_seed(0)
        for _ in range(steps):
            matrices = [choice.matrix().requires_grad_() for choice in choices.values()]
            for name, matrix in zip(choices, matrices):
                layers[name].matrix = matrix
            slopes = [torch.zeros_like(matrix) for matrix in matrices]
            for index in torch.randperm(len(seen), generator=draw)[:CALLS_A_STEP].tolist():
                with torch.enable_grad():
                    loss = block_loss(block, seen[index], tracker) / share
                for slope, part in zip(slopes, torch.autograd.grad(loss, matrices)):
                    slope.add_(part)
            for choice, slope in zip(choices.values(), slopes):
                choice.step(slope)
        for name, choice in choices.items():
            layers[name].matrix = choice.codes() * choice.steps
        after = sum(float(block_loss(block, call, tracker)) for call in unseen)
        better = after < len(unseen)
        return {name: choice.codes().to(torch.int8) for name, choice in choices.items()} if better else {}


def block_loss(block: nn.Module, call: BlockCall, tracker: StepTracker) -> Tensor:
    """The squared error of the block's outputs at what each channel's costs, a sample's mean: float32 []."""
    tracker.weights = call.timestep_weights
    outputs = float_tensors(block(*call.call.args, **call.call.kwargs))
    parts = [
        ((channels_last(output).float() - channels_last(wanted)).square() * costs).sum() / len(output)
        for output, wanted, costs in zip(outputs, call.outputs, call.costs)
    ]
    return torch.stack(parts).sum()


def _alike(block: nn.Module, calls: Sequence[BlockCall], tracker: StepTracker) -> list[BlockCall]:
    """The calls that have a loss, scaled to one."""
    losses = [float(block_loss(block, call, tracker)) for call in calls]
    return [
        call._replace(costs=[costs / loss for costs in call.costs]) for call, loss in zip(calls, losses) if loss > 0
    ]


class _Choice:
    """The two codes that each weight of a layer may have, base and base + 1, and which it is to be."""

    def __init__(self, draft: Draft, steps: int) -> None:
        codes, weight = draft.rounded.codes.float(), draft.state.weight
        self.low, self.high = codes_of(draft.state.plan.weight_bits)
        self.steps = draft.rounded.steps()
        self.base = codes - (weight < codes * self.steps).float()
        exact = (weight / self.steps - self.base).clamp_(0, 1)
        start = exact.lerp(codes - self.base, DECIDED)
        self.rounding = SoftRounding(start, steps, REGULARIZATION, WARM_START, LEARNING_RATE)

    def matrix(self) -> Tensor:
        return (self.base + self.rounding.h).clamp_(self.low, self.high) * self.steps

    def step(self, slope: Tensor) -> None:
        """slope: of the loss by the matrix."""
        soft = self.base + self.rounding.h
        self.rounding.step(slope * self.steps * ((soft >= self.low) & (soft <= self.high)))

    def codes(self) -> Tensor:
        return (self.base + self.rounding.up()).clamp_(self.low, self.high)


@contextmanager
def _opened(block: nn.Module, drafts: Mapping[str, Draft], tracker: StepTracker) -> Iterator[dict[str, OpenLayer]]:
    """The block with its layers open, at the codes of their drafts."""
    layers: dict[str, OpenLayer] = {}
    try:
        for name, draft in drafts.items():
            layer = block.get_submodule(name)
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            layers[name] = OpenLayer(layer, draft.state.plan, draft.finished(), tracker)
            layers[name].matrix = draft.rounded.dequantize()
            block.set_submodule(name, layers[name])
        yield layers
    finally:
        for name, opened in layers.items():
            block.set_submodule(name, opened.layer)
