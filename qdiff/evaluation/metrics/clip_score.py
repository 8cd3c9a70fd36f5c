"""CLIP score: the cosine of a picture's and its text's embedding, by torchmetrics."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qdiff.evaluation.metrics.packages import optional, package
from qdiff.evaluation.metrics.registry import register
from qdiff.evaluation.metrics.text_alignment import TextAlignment
from qdiff.evaluation.weights import Repository, Weights

if TYPE_CHECKING:
    from jaxtyping import UInt8

FILES = ("config.json", "preprocessor_config.json", "tokenizer.json")
# The first is the default of torchmetrics, and the one meant by "CLIP score" without a backbone.
MODELS = {
    "": Repository("openai/clip-vit-large-patch14", FILES, 1711),
    "vit-b-16": Repository("openai/clip-vit-base-patch16", FILES, 599),
    "vit-b-32": Repository("openai/clip-vit-base-patch32", FILES, 605),
}


@dataclass(frozen=True)
class ClipScore(TextAlignment):
    """100 times the cosine, 0 at least (Hessel et al. 2021). variant: "" (ViT-L/14) or another key of `MODELS`."""

    variant: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, ("clip-score", self.variant)))

    @property
    def backbone(self) -> str:
        return MODELS[self.variant].id

    def provenance(self) -> dict[str, str]:
        return {"package": package("torchmetrics"), **super().provenance()}

    def load(self) -> None:
        _ = self._model

    def scores(self, pictures: UInt8[Tensor, "B 3 height width"], prompts: list[str]) -> Tensor:
        # One picture a call: torchmetrics gives the mean of a call and nothing else.
        score = optional("torchmetrics.functional.multimodal.clip_score", self.name).clip_score
        loaded = lambda: self._model  # noqa: E731  # torchmetrics asks for a callable
        pictures = pictures.to(self.device)
        return torch.stack([score(picture, text, loaded) for picture, text in zip(pictures, prompts, strict=True)])

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPProcessor

        model = CLIPModel.from_pretrained(self.weights.path).eval().requires_grad_(False)
        return _Embedding(model.to(self.device)), CLIPProcessor.from_pretrained(self.weights.path)


class _Embedding:
    """A CLIP whose embeddings are tensors, as torchmetrics expects: since transformers 5 they come in an output."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, device: torch.device) -> _Embedding:
        self.model.to(device)
        return self

    def get_image_features(self, *args: Tensor) -> Tensor:
        return _tensor(self.model.get_image_features(*args))

    def get_text_features(self, *args: Tensor) -> Tensor:
        return _tensor(self.model.get_text_features(*args))


def _tensor(embedding: Any) -> Tensor:
    return embedding if isinstance(embedding, Tensor) else embedding.pooler_output


def _register(variant: str) -> None:
    name = "-".join(filter(None, ("clip-score", variant)))

    @register(name)
    def builder(weights: Weights, device: torch.device) -> ClipScore:
        optional("torchmetrics", name)
        return ClipScore(weights.repository(MODELS[variant], name), device, variant)


for _variant in MODELS:
    _register(_variant)
