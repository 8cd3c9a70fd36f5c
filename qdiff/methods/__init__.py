"""Quantization methods: one method, one file, one dataclass, one registry key. A new method is one new file here."""

import importlib
import pkgutil

from qdiff.methods.contract import ActivationRange, Method, RoundedWeight, Rounding, Transform, Tuner
from qdiff.methods.quantize import Draft, draft_layer, quantize_layer
from qdiff.methods.registry import REGISTRY, needs_of, range_mode, register, resolve
from qdiff.methods.state import LayerState, LowRankBranch

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = [
    "REGISTRY",
    "ActivationRange",
    "Draft",
    "LayerState",
    "LowRankBranch",
    "Method",
    "RoundedWeight",
    "Rounding",
    "Transform",
    "Tuner",
    "draft_layer",
    "needs_of",
    "quantize_layer",
    "range_mode",
    "register",
    "resolve",
]
