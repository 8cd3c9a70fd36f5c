"""Are a checkpoint's layers computed as the CPU reference defines them? Operator by operator, on the same inputs.

Each quantized layer runs once on the CPU, on seeded noise, and every operator that it calls is noted with its arguments
and its result. The same arguments then go to the other device: codes and integer sums must be equal to the last bit,
floating-point results up to the order of a sum. So a difference is found where it arises, and not where it ends up.

Where there is no GPU, the CPU's integer sums can be compared with float64 ones, which are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from qdiff.layers import QuantConv2d, QuantEmbedding, QuantLinear
from qdiff.layers.quant_linear import FEW_ROWS
from qdiff.numerics.gemm_layout import from_gemm
from qdiff.numerics.packing import expand_weight
from qdiff.ops.backend import use_backend
from qdiff.ops.dynamic_linear import quantize_then_multiply
from qdiff.plugin.structure import find_denoiser, quantization_of

SIDE = 8  # of the images that convolutions are shown
TOKENS = 2 * FEW_ROWS  # enough that linear layers quantize their input
# Of the largest value: what another order of a float32 sum, and a last rounding that it tips over, may change.
ROUNDINGS, LEAST = 8, 1e-5


@dataclass(frozen=True)
class Difference:
    """Where two results differ. first: the index of the first element that does.  largest: difference of all."""

    count: int
    elements: int
    first: tuple[int, ...]
    expected: float
    got: float
    largest: float

    def __str__(self) -> str:
        return (
            f"{self.count} of {self.elements} differ, first at {list(self.first)}: expected {self.expected:.9g}, got "
            f"{self.got:.9g}; largest difference {self.largest:.3g}"
        )


@dataclass(frozen=True)
class Check:
    """One result of one operator of a layer. difference: None where there is none.  note: what else to know."""

    layer: str
    operator: str
    result: str
    difference: Difference | None
    note: str = ""


@torch.no_grad()
def verify(pipe: DiffusionPipeline, device: torch.device | str = "cuda", seed: int = 0) -> Iterator[Check]:
    """Yield a check for every result of every operator of every quantized layer, in the order of the layers.

    The pipeline must be on the CPU. device: where the operators are run against it; "cpu" compares the integer sums
    with exact ones in float64.

    Raises:
        ValueError: the pipeline is not quantized, or not on the CPU.
        RuntimeError: there is no such device.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: there is nothing to compare the CPU reference with")
    _, denoiser = find_denoiser(pipe)
    record = quantization_of(denoiser)
    if record is None:
        raise ValueError("the pipeline is not quantized: there is nothing to verify; pass a checkpoint of qdiff.save")
    generator = torch.Generator().manual_seed(seed)
    for name in record.plans:
        layer = denoiser.get_submodule(name)
        if any(tensor.device.type != "cpu" for tensor in layer.buffers()):
            raise ValueError(f"the pipeline must be on the CPU: layer {name!r} is not; load it anew")
        record.tracker.set(record.tracker.timesteps[len(record.tracker.timesteps) // 2], 2)
        for x in _inputs(layer, generator):
            if isinstance(layer, QuantEmbedding):
                if device.type != "cpu":
                    yield Check(name, "embedding", "values", _difference(layer(x), _embedded(layer, x, device)))
                continue
            with _Calls() as recorder:
                layer(x)
            for operator, arguments, expected in recorder.calls:
                yield from _compare(name, operator, arguments, expected, device)


def report_lines(checks: Sequence[Check]) -> Iterator[str]:
    """Yield what a person wants to know: the first difference, how many there are, and what no kernel computed."""
    wrong = [check for check in checks if check.difference]
    layers = len({check.layer for check in checks})
    if wrong:
        first = wrong[0]
        yield f"first difference: layer {first.layer}, {first.operator}, {first.result}: {first.difference}"
        concerned = len({check.layer for check in wrong})
        yield f"{len(wrong)} of {len(checks)} results differ, in {concerned} of {layers} layers"
    else:
        yield f"{len(checks)} results of {layers} layers: no difference"
    for note in dict.fromkeys(check.note for check in checks if check.note):
        count = sum(check.note == note for check in checks)
        yield f"{count} results without a kernel, by the reference on that device: {note}"


class _Calls(TorchDispatchMode):
    """Notes every call of an operator of ours, and before one that does what two do, theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.qdiff.dynamic_linear.default:
            with self:
                result = quantize_then_multiply(*args)
        else:
            result = func(*args, **(kwargs or {}))
        if func.namespace == "qdiff":
            self.calls.append((func, args, result))
        return result


def _inputs(layer: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
    if isinstance(layer, QuantEmbedding):
        yield torch.arange(layer.num_embeddings)
    elif isinstance(layer, QuantConv2d):
        image = torch.randn(2, layer.in_channels, SIDE, SIDE, generator=generator)
        yield image.to(layer.compute_dtype)
    elif isinstance(layer, QuantLinear):
        for leading in ((2,), (2, TOKENS)):
            yield torch.randn(*leading, layer.in_features, generator=generator).to(layer.compute_dtype)


def _compare(
    name: str, operator: Any, arguments: tuple[Any, ...], expected: Any, device: torch.device
) -> Iterator[Check]:
    short = operator.name().removeprefix("qdiff::").removesuffix(".default")
    names = [argument.name for argument in operator._schema.arguments]
    sums = {"out_dtype": torch.int32, "residual": None} if "out_dtype" in names else None
    # In float64 there are sums of codes only; an operator that makes its own is the two that were noted before it.
    if sums is not None and (device.type != "cpu" or "x_codes" in names):
        integers = tuple(sums.get(key, value) for key, value in zip(names, arguments))
        by_name = dict(zip(names, integers))
        if device.type == "cpu":
            yield Check(name, short, "integer sums", _difference(_exact_sums(by_name), operator(*integers)))
        else:
            got, note = _on(device, operator, integers)
            yield Check(name, short, "integer sums", _difference(operator(*integers), got), note)
    if device.type != "cpu":
        got, note = _on(device, operator, arguments)
        results = [*zip(*map(_listed, (expected, got)))]
        for index, (one, other) in enumerate(results):
            what = "codes" if not one.is_floating_point() else "values" if len(results) == 1 else f"values {index}"
            yield Check(name, short, what, _difference(one, other), note)


def _on(device: torch.device, operator: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str]:
    """The operator's result by its kernel, or, where it has none for this problem, by the reference on that device."""
    moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), arguments)
    note = ""
    try:
        with use_backend("cuda"):
            result = operator(*moved)
    except RuntimeError as error:
        if "qdiff has no kernel" not in str(error):
            raise
        note = str(error)
        with use_backend("reference"):
            result = operator(*moved)
    return tree_map_only(Tensor, lambda tensor: tensor.cpu(), result), note


def _embedded(layer: QuantEmbedding, x: Tensor, device: torch.device) -> Tensor:
    """A table has no operator of ours: torch's own run on the other device."""
    buffers = {key: tensor.to(device) for key, tensor in layer.named_buffers()}
    result: Tensor = torch.func.functional_call(layer, buffers, (x.to(device),))
    return result.cpu()


def _exact_sums(arguments: dict[str, Any]) -> Tensor:
    """The sums of products by float64, in which all of them are exact: below 2^53."""
    x, codes = arguments["x_codes"].double(), arguments["codes"]
    if codes.dtype == torch.uint8:
        codes = expand_weight(codes, arguments["multipliers"], arguments["codebook"], arguments["group_size"])
    weight = codes.double()
    if "kernel" not in arguments:
        return (x @ weight.t()).to(torch.int32)
    kernel, segments = tuple(arguments["kernel"]), tuple(arguments["segments"])
    images = from_gemm(weight, segments, kernel)
    return F.conv2d(x, images, stride=arguments["stride"], padding=arguments["padding"]).to(torch.int32)


def _listed(value: Any) -> Sequence[Tensor]:
    return [value] if isinstance(value, Tensor) else [item for item in value if isinstance(item, Tensor)]


def _difference(expected: Tensor, got: Tensor) -> Difference | None:
    if expected.shape != got.shape or expected.dtype != got.dtype:
        raise RuntimeError(
            f"results must be of one shape and dtype: got {got.dtype} {tuple(got.shape)}, expected {expected.dtype} "
            f"{tuple(expected.shape)}"
        )
    if expected.numel() == 0:
        return None
    one, other = expected.double(), got.double()
    allowed = 0.0
    if expected.is_floating_point():
        eps = torch.finfo(expected.dtype).eps
        allowed = max(ROUNDINGS * eps, LEAST) * float(one.abs().max())
    distance = (one - other).abs()
    wrong = ~(distance <= allowed)  # NaN is wrong too
    if not wrong.any():
        return None
    first = tuple(wrong.nonzero()[0].tolist())
    return Difference(
        int(wrong.sum()), wrong.numel(), first, float(one[first]), float(other[first]), float(distance.max())
    )
