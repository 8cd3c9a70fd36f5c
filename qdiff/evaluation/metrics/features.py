"""Networks that turn a picture into a row of numbers, for metrics that compare sets of pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qdiff.evaluation.weights import Found

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt8


@dataclass(frozen=True)
class Features(ABC):
    """A feature extractor with its weights, which are loaded when the first picture comes.

    weights: on disk.  device: where it computes.
    """

    weights: Found
    device: torch.device

    @property
    @abstractmethod
    def name(self) -> str:
        """The part that it has in a metric's name: "efficientnet-lite0"."""

    @property
    @abstractmethod
    def width(self) -> int:
        """How many numbers a picture has."""

    @property
    @abstractmethod
    def resize(self) -> str:
        """How pictures are brought to the network's size, in words."""

    @property
    def key(self) -> str:
        """Differs where the features of a picture differ: by network, weights or resizing."""
        return f"{self.name}-{self.weights.sha256[:12]}"

    def metric_name(self, general: str, standard: str) -> str:
        """The name of a metric over these features: `standard` is for the published Inception only."""
        return f"{general}-{self.name}"

    @abstractmethod
    def provenance(self) -> dict[str, str]:
        """Package, backbone, hash of the weights, resize mode."""

    @abstractmethod
    def load(self) -> None:
        """Read the weights, unless they are read already."""

    @abstractmethod
    def extract(self, pictures: UInt8[Tensor, "B 3 height width"]) -> Float32[Tensor, "B width"]:
        """Return the features of each picture, on the CPU."""
