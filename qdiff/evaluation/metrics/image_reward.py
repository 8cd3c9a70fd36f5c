"""ImageReward: how people would rate a picture of a text, by its authors' package where that is installed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from qdiff.evaluation.metrics.packages import optional, package
from qdiff.evaluation.metrics.registry import register
from qdiff.evaluation.metrics.text_alignment import TextAlignment
from qdiff.evaluation.weights import Repository, Weights

if TYPE_CHECKING:
    from jaxtyping import UInt8

MODEL = Repository("THUDM/ImageReward", ("med_config.json",), 1790, weights=("ImageReward.pt",))


@dataclass(frozen=True)
class ImageReward(TextAlignment):
    """Reward of a picture for its text (Xu et al. 2023), about standard normal over the training set."""

    @property
    def name(self) -> str:
        return "image-reward"

    @property
    def backbone(self) -> str:
        return f"{MODEL.id} v1.0 (BLIP)"

    def provenance(self) -> dict[str, str]:
        return {"package": package("image-reward"), **super().provenance()}

    def scores(self, pictures: UInt8[Tensor, "B 3 height width"], prompts: list[str]) -> Tensor:
        images = [Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()) for picture in pictures]
        return torch.tensor([self._model.score(text, image) for image, text in zip(images, prompts, strict=True)])

    @cached_property
    def _model(self) -> Any:
        weights, config = (str(self.weights.path / file) for file in (*MODEL.weights, *MODEL.files))
        return optional("ImageReward", self.name, "image-reward").load(weights, str(self.device), med_config=config)


@register("image-reward")
def _published(weights: Weights, device: torch.device) -> ImageReward:
    optional("ImageReward", "image-reward", "image-reward")
    return ImageReward(weights.repository(MODEL, "image-reward"), device)
