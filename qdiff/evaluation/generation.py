"""Draws items with a pipeline: the same noise for an item in every batch, on every device."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qdiff.evaluation.fingerprint import short_hash
from qdiff.evaluation.prompts import Item

if TYPE_CHECKING:
    from jaxtyping import Bool, UInt8
    from torch import Tensor

MEASURED = ("batch_size",)  # what may change a picture's last bit, but not what it is a picture of


@dataclass(frozen=True)
class Generation:
    """How pictures are drawn. guidance_scale, height, width: None is the pipeline's own default."""

    steps: int = 20
    guidance_scale: float | None = None
    batch_size: int = 8
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more: got {getattr(self, name)}")

    def key(self, item: Item, source_id: str, where: Sequence[str]) -> str:
        """Return the picture's name: a hash of the source, the item and these settings. where: device and dtype."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name not in MEASURED}
        return short_hash([source_id, item.prompt, item.seed, item.negative_prompt or "", settings, list(where)])


@dataclass(frozen=True)
class Drawn:
    """A batch of pictures on the CPU. finite: False for a picture that had NaN or infinite values (shown as 0)."""

    pictures: UInt8[Tensor, "batch 3 height width"]
    finite: Bool[Tensor, "batch"]


@torch.no_grad()
def draw(pipe: Any, items: Sequence[Item], generation: Generation) -> Drawn:
    """Run `pipe` once on all of `items`, each from the noise that a CPU generator of its own seed draws.

    It should be the case that an item's noise depends neither on the other items nor on the device.

    Raises:
        ValueError: the items do not fit the pipeline (text for one that takes class labels, a negative prompt for one
            that takes none), or its output is no batch of colour pictures.
    """
    generators = [torch.Generator("cpu").manual_seed(item.seed) for item in items]
    result = pipe(**call_arguments(type(pipe), items, generation), generator=generators, output_type="pt")
    images = getattr(result, "images", None)
    values = torch.from_numpy(images).permute(0, 3, 1, 2) if isinstance(images, np.ndarray) else images
    if not isinstance(values, torch.Tensor) or values.ndim != 4 or values.shape[:2] != (len(items), 3):
        shape = tuple(values.shape) if isinstance(values, torch.Tensor) else type(images).__name__
        raise ValueError(f"{type(pipe).__name__} must return {len(items)} colour pictures: got {shape}")
    finite = torch.isfinite(values).flatten(1).all(1)
    # Rounded on the device: a quarter of the bytes to copy.
    pixels = (values.float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return Drawn(pixels.cpu(), finite.cpu())


def call_arguments(kind: type, items: Sequence[Item], generation: Generation) -> dict[str, Any]:
    """Return what a pipeline of this class is called with for these items, by the names in its signature.

    Raises:
        ValueError: the items do not fit the pipeline.
    """
    accepted = inspect.signature(kind.__call__).parameters
    subject = next((name for name in ("prompt", "class_labels") if name in accepted), None)
    if subject is None:
        raise ValueError(f"{kind.__name__} takes neither prompts nor class labels, so there is nothing to pair by")
    arguments: dict[str, Any] = {subject: _conditions(kind, items, subject), "num_inference_steps": generation.steps}
    if any(item.negative_prompt for item in items):
        if "negative_prompt" not in accepted:
            raise ValueError(f"{kind.__name__} takes no negative prompt; leave that column out")
        arguments["negative_prompt"] = [item.negative_prompt or "" for item in items]
    for name in ("guidance_scale", "height", "width"):
        value = getattr(generation, name)
        if value is not None:
            _check_accepted(kind, name, accepted)
            arguments[name] = value
    return arguments


def _check_accepted(kind: type, name: str, accepted: Mapping[str, Any]) -> None:
    if name not in accepted:
        raise ValueError(f"{name}: {kind.__name__} has no such argument; leave it out")


def _conditions(kind: type, items: Sequence[Item], subject: str) -> list[str] | list[int]:
    wanted: type = str if subject == "prompt" else int
    wrong = next((item for item in items if not isinstance(item.prompt, wanted)), None)
    if wrong is None:
        return [item.prompt for item in items]  # type: ignore[return-value]  # all are of the wanted type
    expected = "texts" if wanted is str else "class labels (whole numbers)"
    raise ValueError(f"{kind.__name__} takes {expected} for prompts: item {wrong.index} has {wrong.prompt!r}")
