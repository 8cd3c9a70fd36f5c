"""4-bit weights and 8-bit activations for diffusers pipelines.

    pipe = qdiff.quantize_pipeline(pipe)  # the same object, a quarter of the size
    print(qdiff.summary(pipe))            # what was done to each layer, and what it saved
    qdiff.save(pipe, "small")             # and later: pipe = qdiff.load("small")

The names below are the whole public interface. They are imported on first use, so that `import qdiff` stays quick
and `qdiff --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qdiff.calibration import Calibration
    from qdiff.plugin.calibrate import calibrate
    from qdiff.plugin.checkpoint import load, save
    from qdiff.plugin.pipeline import quantize_pipeline
    from qdiff.plugin.summary import summary
    from qdiff.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Calibration", "Recipe", "__version__", "calibrate", "load", "quantize_pipeline", "save", "summary"]

_HOME = {
    "Calibration": "qdiff.calibration",
    "Recipe": "qdiff.recipe",
    "calibrate": "qdiff.plugin.calibrate",
    "load": "qdiff.plugin.checkpoint",
    "quantize_pipeline": "qdiff.plugin.pipeline",
    "save": "qdiff.plugin.checkpoint",
    "summary": "qdiff.plugin.summary",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'qdiff' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
