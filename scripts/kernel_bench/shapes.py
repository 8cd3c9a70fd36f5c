"""The file that `scripts/kernel_shapes.py` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).parents[2] / "assets" / "benchmarks" / "kernel_shapes.json"


def read_shapes() -> dict[str, Any]:
    return json.loads(SHAPES.read_text())
