"""The layers that are timed: random inputs and weights, our operators as a layer calls them, and fp16's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff import ops
from qdiff.numerics.integer_matmul import int_matmul
from qdiff.numerics.packing import expand_int4

BLOCK = 32  # weights that share a multiplier
CHECKED_PIXELS = 4096


@dataclass(frozen=True)
class LinearShape:
    """A linear layer [m, k] -> [m, n], and how often one pass of each model runs it."""

    m: int
    n: int
    k: int
    counts: dict[str, int] = field(hash=False, compare=False)

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def operations(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def cold_bytes(self) -> float:
        """Of the smallest competitor: fp16 input and output, 4-bit weights."""
        return 2 * self.m * (self.k + self.n) + self.n * self.k / 2


@dataclass(frozen=True)
class ConvShape:
    """A convolution of a channels-last image, whose channels may be two segments with a scale each."""

    batch: int
    segments: tuple[int, ...]
    height: int
    width: int
    n: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    counts: dict[str, int] = field(hash=False, compare=False)

    def __str__(self) -> str:
        channels = "+".join(map(str, self.segments))
        return f"{self.batch}x{self.height}x{self.width} {channels}>{self.n} {self.kernel[0]}s{self.stride[0]}"

    @property
    def k(self) -> int:
        return sum(self.segments) * self.kernel[0] * self.kernel[1]

    @property
    def pixels(self) -> tuple[int, int]:
        sizes = zip((self.height, self.width), self.padding, self.kernel, self.stride)
        height, width = ((size + 2 * pad - kernel) // stride + 1 for size, pad, kernel, stride in sizes)
        return height, width

    @property
    def operations(self) -> int:
        return 2 * self.batch * self.pixels[0] * self.pixels[1] * self.n * self.k

    @property
    def cold_bytes(self) -> float:
        inputs = self.batch * sum(self.segments) * self.height * self.width
        outputs = self.batch * self.n * self.pixels[0] * self.pixels[1]
        return 2 * (inputs + outputs) + self.n * self.k / 2


def merged(rows: Iterable[dict[str, Any]], kind: type, models: list[str]) -> list[Any]:
    """The distinct shapes of these models. Layers with and without bias are one shape: all are timed with one."""
    shapes: dict[Any, Any] = {}
    for row in rows:
        if row["model"] not in models:
            continue
        sizes = {key: value for key, value in row.items() if key not in ("model", "count", "bias", "layer")}
        sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in sizes.items()}
        shape = kind(**sizes, counts={})
        shape = shapes.setdefault(shape, shape)
        shape.counts[row["model"]] = shape.counts.get(row["model"], 0) + row["count"]
    return list(shapes.values())


def random_bytes(*shape: int, low: int = 0, high: int = 256, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(low, high, shape, dtype=dtype, device="cuda")


@dataclass
class Weights:
    """One layer's weights, [n, k] in 4 and 8 bits and in fp16, with what goes with them. Not the same numbers."""

    codes4: Tensor
    multipliers: Tensor
    codes8: Tensor
    scale: Tensor
    bias: Tensor
    half: Tensor

    @classmethod
    def random(cls, n: int, k: int) -> Weights:
        blocks = (k // BLOCK + 1) // 2
        multipliers = random_bytes(n, blocks, low=1, high=16) | (random_bytes(n, blocks, low=1, high=16) << 4)
        return cls(
            codes4=random_bytes(n, k // 2),
            multipliers=multipliers,
            codes8=random_bytes(n, k, low=-127, high=128, dtype=torch.int8),
            scale=torch.rand(n, device="cuda") * 1e-3 + 1e-4,
            bias=torch.randn(n, device="cuda", dtype=torch.float16),
            half=torch.randn(n, k, device="cuda", dtype=torch.float16) * 0.02,
        )

    def packed(self) -> tuple[Tensor, Tensor, None, Tensor, int]:
        return self.codes4, self.multipliers, None, self.scale, BLOCK

    def integers(self) -> Tensor:
        return expand_int4(self.codes4, self.multipliers, BLOCK)


class LinearProblem:
    """`copies` layers of one shape. Every method takes the number of a copy."""

    def __init__(self, shape: LinearShape, copies: int, rank: int = 0) -> None:
        half = {"device": "cuda", "dtype": torch.float16}
        n, k = shape.n, shape.k
        self.x = [torch.randn(shape.m, k, **half) for _ in range(copies)]
        self.smooth = [torch.rand(k, device="cuda") + 0.5 for _ in range(copies)]
        self.weights = [Weights.random(n, k) for _ in range(copies)]
        self.down = [torch.randn(rank, k, **half) * 0.02 for _ in range(copies)]
        self.up = [torch.randn(n, rank, **half) for _ in range(copies)]
        self.quantized: list[tuple[Tensor, Tensor, Tensor]] = []

    def quantize(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return ops.quantize_per_token(self.x[i], self.smooth[i], None)

    def gemm4(self, i: int) -> Tensor:
        return self._w4a8(i, *self.quantized[i][:2])

    def gemm8(self, i: int) -> Tensor:
        return self._w8a8(i, *self.quantized[i][:2])

    def w4a8(self, i: int) -> Tensor:
        return self._w4a8(i, *self.quantize(i)[:2])

    def w8a8(self, i: int) -> Tensor:
        return self._w8a8(i, *self.quantize(i)[:2])

    def w4a8_with_branch(self, i: int) -> Tensor:
        codes, scale, low = ops.quantize_per_token(self.x[i], self.smooth[i], self.down[i])
        return self._w4a8(i, codes, scale, low, self.up[i])

    def w4a16(self, i: int) -> Tensor:
        weights = self.weights[i]
        return ops.w4a16_linear(self.x[i], self.smooth[i], *weights.packed(), weights.bias, None, None)

    def half(self, i: int) -> Tensor:
        return F.linear(self.x[i], self.weights[i].half, self.weights[i].bias)

    def prepare_codes(self) -> None:
        """What `gemm4` and `gemm8` take, made beforehand."""
        self.quantized = [self.quantize(i) for i in range(len(self.x))]

    def is_exact(self) -> bool:
        """Whether both integer products are those of `torch._int_mm`."""
        codes, scale, _ = self.quantize(0)
        four = self._w4a8(0, codes, scale, out_dtype=torch.int32)
        eight = self._w8a8(0, codes, scale, out_dtype=torch.int32)
        weights = self.weights[0]
        return torch.equal(four, int_matmul(codes, weights.integers())) and torch.equal(
            eight, int_matmul(codes, weights.codes8)
        )

    def _w4a8(
        self,
        i: int,
        codes: Tensor,
        scale: Tensor,
        low: Tensor | None = None,
        up: Tensor | None = None,
        out_dtype: torch.dtype = torch.float16,
    ) -> Tensor:
        weights = self.weights[i]
        return ops.w4a8_linear(codes, scale, *weights.packed(), weights.bias, low, up, None, out_dtype)

    def _w8a8(self, i: int, codes: Tensor, scale: Tensor, out_dtype: torch.dtype = torch.float16) -> Tensor:
        weights = self.weights[i]
        return ops.w8a8_linear(codes, scale, weights.codes8, weights.scale, weights.bias, None, None, None, out_dtype)


class ConvProblem:
    """`copies` convolutions of one shape. Every method takes the number of a copy."""

    def __init__(self, shape: ConvShape, copies: int) -> None:
        self.shape, channels = shape, sum(shape.segments)
        self.geometry = (list(shape.kernel), list(shape.stride), list(shape.padding), list(shape.segments))
        image = (shape.batch, channels, shape.height, shape.width)
        self.x = [self._channels_last(torch.randn(image, device="cuda", dtype=torch.float16)) for _ in range(copies)]
        self.x_scale = [torch.full((shape.batch, len(shape.segments)), 4 / 127, device="cuda") for _ in range(copies)]
        self.smooth = [torch.rand(channels, device="cuda") + 0.5 for _ in range(copies)]
        self.weights = [Weights.random(shape.n, shape.k) for _ in range(copies)]
        for weights in self.weights:
            weights.half = self._channels_last(weights.half.view(shape.n, channels, *shape.kernel))
        self.quantized: list[Tensor] = []

    @staticmethod
    def _channels_last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def quantize(self, i: int) -> Tensor:
        return ops.quantize_per_sample(self.x[i], self.x_scale[i], self.smooth[i], self.geometry[3], 1)

    def gemm4(self, i: int) -> Tensor:
        return self._w4a8(i, self.quantized[i])

    def w4a8(self, i: int) -> Tensor:
        return self._w4a8(i, self.quantize(i))

    def w8a8(self, i: int) -> Tensor:
        return self._w8a8(i, self.quantize(i))

    def half(self, i: int) -> Tensor:
        return F.conv2d(self.x[i], self.weights[i].half, self.weights[i].bias, self.shape.stride, self.shape.padding)

    def half_without_bias(self, i: int) -> Tensor:
        return F.conv2d(self.x[i], self.weights[i].half, None, self.shape.stride, self.shape.padding)

    def prepare_codes(self) -> None:
        """What `gemm4` takes, made beforehand."""
        self.quantized = [self.quantize(i) for i in range(len(self.x))]

    def is_exact(self) -> bool:
        """Whether both integer convolutions are `torch._int_mm` of patches, at random output pixels and the corners."""
        codes, (height, width) = self.quantize(0), self.shape.pixels
        shape, count = self.shape, min(CHECKED_PIXELS, self.shape.batch * height * width)
        b, y, x = (torch.randint(size, (count,), device="cuda") for size in (shape.batch, height, width))
        y[:4] = torch.tensor([0, 0, height - 1, height - 1], device="cuda")
        x[:4] = torch.tensor([0, width - 1, 0, width - 1], device="cuda")
        (pad_y, pad_x), (taps_y, taps_x) = shape.padding, (torch.arange(size, device="cuda") for size in shape.kernel)
        padded = F.pad(codes.permute(0, 2, 3, 1), (0, 0, pad_x, pad_x, pad_y, pad_y))
        rows = (y * shape.stride[0])[:, None, None] + taps_y[:, None]
        columns = (x * shape.stride[1])[:, None, None] + taps_x
        patches = padded[b[:, None, None], rows, columns]  # [count, kh, kw, C]
        matrix = torch.cat([part.flatten(1) for part in patches.split(shape.segments, dim=3)], dim=1)
        weights = self.weights[0]
        for got, integers in (
            (self._w4a8(0, codes, torch.int32), weights.integers()),
            (self._w8a8(0, codes, torch.int32), weights.codes8),
        ):
            if not torch.equal(got.permute(0, 2, 3, 1)[b, y, x], int_matmul(matrix, integers)):
                return False
        return True

    def _w4a8(self, i: int, codes: Tensor, out_dtype: torch.dtype = torch.float16) -> Tensor:
        weights = self.weights[i]
        extras = (weights.bias, None, None, *self.geometry, out_dtype)
        return ops.w4a8_conv2d(codes, self.x_scale[i], *weights.packed(), *extras)

    def _w8a8(self, i: int, codes: Tensor, out_dtype: torch.dtype = torch.float16) -> Tensor:
        weights = self.weights[i]
        extras = (weights.bias, None, None, *self.geometry, out_dtype)
        return ops.w8a8_conv2d(codes, self.x_scale[i], weights.codes8, weights.scale, *extras)
