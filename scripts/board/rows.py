"""Every row that is ours: a recipe with its calibration, and the row that its paper improves on.

A method is shown where its paper shows it: weights' methods where weights decide, ranges where activations do, each
against a row that differs in that method alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from board.peers import all_peers
from qdiff import Calibration, Recipe
from qdiff.recipe import DEFAULT_KEEP, PRESETS, MethodSpec, WeightSpec

STATIC, TEMPORAL, DYNAMIC = MethodSpec.of("static"), MethodSpec.of("temporal"), MethodSpec.of("dynamic")
CHANNEL_8 = WeightSpec(8, -1, "channel")
CHANNEL_4 = WeightSpec(4, 32, "channel")
SECTIONS = ("presets", "rounding", "transforms", "ranges", "sampling", "bits")
DEFAULT, PEER = "w4a8", "SDNQ int4"
# Presets whose papers say which steps to calibrate on.
SAMPLINGS = {
    "q-diffusion": Calibration(steps=20, sampling="uniform", sampled_steps=10),
    "ptq4dm": Calibration(steps=20, sampling="normal", sampled_steps=10),
}


@dataclass(frozen=True)
class Row:
    """One recipe to measure. baseline: the label of the row that it should be better than; None: it is one itself."""

    section: str
    label: str
    recipe: Recipe
    baseline: str | None = None
    calibration: Calibration = field(default_factory=Calibration)


def all_rows() -> list[Row]:
    """Every row, in the table's order.

    Raises:
        ValueError: two rows with one label, or a baseline that is neither a row's label nor a peer's.
    """
    rows = [*presets(), *rounding(), *transforms(), *ranges(), *sampling(), *bits()]
    labels = [row.label for row in rows]
    if doubled := {label for label in labels if labels.count(label) > 1}:
        raise ValueError(f"labels must be unique: got {sorted(doubled)} more than once")
    if unknown := {row.baseline for row in rows} - {None, *labels, *(peer.label for peer in all_peers())}:
        raise ValueError(f"baselines must be labels of rows: got {sorted(map(str, unknown))}")
    return rows


def presets() -> Iterator[Row]:
    naive = next(name for name in ("naive", "naive-w4a8") if name in PRESETS)
    for name, recipe in PRESETS.items():
        baseline = PEER if name == DEFAULT else None if name == naive else naive
        yield Row("presets", name, recipe, baseline, SAMPLINGS.get(name, Calibration()))


def _plain(weight: WeightSpec, activation_bits: int, range_: MethodSpec | None = None) -> Recipe:
    """Every layer but the first and last alike, rounded to nearest, nothing transformed."""
    ranges = {} if range_ is None else {"linear_range": range_, "conv_range": range_}
    return Recipe("plain", weight, activation_bits, keep=DEFAULT_KEEP, **ranges)


def _method(name: str) -> tuple[MethodSpec, ...]:
    return (MethodSpec.of(name),)


def rounding() -> Iterator[Row]:
    """4-bit weights everywhere, 8-bit activations: what the codes are chosen by is all that differs."""
    grouped, channel = _plain(WeightSpec(), 8), _plain(CHANNEL_4, 8)
    unsearched = MethodSpec.of("nearest", search=False)
    yield Row("rounding", "nearest, scales from the largest", grouped.replace(rounding=unsearched))
    yield Row("rounding", "nearest", grouped, "nearest, scales from the largest")
    for name in ("gptq", "adaround", "adaquant"):
        yield Row("rounding", f"{name} rounding", grouped.replace(rounding=MethodSpec.of(name)), "nearest")
    blocks = grouped.replace(rounding=MethodSpec.of("adaround", block_iterations=40))
    yield Row("rounding", "adaround rounding, blocks", blocks, "adaround rounding")
    yield Row("rounding", "nearest, one scale a channel", channel)
    for name in ("lq_nets", "lloyd_max"):
        yield Row(
            "rounding",
            f"{name}, one codebook a channel",
            channel.replace(rounding=MethodSpec.of(name)),
            "nearest, one scale a channel",
        )


def transforms() -> Iterator[Row]:
    """Each transform where its paper shows it."""
    w4, w4a16, w8 = _plain(WeightSpec(), 8), _plain(WeightSpec(), 16), _plain(CHANNEL_8, 8, STATIC)
    smoothed = w4.replace(transforms=_method("smoothing"))
    low_rank = (MethodSpec.of("smoothing"), MethodSpec.of("low_rank", rank=32))
    yield Row("transforms", "smoothing", smoothed, "nearest")
    yield Row("transforms", "smoothing, low_rank 32", w4.replace(transforms=low_rank), "smoothing")
    yield Row("transforms", "W4A16", w4a16)
    yield Row("transforms", "W4A16, awq", w4a16.replace(transforms=_method("awq")), "W4A16")
    unsearched = w4.replace(rounding=MethodSpec.of("nearest", search=False))
    yield Row(
        "transforms",
        "clipping",
        unsearched.replace(transforms=_method("clipping")),
        "nearest, scales from the largest",
    )
    tensor = _plain(WeightSpec(5, -1, "tensor"), 8)
    yield Row("transforms", "W5 a tensor", tensor)
    for name in ("channel_splitting", "bias_correction"):
        yield Row("transforms", f"W5 a tensor, {name}", tensor.replace(transforms=_method(name)), "W5 a tensor")
    w8a8_minmax = _plain(CHANNEL_8, 8, MethodSpec.of("static", estimator="minmax"))
    yield Row("transforms", "W8A8 min-max", w8a8_minmax)
    for name in ("smoothquant", "first_token"):
        yield Row("transforms", f"W8A8 min-max, {name}", w8a8_minmax.replace(transforms=_method(name)), "W8A8 min-max")
    w8a6 = w8.replace(activation_bits=6)
    yield Row("transforms", "W8A6 static, shift", w8a6.replace(transforms=_method("shift")), "W8A6 static")
    w4a4 = _plain(WeightSpec(), 4)
    yield Row("transforms", "W4A4", w4a4)
    yield Row("transforms", "W4A4, hadamard", w4a4.replace(transforms=_method("hadamard")), "W4A4")


def ranges() -> Iterator[Row]:
    """8-bit weights, which err little, and few bits for the activations: their ranges decide."""
    for activation_bits in (6, 5):
        name = f"W8A{activation_bits}"
        minmax, static = f"{name} static min-max", f"{name} static"
        yield Row("ranges", minmax, _with_range(activation_bits, MethodSpec.of("static", estimator="minmax")))
        yield Row("ranges", static, _with_range(activation_bits, STATIC), minmax)
        for estimator in ("percentile", "ksigma", "kl"):
            spec = MethodSpec.of("static", estimator=estimator)
            yield Row("ranges", f"{name} static {estimator}", _with_range(activation_bits, spec), minmax)
        for method in ("temporal", "grouped", "tdq"):
            spec = MethodSpec.of(method)
            yield Row("ranges", f"{name} {method}", _with_range(activation_bits, spec), static)
        by_token = _with_range(activation_bits, TEMPORAL).replace(linear_range=DYNAMIC)
        yield Row("ranges", f"{name} by token, temporal convolutions", by_token, f"{name} temporal")
    # The paper compares with 4 uniform bits; here it can only cost, as the probabilities were not quantized before.
    w8a8 = _with_range(8, TEMPORAL).replace(linear_range=DYNAMIC)
    yield Row("ranges", "W8A8 by token, temporal convolutions", w8a8)
    probabilities = w8a8.replace(probabilities=MethodSpec.of("log2"))
    yield Row("ranges", "W8A8, log2 probabilities", probabilities, "W8A8 by token, temporal convolutions")


def _with_range(activation_bits: int, spec: MethodSpec) -> Recipe:
    return _plain(CHANNEL_8, activation_bits, spec)


def sampling() -> Iterator[Row]:
    """At which steps a static range is measured: a quarter of them, unless the label says otherwise."""
    plain, few = _plain(CHANNEL_8, 6, STATIC), 5
    one = "W8A6 static, the middle step alone"
    uniform = "W8A6 static, uniform steps"
    yield Row("sampling", one, plain, calibration=Calibration(steps=20, sampling="uniform", sampled_steps=1))
    yield Row("sampling", uniform, plain, one, Calibration(steps=20, sampling="uniform", sampled_steps=few))
    normal = Calibration(steps=20, sampling="normal", sampled_steps=few)
    yield Row("sampling", "W8A6 static, normally distributed steps", plain, uniform, normal)
    yield Row("sampling", "W8A6 static, a schedule of 4 steps", plain, one, Calibration(steps=4))


def bits() -> Iterator[Row]:
    """The default's methods at other widths, 2 to 8 bits for weights and 4 to 16 for activations."""
    default = Recipe.preset(DEFAULT).replace(overrides=())
    for width in range(2, 9):
        weight = WeightSpec(width, 32) if width <= 4 else WeightSpec(width, -1, "channel")
        yield Row("bits", f"W{width}A8, methods of {DEFAULT}", default.replace(weight=weight))
    w8 = default.replace(weight=CHANNEL_8)
    for width in (4, 5, 6, 7, 16):
        yield Row("bits", f"W8A{width}, methods of {DEFAULT}", w8.replace(activation_bits=width))
