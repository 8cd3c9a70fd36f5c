"""What is remembered of one layer's input at one timestep, in bounded memory, and how two such memories are joined."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Int32
from torch import Tensor, nn

from qdiff.calibration.histogram import LogScale
from qdiff.calibration.statistics import Moments

# Rows of a layer's input (over all timesteps) kept for output-error searches.
SAMPLE_ROWS = 256
# Rows a call that go into the histograms: with 64 channels that is 16,000 values, which place a 99.9th percentile well.
HISTOGRAM_ROWS = 256
# Rows a call that go into the second moments, on a CPU and elsewhere. Measured on emoji-sd, 40 calls, one core: 128
# cost 0.6 of the denoiser's own time and 256 0.9, for an output error of GPTQ that is 0.5 % less.
MOMENT_ROWS_CPU, MOMENT_ROWS = 128, 1024
# The second moments are symmetric: only blocks of this many rows, from the diagonal on, are summed.
_GRAM_BLOCK = 512
HALF_MAX = torch.finfo(torch.float16).max


@dataclass
class Memory:
    """absmax: float32 [C].  counts: int32 [C, bins].  rows: float16 [r, taps, C], each with a random priority [r]."""

    absmax: Float[Tensor, " channels"]
    counts: Int32[Tensor, "channels bins"] | None
    rows: Float16[Tensor, "rows taps channels"] | None
    priority: Float[Tensor, " rows"] | None

    def join(self, other: Memory) -> Memory:
        """The memory of both. Law: commutative, but for the order of the rows."""
        return Memory(
            torch.maximum(self.absmax, other.absmax),
            None if self.counts is None or other.counts is None else self.counts + other.counts,
            None if self.rows is None or other.rows is None else torch.cat([self.rows, other.rows]),
            None if self.priority is None or other.priority is None else torch.cat([self.priority, other.priority]),
        )

    def trim(self, rows: int) -> None:
        """Keep the `rows` rows of highest priority: a uniform sample of all rows offered so far."""
        if self.rows is not None and self.priority is not None and len(self.priority) > rows:
            best = self.priority.topk(rows).indices.sort().values
            self.priority = self.priority[best]
            self.rows = self.rows[best.to(self.rows.device, non_blocking=True)]


def spread(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct indices below `rows` (all, if there are fewer), one drawn from each of equal stretches."""
    if count >= rows:
        return torch.arange(rows)
    offsets = torch.rand(count, generator=generator, dtype=torch.float64)
    return ((torch.arange(count) + offsets) * rows / count).long()


class InputView:
    """One way to look at both kinds of layers' inputs: positions, each with C channels and, around it, taps.

    x: [..., C] for a linear layer, [B, C, H, W] for a convolution.
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.conv = layer if isinstance(layer, nn.Conv2d) else None
        self.x = x if self.conv else x.reshape(-1, x.shape[-1])

    def channel_absmax(self) -> Float[Tensor, " channels"]:
        """Exact, over every position; NaN or infinite where the input is."""
        dims = (0, 2, 3) if self.conv else (0,)
        return torch.maximum(self.x.amax(dims), self.x.amin(dims).neg_()).float()

    def rows(self, count: int, generator: torch.Generator) -> Float[Tensor, "rows channels"]:
        """The channels at up to `count` positions."""
        if self.conv is None:
            return self.x[self._at(spread(len(self.x), count, generator))]
        batch, _, height, width = self.x.shape
        chosen = self._at(spread(batch * height * width, count, generator))
        return self.x.permute(0, 2, 3, 1)[chosen // (height * width), chosen // width % height, chosen % width]

    def patches(self, count: int, generator: torch.Generator) -> Float[Tensor, "rows taps channels"]:
        """What up to `count` output positions multiply by the weight; padding is zero."""
        if self.conv is None:
            return self.rows(count, generator)[:, None]
        (kh, kw), (sh, sw), (ph, pw) = self.conv.kernel_size, self.conv.stride, _padding(self.conv)
        batch, _, height, width = self.x.shape
        out_height, out_width = (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1
        chosen = self._at(spread(batch * out_height * out_width, count, generator))
        tap = torch.arange(kh * kw, device=self.x.device)
        y = (chosen // out_width % out_height * sh - ph)[:, None] + tap // kw
        x = (chosen % out_width * sw - pw)[:, None] + tap % kw
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        image = (chosen // (out_height * out_width))[:, None].expand_as(y)
        values = self.x.permute(0, 2, 3, 1)[image, y.clamp(0, height - 1), x.clamp(0, width - 1)]
        return values * inside[..., None]

    def _at(self, indices: Tensor) -> Tensor:
        # Without waiting for what the device is still doing: there are hundreds of layers, each with a hook.
        return indices.to(self.x.device, non_blocking=True)


def _half(values: Tensor) -> Float16[Tensor, "..."]:
    return values.float().clamp_(-HALF_MAX, HALF_MAX).half()


def _padding(conv: nn.Conv2d) -> tuple[int, ...]:
    if not isinstance(conv.padding, str):
        return conv.padding
    return tuple((size - 1) // 2 if conv.padding == "same" else 0 for size in conv.kernel_size)


def observe(
    layer: nn.Module,
    x: Tensor,
    scale: LogScale | None,
    samples: int,
    generator: torch.Generator,
    histogram_generator: torch.Generator,
) -> Memory:
    """What one call teaches; `scale` None keeps no histogram, `samples` 0 no rows."""
    view = InputView(layer, x.detach())
    rows = _half(view.patches(samples, generator)) if samples else None
    return Memory(
        absmax=view.channel_absmax(),
        counts=scale.count(view.rows(HISTOGRAM_ROWS, histogram_generator)) if scale else None,
        rows=rows,
        priority=None if rows is None else torch.rand(len(rows), generator=generator),
    )


class MomentSum:
    """Adds up the `Moments` of one layer's input over the denoiser's calls; bounded by its width."""

    def __init__(self) -> None:
        self.calls = 0
        self.rows = 0
        self.weight = torch.zeros(())
        self.mean = torch.zeros(0)
        self.gram = torch.zeros(0, 0)

    def add(self, layer: nn.Module, x: Tensor, generator: torch.Generator) -> None:
        """Some rows of one call, at one timestep; they count alike, however large they are."""
        count = MOMENT_ROWS_CPU if x.device.type == "cpu" else MOMENT_ROWS
        rows = InputView(layer, x.detach()).patches(count, generator).flatten(1).float()
        energy = rows.square().mean()
        balance = torch.where(energy > 0, energy.rsqrt(), 1.0)
        rows = rows * balance
        if not self.rows:
            width = rows.shape[1]
            self.gram, self.mean, self.weight = rows.new_zeros(width, width), rows.new_zeros(width), rows.new_zeros(())
        for start in range(0, rows.shape[1], _GRAM_BLOCK):
            part = rows[:, start : start + _GRAM_BLOCK]
            self.gram[start : start + _GRAM_BLOCK, start:].addmm_(part.T, rows[:, start:])
        self.mean.add_(rows.sum(0) * balance)
        self.weight.add_(balance.square() * len(rows))
        self.rows += len(rows)

    def moments(self) -> Moments:
        """What has been seen so far; takes over the memory of the sum, which is not to be added to any more."""
        gram = self.gram.div_(self.rows)
        for start in range(0, len(gram), _GRAM_BLOCK):
            stop = start + _GRAM_BLOCK
            gram[stop:, start:stop] = gram[start:stop, stop:].T
        return Moments(gram, self.mean / self.rows, self.weight / self.rows, self.rows)
