"""What calibration knows about each layer's input: plain tensors, with the questions that methods ask of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Int32, Int64
from torch import Tensor

from qdiff.calibration.histogram import LogScale, TensorHistogram, tensor_histogram


@dataclass(frozen=True)
class ChannelHistograms:
    """Counts of log2 |x|: int32 [T, C, bins], on one `LogScale`."""

    scale: LogScale
    counts: Int32[Tensor, "timesteps channels bins"]


@dataclass(frozen=True)
class Samples:
    """A few rows of a layer's input, evenly over the timesteps.

    values:     float16 [R, taps, C]: a linear layer's row has one tap, a convolution's patch kh*kw, row major.
    timesteps:  int64 [R], the index of each row's timestep.
    """

    values: Float16[Tensor, "rows taps channels"]
    timesteps: Int64[Tensor, " rows"]

    def gemm(self, segments: Sequence[int]) -> Float[Tensor, "rows K"]:
        """Float32 rows in the order of a weight's input axis: segment, then tap, then channel."""
        return torch.cat([part.flatten(1) for part in self.values.float().split(list(segments), 2)], 1)


@dataclass(frozen=True)
class Moments:
    """First and second moments of what a layer multiplies by its weight; K runs over (tap, channel).

    Rows x of one denoiser call are weighted by b = 1 / their root mean square, so that every call counts alike: the
    sampler adds up the relative errors of all steps.

    gram:    float32 [K, K], the mean of b^2 x x^T.
    mean:    float32 [K], the mean of b^2 x.
    weight:  float32 [], the mean of b^2.
    rows:    how many were seen.
    """

    gram: Float[Tensor, "K K"]
    mean: Float[Tensor, " K"]
    weight: Float[Tensor, ""]
    rows: int

    def gemm(self, segments: Sequence[int]) -> Moments:
        """The same in the order of a weight's input axis: segment, then tap, then channel."""
        if len(segments) == 1:
            return self
        order = torch.arange(len(self.mean), device=self.mean.device).view(-1, sum(segments))
        index = torch.cat([part.flatten() for part in order.split(list(segments), 1)])
        return Moments(self.gram[index][:, index], self.mean[index], self.weight, self.rows)


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's input over T timesteps and C channels (convolution: over batch and positions).

    timesteps:       float32 [T], ascending.
    channel_absmax:  float32 [T, C], exact.
    histograms, samples, moments: None where no method needed them. Layers that read the same tensor share the moments.
    carried:         the rows of `samples` as they arrive when all layers before this one are quantized.
    first_token:     float32 [C], where it was asked for and is the same in every call: all else is without it.
    """

    timesteps: Float[Tensor, " timesteps"]
    channel_absmax: Float[Tensor, "timesteps channels"]
    histograms: ChannelHistograms | None = None
    samples: Samples | None = None
    moments: Moments | None = None
    carried: Samples | None = None
    first_token: Float[Tensor, " channels"] | None = None

    def absmax(
        self, segments: Sequence[int], smooth: Float[Tensor, " channels"] | None = None
    ) -> Float[Tensor, "timesteps segments"]:
        """The largest |x * smooth| of every timestep and channel range."""
        smoothed = self.channel_absmax if smooth is None else self.channel_absmax * smooth
        return torch.stack([part.amax(1) for part in smoothed.split(list(segments), 1)], 1)

    def histogram(
        self,
        channels: slice = slice(None),
        smooth: Float[Tensor, " channels"] | None = None,
        channel_weight: Float[Tensor, " channels"] | None = None,
        per_timestep: bool = True,
    ) -> TensorHistogram:
        """The histogram of |x * smooth| over a range of channels, for every timestep or over all of them; on the CPU.

        Raises `ValueError` where calibration was not asked for histograms.
        """
        if self.histograms is None:
            raise ValueError(
                "calibration kept no histograms; a method that uses them must name 'histograms' in `needs`"
            )
        # On the CPU, because sums that an accelerator scatters come out differently every time.
        counts, absmax = self.histograms.counts[:, channels].cpu(), self.channel_absmax[:, channels].cpu()
        if not per_timestep:
            counts, absmax = counts.sum(0, keepdim=True), absmax.amax(0, keepdim=True)
        ones = absmax.new_ones(absmax.shape[1])
        factor = ones if smooth is None else smooth[channels].cpu()
        weight = ones if channel_weight is None else channel_weight[channels].cpu()
        return tensor_histogram(counts, self.histograms.scale, absmax, factor, weight)

    def percentile(self, q: float) -> Float[Tensor, " timesteps"]:
        """The bound that a fraction `q` of |x| stays within, per timestep; within a histogram's bin (9 %)."""
        return self.histogram().percentile(q).to(self.channel_absmax.device)

    def channel_percentile(self, q: float) -> Float[Tensor, "timesteps channels"]:
        """The same per timestep and channel."""
        columns = [self.histogram(slice(c, c + 1)).percentile(q) for c in range(self.channel_absmax.shape[1])]
        return torch.stack(columns, 1).to(self.channel_absmax.device)

    @property
    def memory_bytes(self) -> int:
        """Bytes of every tensor held."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        tensors = [self.timesteps, self.channel_absmax]
        tensors += [self.histograms.counts] if self.histograms else []
        tensors += [self.moments.gram, self.moments.mean] if self.moments else []
        tensors += [] if self.first_token is None else [self.first_token]
        for samples in (self.samples, self.carried):
            tensors += [samples.values, samples.timesteps] if samples else []
        return tensors


@dataclass(frozen=True)
class Statistics:
    """Everything one calibration run collected: the timesteps it saw, ascending, and each layer that ran."""

    timesteps: tuple[float, ...]
    layers: Mapping[str, LayerStatistics]

    @property
    def memory_bytes(self) -> int:
        """Bytes of every tensor held, shared ones once; bounded by layers x 64 timesteps, not by prompts or steps."""
        held = {id(tensor): tensor for layer in self.layers.values() for tensor in layer.tensors()}
        return sum(tensor.nbytes for tensor in held.values())
