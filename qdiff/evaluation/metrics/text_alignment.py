"""Metrics of how well a picture shows its text: the part that they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qdiff.evaluation.metrics.contract import check_batch
from qdiff.evaluation.metrics.loading import loading
from qdiff.evaluation.metrics.per_picture import PerPicture
from qdiff.evaluation.weights import Found

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt8


@dataclass(frozen=True)
class TextAlignment(PerPicture):
    """A network scores each picture with its prompt. weights: the folder of a model, with the hash of its weights."""

    weights: Found
    device: torch.device

    needs_prompts = True
    higher_is_better = True

    @property
    @abstractmethod
    def backbone(self) -> str:
        """The model, by its name on the hub."""

    @property
    def feature_key(self) -> str:
        return f"{self.name}-{self.weights.sha256[:12]}"

    def provenance(self) -> dict[str, str]:
        return {"backbone": self.backbone, "weights_sha256": self.weights.sha256, "resize": "the model's own processor"}

    def prepare(self) -> None:
        with loading(self.weights, self.name):
            self.load()

    @torch.no_grad()
    def rows(
        self,
        candidate: UInt8[Tensor, "B 3 height width"],
        reference: UInt8[Tensor, "B 3 height width"] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Float32[Tensor, "B 1"]:
        check_batch(self, candidate, reference, prompts)
        return self.scores(candidate, list(prompts or ())).reshape(-1, 1).float().cpu()

    @abstractmethod
    def load(self) -> None:
        """Read the weights, unless they are read already."""

    @abstractmethod
    def scores(self, pictures: UInt8[Tensor, "B 3 height width"], prompts: list[str]) -> Tensor:
        """Return the score of each picture with its prompt."""
