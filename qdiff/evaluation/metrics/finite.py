"""Rows that are no numbers: found, counted, and left out aloud."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from qdiff.evaluation.report import Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float32

# Rows looked at a time: 32 MiB of float32 rows of 2,048 numbers.
ROWS_AT_ONCE = 4096
NAMED_AT_MOST = 5


def finite_rows(rows: Float32[np.ndarray, "n d"]) -> Bool[np.ndarray, "n"]:
    """Return which rows consist of finite numbers only."""
    if rows.ndim != 2:
        raise ValueError(f"rows must be [pictures, features]: got shape {rows.shape}")
    parts = [np.isfinite(rows[at : at + ROWS_AT_ONCE]).all(axis=1) for at in range(0, len(rows), ROWS_AT_ONCE)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def left_out(name: str, kept: Bool[np.ndarray, "n"], whose: str, tags: Mapping[str, str]) -> list[Record]:
    """Warn of the pictures that are not kept, and return a record that counts them; nothing where all are.

    whose: "candidate" or "reference", as the text says it.
    """
    places = np.flatnonzero(~kept)
    if not len(places):
        return []
    named = ", ".join(map(str, places[:NAMED_AT_MOST])) + (", ..." if len(places) > NAMED_AT_MOST else "")
    warnings.warn(
        f"{name}: {len(places)} of {len(kept)} {whose} pictures have no finite figure and are left out (rows {named})",
        stacklevel=3,
    )
    suffix = "left_out" if whose == "candidate" else f"{whose}_left_out"
    return [Record(f"{name}_{suffix}", float(len(places)), float(len(places)), float(len(places)), len(kept), tags)]
