"""The tables and the figures that sum them up, in lines of at most 110 characters."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable

from kernel_bench.sections import FEW_ROWS, MANY_ROWS, Row

Sections = dict[str, list[Row]]

WIDE = 3072  # inputs whose products take so long that the rest matters little


def ratio(row: Row, other: str, ours: str = "w4a8") -> float:
    """How many times faster ours is; NaN where one of them failed."""
    us = row.get("us", {})
    return us.get(other, math.nan) / us.get(ours, math.nan)


def lines(sections: Sections) -> list[str]:
    """All tables, the summary last."""
    out: list[str] = []
    for name, format_row in FORMATS.items():
        if sections.get(name):
            out += ["", *HEADS[name]]
            out += [
                f"{row['name']}: FAILED {row['error'][:80]}" if "error" in row else format_row(row)
                for row in sections[name]
            ]
    return [*out, "", *summary(sections)]


def _linear(row: Row) -> str:
    us = row["us"]
    rank = f"{100 * (us['w4a8_rank'] / us['w4a8'] - 1):+5.1f}%" if "w4a8_rank" in us else " " * 6
    return (
        f"{row['name']:17}{us['w4a8']:7.1f} ={us['quantize']:6.1f} +{us['gemm']:7.1f} {rank} {us['w8a8']:7.1f} |"
        f"{us['fp16']:7.1f}{ratio(row, 'fp16'):6.2f} |{us['fp8']:7.1f}{row['fp8_kind'][0]}{ratio(row, 'fp8'):6.2f}"
        f"{_marks(row)}"
    )


def _small(row: Row) -> str:
    us = row["us"]
    times = f"{us['w4a16']:7.2f}{us['w4a8']:8.2f}{us['fp16']:8.2f}"
    return f"{row['name']:17}{times}{ratio(row, 'fp16', 'w4a16'):6.2f}{_marks(row)}"


def _conv(row: Row) -> str:
    us = row["us"]
    return (
        f"{row['name']:27}{us['w4a8']:7.1f} ={us['quantize']:6.1f} +{us['gemm']:7.1f}{us['w8a8']:7.1f} |"
        f"{us['fp16']:7.1f}{ratio(row, 'fp16'):6.2f} |{ratio(row, 'fp16_without_bias'):6.2f}{_marks(row)}"
    )


def _quantize(row: Row) -> str:
    rates = row["gb_per_s"]
    return f"{row['name']:46}{rates['quantize']:7.0f} GB/s, copy {rates['copy']:5.0f}: {100 * row['of_copy']:5.1f} %"


def _fused(row: Row) -> str:
    us = row["us"]
    return f"{row['name']:32}{us['fused']:8.1f}{us['apart']:8.1f}{us['torch']:8.1f}{ratio(row, 'apart', 'fused'):7.2f}"


def _peak(row: Row) -> str:
    return f"{row['name']:24}{row['us']:9.1f} us {row['tops']:6.0f} T(FL)OP/s {row['note']}"


def _overhead(row: Row) -> str:
    late = "" if row["gpu_us"] < row["us"] else "  the GPU was slower: no measure of the host"
    return f"{row['name']:22}{row['us']:6.1f} us (GPU {row['gpu_us']:.1f}){late}"


def _first_call(row: Row) -> str:
    imported, compiling = (row.get(f"of_which_{part}", math.nan) for part in ("import_of_cupy", "compiling"))
    parts = f"importing CuPy {imported:.2f} s, compiling or loading kernels {compiling:.2f} s"
    return f"{row['name']:16}{row['seconds']:7.2f} s, of which {parts} {row.get('note', '')}"


def _tiles(row: Row) -> str:
    us = {name: value for name, value in row["us"].items() if not math.isnan(value)}
    best = ", ".join(f"{name} {us[name]:.1f}" for name in sorted(us, key=us.__getitem__)[:3])
    return f"{row['name']:27}{row['guess']:>9}{row['us'][row['guess']]:7.1f} ({_guess_over_best(row):.2f})  {best}"


def _guess_over_best(row: Row) -> float:
    times = [us for us in row["us"].values() if not math.isnan(us)]
    return row["us"][row["guess"]] / min(times, default=math.nan)


FORMATS: dict[str, Callable[[Row], str]] = {
    "tile_sweep": _tiles,
    "linear": _linear,
    "small": _small,
    "conv": _conv,
    "quantize": _quantize,
    "fused": _fused,
    "peak": _peak,
    "overhead": _overhead,
    "first_call": _first_call,
}
HEADS = {
    "tile_sweep": ["TILES, us: the guess (over the best), and the three best"],
    "linear": [
        "LINEAR, us (fp8: s static scale, d dynamic, r rows)",
        "M x N x K           w4a8 = quant. +   gemm rank32    w8a8 |   fp16 ratio |    fp8  ratio",
    ],
    "small": ["LINEAR of few rows, us", "M x N x K          w4a16    w4a8    fp16 ratio (of w4a16)"],
    "conv": [
        "CONVOLUTION, us: B x H x W C>N, kernel and stride; ratios to cuDNN with bias, without",
        "                              w4a8 = quant. +   gemm   w8a8 |   fp16 ratio | no bias",
    ],
    "quantize": ["QUANTIZATION, bytes read and written"],
    "fused": [
        "QUANTIZATION with what comes before it, us; apart: by torch, then quantized; by torch alone",
        "                                   fused   apart   torch  ratio (of apart)",
    ],
    "peak": ["8192 x 8192 x 8192, without quantization"],
    "overhead": ["HOST TIME of a call"],
    "first_call": ["EVERY LAYER OF SDXL ONCE, 4 and 8 bits"],
}


def _marks(row: Row) -> str:
    notes = [f"{name} {note}"[:40] for name, note in row.get("notes", {}).items()]
    return "".join(f"  {text}" for text in ([] if row["exact"] else ["FAILED: not exact"]) + notes)


def summary(sections: Sections) -> list[str]:
    """Geometric means, worst cases and totals of a pass."""
    linear, small, conv = (
        [row for row in sections.get(name, []) if "error" not in row] for name in ("linear", "small", "conv")
    )
    many = [row for row in linear if row["m"] >= MANY_ROWS]
    between = [row for row in linear if row["m"] < MANY_ROWS]
    out = ["SUMMARY: how many times faster, geometric mean and range"]
    wide = [row for row in many if row["k"] >= WIDE]
    for title, rows in (
        (f"linear, M >= {MANY_ROWS}", many),
        (f"linear, M >= {MANY_ROWS}, K >= {WIDE}", wide),
        (f"linear, {FEW_ROWS} < M < {MANY_ROWS}", between),
    ):
        for other in ("fp16", "fp8"):
            out += _spread(f"{title}, over {other}", [(row, ratio(row, other)) for row in rows])
        out += _spread(f"{title}, product / fp16", [(row, ratio(row, "fp16", "gemm")) for row in rows])
    out += _spread(f"linear, M <= {FEW_ROWS}, over fp16", [(row, ratio(row, "fp16", "w4a16")) for row in small])
    out += _spread("conv, over cuDNN fp16", [(row, ratio(row, "fp16")) for row in conv])
    for window in dict.fromkeys(row["name"].split()[-1] for row in conv):
        rows = [row for row in conv if row["name"].split()[-1] == window]
        out += _spread(f"conv {window}, over cuDNN fp16", [(row, ratio(row, "fp16")) for row in rows])
        out += _spread(f"conv {window}, product / cuDNN fp16", [(row, ratio(row, "fp16", "gemm")) for row in rows])
    out += _spread("conv, over cuDNN fp16 without bias", [(row, ratio(row, "fp16_without_bias")) for row in conv])
    out += _of_peak(many, sections.get("peak", []))
    ranks = [(100 * (row["us"]["w4a8_rank"] / row["us"]["w4a8"] - 1), row["name"]) for row in many]
    if ranks := [pair for pair in ranks if not math.isnan(pair[0])]:
        middle, (worst, name) = statistics.median(cost for cost, _ in ranks), max(ranks)
        out.append(f"rank 32 costs {middle:.1f} % (median), at most {worst:.1f} % ({name})")
    if rates := [(row["of_copy"], row["name"]) for row in sections.get("quantize", [])]:
        out.append(f"quantization at {100 * min(rates)[0]:.0f} % of copy or better ({min(rates)[1]})")
    if used := [row["workspace"] for row in (*linear, *small, *conv)]:
        out.append(f"workspace of an operator: at most {max(used) / 2**20:.1f} MiB")
    out += _guesses([row for row in sections.get("tile_sweep", []) if "error" not in row])
    out += _totals(linear, small, conv)
    failed = [row["name"] for rows in sections.values() for row in rows if "error" in row or not row.get("exact", True)]
    return [*out, f"FAILED: {', '.join(failed)}" if failed else "nothing failed; all integer products exact"]


def _spread(title: str, pairs: Iterable[tuple[Row, float]]) -> list[str]:
    known = [(value, row["name"]) for row, value in pairs if not math.isnan(value)]
    if not known:
        return []
    (low, where), (high, _) = min(known), max(known)
    mean = statistics.geometric_mean(value for value, _ in known)
    return [f"{title:42}{mean:6.3f}  {low:.2f} ({where}) to {high:.2f}, {len(known)} shapes"]


def _guesses(rows: list[Row]) -> list[str]:
    slower = [(_guess_over_best(row), row["name"]) for row in rows]
    if not (known := [pair for pair in slower if not math.isnan(pair[0])]):
        return []
    mean, (worst, name) = statistics.geometric_mean(times for times, _ in known), max(known)
    return [f"guessed tiles take {mean:.3f} times as long as the best (geometric mean), at most {worst:.2f} ({name})"]


def _of_peak(rows: list[Row], peaks: list[Row]) -> list[str]:
    """Products alone, in terms of the fastest that cuBLAS does with int8."""
    best = next((row["tops"] for row in peaks if row["name"].startswith("int8")), math.nan)
    shares = [(row, row["operations"] / row["us"]["gemm"] / 1e6 / best) for row in rows]
    return _spread("products alone / cuBLAS int8 8192^3", shares)


def _totals(linear: list[Row], small: list[Row], conv: list[Row]) -> list[str]:
    models = dict.fromkeys(model for row in (*linear, *small, *conv) for model in row["counts"])
    out = []
    for model in models:
        parts = []
        for title, rows, names in (("linear", linear, ("w4a8", "fp16", "fp8")), ("conv", conv, ("w4a8", "fp16"))):
            mine = [row for row in rows if model in row["counts"]]
            if mine:
                times = {name: sum(row["counts"][model] * row["us"][name] for row in mine) / 1e3 for name in names}
                parts.append(f"{title} " + ", ".join(f"{name} {ms:.2f}" for name, ms in times.items()))
        if mine := [row for row in small if model in row["counts"]]:
            times = {
                name: sum(row["counts"][model] * row["us"][name] for row in mine) / 1e3 for name in ("w4a16", "fp16")
            }
            parts.append("few rows " + ", ".join(f"{name} {ms:.2f}" for name, ms in times.items()))
        out.append(f"one pass of {model}, ms: {'; '.join(parts)}")
    return out
