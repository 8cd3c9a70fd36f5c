"""What was done to each layer of a denoiser, what it saved, and why a layer was kept."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qdiff.layers import QuantConv2d, QuantEmbedding, QuantLinear
from qdiff.plugin.attention import describe_probabilities
from qdiff.plugin.structure import find_denoiser, named_layers, quantization_of
from qdiff.recipe import LayerPlan

_QUANTIZED = (QuantLinear, QuantConv2d, QuantEmbedding)
_ALL_ELSE = "everything else"


@dataclass(frozen=True)
class Row:
    """One layer. Bytes as in `Summary`; `reason` says why a kept layer was kept, and is empty for a quantized one."""

    name: str
    kind: str
    format: str
    bytes_before: int
    bytes_after: int
    reason: str = ""


@dataclass(frozen=True)
class Summary:
    """A denoiser's layers and bytes.

    bytes_before: all parameters and buffers of the full-precision denoiser, floating point at 16 bits.
    bytes_after:  all of the quantized one: codes, multipliers, scales, smoothing, low-rank branches and range tables
                  as they are stored, and what stayed in floating point at 16 bits, as before.
    bytes_held:   the quantized denoiser as it is now (kept layers may be in float32).
    probabilities: how attention's probabilities are quantized; empty where they are not.

    It should be the case that the rows' bytes add up to the totals: nothing that is stored is left out.
    """

    denoiser: str
    recipe: str | None
    rows: tuple[Row, ...]
    bytes_held: int
    probabilities: str = ""

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @property
    def ratio(self) -> float:
        """bytes_after / bytes_before."""
        return self.bytes_after / max(1, self.bytes_before)

    def __str__(self) -> str:
        table = Table(title=f"{self.denoiser}, {self.recipe or 'full precision'}")
        for column, side in (
            ("layer", "left"),
            ("kind", "left"),
            ("format", "left"),
            ("before", "right"),
            ("after", "right"),
        ):
            table.add_column(column, justify=side, no_wrap=column != "layer", overflow="fold")  # type: ignore[arg-type]
        table.add_column("why it was kept", overflow="fold")
        for row in self.rows:
            table.add_row(row.name, row.kind, row.format, _kib(row.bytes_before), _kib(row.bytes_after), row.reason)
        table.add_section()
        quantized = sum(not row.reason for row in self.rows[:-1])
        table.add_row(
            "total",
            f"{quantized} quantized",
            "",
            _kib(self.bytes_before),
            _kib(self.bytes_after),
            f"ratio {self.ratio:.3f}",
        )
        text = io.StringIO()
        Console(file=text, width=150).print(table)
        note = f"floating point counted at 16 bits, before and after; held in memory now: {_kib(self.bytes_held)}"
        note += f"\n{self.probabilities}" if self.probabilities else ""
        return f"{text.getvalue()}{note}"


def summary(pipe: DiffusionPipeline) -> Summary:
    """What is stored for each layer of a pipeline's denoiser, quantized or not; `print` it for a table.

    Raises:
        ValueError: not a diffusers pipeline, or one without a denoiser.
    """
    _, denoiser = find_denoiser(pipe)
    record = quantization_of(denoiser)
    kept = record.kept if record else {}
    counted: set[int] = set()
    rows: list[Row] = []
    for name, layer in named_layers(denoiser):
        if isinstance(layer, _QUANTIZED) and record:
            rows.append(_quantized_row(name, layer, record.plans[name.removesuffix(".base_layer")], counted))
        else:
            size = _bytes(_uncounted(_tensors(layer), counted))
            rows.append(Row(name, type(layer).__name__, "16-bit float", size, size, kept.get(name, "not quantized")))
    rest = _bytes(_uncounted(_tensors(denoiser), counted))
    rows.append(Row(_ALL_ELSE, "", "16-bit float", rest, rest, "norms, tables and other parameters"))
    held = sum(tensor.numel() * tensor.element_size() for tensor in _uncounted(_tensors(denoiser), set()))
    recipe = record.recipe.name if record else None
    return Summary(type(denoiser).__name__, recipe, tuple(rows), held, describe_probabilities(denoiser))


def _quantized_row(name: str, layer: nn.Module, plan: LayerPlan, counted: set[int]) -> Row:
    activation = {"none": "16-bit input"}.get(plan.range_mode, f"{plan.activation_bits}-bit input, {plan.range_mode}")
    after = sum(
        _bytes([tensor]) if key == "bias" else tensor.numel() * tensor.element_size()
        for key, tensor in layer.named_buffers()
        if _uncounted([tensor], counted)
    )
    return Row(name, plan.kind, f"{plan.weight_bits}-bit weight, {activation}", _bytes_before(layer), after)


def _bytes_before(layer: nn.Module) -> int:
    """The float layer that this one replaced, at 16 bits: weight and bias."""
    if isinstance(layer, nn.Embedding):
        return 2 * layer.num_embeddings * layer.embedding_dim
    if isinstance(layer, nn.Conv2d):
        inputs, outputs = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1], layer.out_channels
    else:
        inputs, outputs = layer.in_features, layer.out_features  # type: ignore[assignment]
    return 2 * outputs * (inputs + (getattr(layer, "bias", None) is not None))  # type: ignore[operator]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _uncounted(tensors: Iterable[Tensor], counted: set[int]) -> list[Tensor]:
    """The tensors not seen before, now seen: shared ones count once."""
    fresh = [tensor for tensor in tensors if id(tensor) not in counted]
    counted.update(map(id, fresh))
    return fresh


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Floating point at 16 bits, anything else as stored."""
    return sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in tensors)


def _kib(size: int) -> str:
    return f"{size / 1024:,.1f} KiB"
