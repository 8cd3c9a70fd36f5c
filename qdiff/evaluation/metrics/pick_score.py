"""PickScore: what people would choose among pictures of one text, learned from their choices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qdiff.evaluation.metrics.packages import package
from qdiff.evaluation.metrics.registry import register
from qdiff.evaluation.metrics.text_alignment import TextAlignment
from qdiff.evaluation.weights import Found, Repository, Weights

if TYPE_CHECKING:
    from jaxtyping import UInt8

MODEL = Repository("yuvalkirstain/PickScore_v1", ("config.json",), 3944)
# The model is a CLIP ViT-H/14 that was trained further: pictures and texts are prepared as that one's.
PROCESSOR = Repository(
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ("preprocessor_config.json", "tokenizer.json"),
    4,
    weights=(),
)


@dataclass(frozen=True)
class PickScore(TextAlignment):
    """Scaled cosine of picture and text (Kirstain et al. 2023), as its model card computes it. processor: a folder."""

    processor: Found | None = None

    @property
    def name(self) -> str:
        return "pick-score"

    @property
    def backbone(self) -> str:
        return f"{MODEL.id} (CLIP ViT-H/14)"

    def provenance(self) -> dict[str, str]:
        return {"package": package("transformers"), **super().provenance()}

    def load(self) -> None:
        _ = self._model

    def scores(self, pictures: UInt8[Tensor, "B 3 height width"], prompts: list[str]) -> Tensor:
        model, processor = self._model
        settings = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
        inputs = processor(text=prompts, images=list(pictures.cpu()), **settings).to(self.device)
        return model(**inputs).logits_per_image.diagonal()

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(self.weights.path).eval().requires_grad_(False)
        place = self.processor or self.weights
        return model.to(self.device), CLIPProcessor.from_pretrained(place.path)


@register("pick-score")
def _published(weights: Weights, device: torch.device) -> PickScore:
    model = weights.repository(MODEL, "pick-score")
    return PickScore(model, device, weights.repository(PROCESSOR, "pick-score"))
