"""Features of DINOv2, whose distances follow people's judgement better than Inception's (Stein et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qdiff.evaluation.metrics.features import Features
from qdiff.evaluation.metrics.packages import optional, package
from qdiff.evaluation.metrics.precision_recall import PrecisionRecall
from qdiff.evaluation.metrics.registry import register
from qdiff.evaluation.weights import Repository, Weights

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt8

MODEL = Repository("facebook/dinov2-large", ("config.json",), 1218)
SIDE = 224
# Of ImageNet, in units of 8-bit pictures, as DINOv2 was trained with.
MEAN = np.array([123.675, 116.28, 103.53], dtype=np.float32)
DEVIATION = np.array([58.395, 57.12, 57.375], dtype=np.float32)


@dataclass(frozen=True)
class DinoV2(Features):
    """The normalized class token of ViT-L/14, on pictures resized as clean-fid does."""

    @property
    def name(self) -> str:
        return "dinov2"

    @property
    def width(self) -> int:
        return int(self._network.config.hidden_size)

    @property
    def resize(self) -> str:
        return f"PIL bicubic, antialiased, not rounded, to {SIDE} pixels"

    def provenance(self) -> dict[str, str]:
        return {
            "package": f"{package('transformers')}, {package('clean-fid')}",
            "backbone": MODEL.id,
            "weights_sha256": self.weights.sha256,
            "resize": self.resize,
        }

    def load(self) -> None:
        _ = self._network

    @torch.no_grad()
    def extract(self, pictures: UInt8[Tensor, "B 3 height width"]) -> Float32[Tensor, "B width"]:
        resize = optional("cleanfid.resize", self.name).make_resizer("PIL", False, "bicubic", (SIDE, SIDE))
        resized = np.stack([resize(picture.permute(1, 2, 0).cpu().numpy()) for picture in pictures])
        normalized = torch.from_numpy((resized - MEAN) / DEVIATION).permute(0, 3, 1, 2)
        return self._network(normalized.to(self.device)).pooler_output.float().cpu()

    @cached_property
    def _network(self) -> Any:
        from transformers import Dinov2Model

        return Dinov2Model.from_pretrained(self.weights.path).eval().requires_grad_(False).to(self.device)


def dinov2(weights: Weights, device: torch.device, used_by: str) -> DinoV2:
    """Return the extractor with the published weights; raises as `Weights.repository` does."""
    optional("cleanfid", used_by)
    return DinoV2(weights.repository(MODEL, used_by), device)


@register("precision-recall-dinov2")
def _precision_recall(weights: Weights, device: torch.device) -> PrecisionRecall:
    return PrecisionRecall(dinov2(weights, device, "precision-recall-dinov2"))
