"""PSNR, SSIM and MS-SSIM of each picture against its own reference, by torchmetrics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qdiff.evaluation.metrics.contract import check_batch
from qdiff.evaluation.metrics.finite import finite_rows, left_out
from qdiff.evaluation.metrics.packages import optional, package
from qdiff.evaluation.metrics.per_picture import INTERVAL, PerPicture
from qdiff.evaluation.metrics.registry import register
from qdiff.evaluation.paired import SSIM_WINDOW, structural_similarity
from qdiff.evaluation.report import Record

if TYPE_CHECKING:
    from jaxtyping import Float32, Float64, UInt8

    from qdiff.evaluation.metrics.statistics import Statistics
    from qdiff.evaluation.weights import Weights

WINDOW = "Gaussian, 11 pixels, sigma 1.5"


@dataclass(frozen=True)
class _Pixels(PerPicture):
    device: torch.device

    needs_reference = True
    higher_is_better = True
    settings: ClassVar[dict[str, str]] = {}

    @property
    def feature_key(self) -> str:
        return self.name

    def provenance(self) -> dict[str, str]:
        return {"package": package("torchmetrics"), **self.settings}

    @torch.no_grad()
    def rows(
        self,
        candidate: UInt8[Tensor, "B 3 height width"],
        reference: UInt8[Tensor, "B 3 height width"] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Float32[Tensor, "B 1"]:
        check_batch(self, candidate, reference, prompts)
        # float64: a GPU's float32 convolutions may round to TF32, which SSIM's differences of squares do not survive.
        device = "cpu" if self.device.type == "mps" else self.device  # that one has no float64
        preds, target = (
            pictures.to(device).double() / 255 for pictures in (candidate, reference) if pictures is not None
        )
        functional = optional("torchmetrics.functional.image", self.name)
        return self._measure(functional, preds, target).reshape(-1, 1).float().cpu()

    @abstractmethod
    def _measure(self, functional: Any, preds: Tensor, target: Tensor) -> Float64[Tensor, "B"]:
        """The figure of each picture, from pictures in [0, 1]."""


@dataclass(frozen=True)
class Psnr(_Pixels):
    """Peak signal-to-noise ratio of 8-bit pictures in decibels.

    Identical pictures have none that is finite: they are left out of the mean and counted in "psnr_db_identical"; where
    all are identical the mean is infinite.
    """

    settings: ClassVar[dict[str, str]] = {"peak": "255", "identical": "not in the mean"}

    @property
    def name(self) -> str:
        return "psnr"

    @property
    def record_name(self) -> str:
        return "psnr_db"

    def _measure(self, functional: Any, preds: Tensor, target: Tensor) -> Float64[Tensor, "B"]:
        return functional.peak_signal_noise_ratio(preds, target, data_range=1.0, reduction="none", dim=(1, 2, 3))

    def reduce(
        self,
        candidate: Float32[np.ndarray, "n 1"],
        reference: Float32[np.ndarray, "m 1"] | Statistics | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> list[Record]:
        tags = tags or {}
        kept, identical = finite_rows(candidate), np.isposinf(candidate[:, 0])
        if not identical.any():
            return super().reduce(candidate, reference, tags)
        count = float(identical.sum())
        samples = candidate[kept, 0] if kept.any() else candidate[identical, 0]
        mean = Record.mean(self.record_name, samples, **tags).sourced({**self.provenance(), "interval": INTERVAL})
        same = Record(f"{self.record_name}_identical", count, count, count, len(candidate), tags)
        return [mean, same, *left_out(self.record_name, kept | identical, "candidate", tags)]


@dataclass(frozen=True)
class Ssim(_Pixels):
    """Structural similarity (Wang et al. 2004), mean over the three channels and over windows within the picture."""

    minimum_side = SSIM_WINDOW
    settings: ClassVar[dict[str, str]] = {"window": WINDOW, "channels": "mean of R, G, B", "border": "left out"}

    @property
    def name(self) -> str:
        return "ssim"

    def _measure(self, functional: Any, preds: Tensor, target: Tensor) -> Float64[Tensor, "B"]:
        return structural_similarity(functional, preds, target)


@dataclass(frozen=True)
class MsSsim(_Pixels):
    """Structural similarity at five scales (Wang et al. 2003), for pictures of 176 pixels a side or more."""

    # torchmetrics asks for a window of 11 pixels after four halvings.
    minimum_side = 176
    settings: ClassVar[dict[str, str]] = {"window": WINDOW, "scales": "5", "negative similarities": "set to 0"}

    @property
    def name(self) -> str:
        return "ms_ssim"

    def _measure(self, functional: Any, preds: Tensor, target: Tensor) -> Float64[Tensor, "B"]:
        settings = {"data_range": 1.0, "reduction": "none", "normalize": "relu"}
        return functional.multiscale_structural_similarity_index_measure(preds, target, **settings)


def _register(name: str, build: Callable[[torch.device], _Pixels]) -> None:
    @register(name)
    def builder(weights: Weights, device: torch.device) -> _Pixels:
        optional("torchmetrics", name)
        return build(device)


_register("psnr", Psnr)
_register("ssim", Ssim)
_register("ms_ssim", MsSsim)
