"""ImageReward: how people would rate a picture of a text, by its authors' package where that is installed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from qdiff.evaluation.metrics.packages import optional, package
from qdiff.evaluation.metrics.registry import register
from qdiff.evaluation.metrics.text_alignment import TextAlignment
from qdiff.evaluation.weights import MissingWeightsError, Repository, Weights

if TYPE_CHECKING:
    from jaxtyping import UInt8

MODEL = Repository(
    "THUDM/ImageReward",
    ("med_config.json",),
    1790,
    weights=("ImageReward.pt",),
    cache=Path("~/.cache/ImageReward").expanduser(),
)
# The package reads it from the hub's cache and from nowhere else, and otherwise downloads it without a word.
TOKENIZER = Repository("bert-base-uncased", ("vocab.txt",), 1, weights=())


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

    def load(self) -> None:
        _ = self._model

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
    model = weights.repository(MODEL, "image-reward")
    try:
        Weights(None, weights.offline).repository(TOKENIZER, "image-reward")
    except MissingWeightsError as error:
        raise MissingWeightsError(
            f"image-reward's package reads the tokenizer {TOKENIZER.id} from the Hugging Face cache, where it is not: "
            f"`hf download {TOKENIZER.id}` on a machine with a network, and copy the cache"
        ) from error
    return ImageReward(model, device)
