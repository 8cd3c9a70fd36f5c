"""What a metric is: rows of numbers, one a picture, and what all of them together amount to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float32, UInt8

    from qdiff.evaluation.metrics.statistics import Statistics
    from qdiff.evaluation.report import Record


class Metric(ABC):
    """A figure of picture quality, computed in two stages, so that pictures may be seen in any order and anywhere.

    `rows` turns each picture into d numbers; `reduce` turns all rows into records. It should be the case that a
    picture's row does not depend on the other pictures of its batch (up to rounding), and that rows of metrics with the
    same `feature_key` are the same: they are computed once and shared.
    """

    # rows() needs the reference picture of the same prompt and seed.
    needs_reference: ClassVar[bool] = False
    # rows() needs the text that each picture was asked for.
    needs_prompts: ClassVar[bool] = False
    # reduce() compares two sets of pictures: it needs the reference's own rows, or statistics of them.
    compares_sets: ClassVar[bool] = False
    # The figure means the same for a few pictures as for many: only then is it told apart by group.
    splits_by_group: ClassVar[bool] = False
    higher_is_better: ClassVar[bool]
    # Pictures must have as many pixels a side.
    minimum_side: ClassVar[int] = 1
    # reduce() needs as many pictures of each source.
    minimum_pictures: ClassVar[int] = 1

    @property
    @abstractmethod
    def name(self) -> str:
        """What the metric is asked for by: "ms-ssim"."""

    @property
    def record_name(self) -> str:
        """The name of its (first) record: "ms_ssim"."""
        return self.name.replace("-", "_")

    @property
    @abstractmethod
    def feature_key(self) -> str:
        """Names what the rows are, with the weights they were made with: rows are kept on disk under it."""

    @abstractmethod
    def provenance(self) -> dict[str, str]:
        """What a figure depends on beside the pictures: package, backbone, hash of the weights, resize mode."""

    def prepare(self) -> None:  # noqa: B027  # most need nothing
        """Load what `rows` computes with, so that what is wrong with it is known before anything is drawn.

        Raises:
            ValueError: weights that cannot be loaded.
            ImportError: a package that they need is not installed.
        """

    @abstractmethod
    def rows(
        self,
        candidate: UInt8[Tensor, "B 3 height width"],
        reference: UInt8[Tensor, "B 3 height width"] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Float32[Tensor, "B d"]:
        """Return one row a picture, on the CPU.

        Raises:
            ValueError: the pictures are no such batch, are too small, or what the metric needs is not given.
        """

    @abstractmethod
    def reduce(
        self,
        candidate: Float32[np.ndarray, "n d"],
        reference: Float32[np.ndarray, "m d"] | Statistics | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> list[Record]:
        """Return the metric's records over all rows, which may be memory maps: memory stays bounded.

        reference: where `compares_sets`. Row i of both is of the same prompt and seed where they are as many.
        A picture whose row is not finite is left out, with a warning and a record "<name>_left_out" that counts it.

        Raises:
            ValueError: there are too few rows, or reference rows of other features.
        """


def check_batch(metric: Metric, candidate: Tensor, reference: Tensor | None, prompts: Sequence[str] | None) -> None:
    """Raise `ValueError` where a batch is not what the metric's `rows` takes."""
    _check_pictures(metric, "candidate", candidate)
    if metric.needs_reference:
        if reference is None:
            raise ValueError(f"{metric.name} compares each picture with its own reference: reference must be given")
        _check_pictures(metric, "reference", reference)
        if reference.shape != candidate.shape:
            raise ValueError(
                f"reference must have the shape of candidate, {tuple(candidate.shape)}: got {tuple(reference.shape)}; "
                f"generate both with the same prompts and size"
            )
    if metric.needs_prompts and (prompts is None or len(prompts) != len(candidate)):
        got = "none" if prompts is None else str(len(prompts))
        raise ValueError(f"{metric.name} needs a text for each picture: got {got} for {len(candidate)} pictures")


def _check_pictures(metric: Metric, name: str, pictures: Tensor) -> None:
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.dtype != torch.uint8:
        raise ValueError(
            f"{name} must be uint8 [pictures, 3, height, width]: got {pictures.dtype} {tuple(pictures.shape)}"
        )
    if min(pictures.shape[2:]) < metric.minimum_side:
        raise ValueError(
            f"{metric.name} needs pictures of {metric.minimum_side} pixels a side or more: got "
            f"{pictures.shape[3]} x {pictures.shape[2]}; leave it out, or generate larger pictures"
        )
