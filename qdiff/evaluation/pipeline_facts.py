"""What is known of a pipeline before it is loaded: what it can be asked for, and how large its pictures are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdiff.evaluation.sources import PipelineSource

DENOISERS = ("transformer", "unet")


@dataclass(frozen=True)
class PipelineFacts:
    """None stands for what the pipeline's configuration does not say.

    kind: its class.  side: pixels of its pictures unless it is told otherwise.  classes: how many class labels it has.
    """

    kind: type | None
    side: int | None
    classes: int | None


def facts_of(source: PipelineSource) -> PipelineFacts:
    """Return what the configurations say; of a folder, no weights are read.

    Raises:
        ValueError: a configuration in the folder is no JSON object.
    """
    if source.folder is None:
        pipe: Any = source.given
        return _facts(type(pipe), lambda name: _config(pipe.components.get(name)))
    folder = source.folder
    return _facts(_named_class(folder), lambda name: _read(folder / name / "config.json"))


def _facts(kind: type | None, config: Callable[[str], Mapping[str, Any]]) -> PipelineFacts:
    denoiser = next(filter(None, map(config, DENOISERS)), {})
    latent, blocks = denoiser.get("sample_size"), config("vae").get("block_out_channels")
    # As diffusers' pipelines have it: latents are halved once between any two of the VAE's blocks.
    side = latent * 2 ** (len(blocks) - 1) if isinstance(latent, int) and blocks else None
    return PipelineFacts(kind, side, denoiser.get("num_embeds_ada_norm"))


def _config(component: Any) -> Mapping[str, Any]:
    config = getattr(component, "config", None)
    return config if isinstance(config, Mapping) else {}


def _named_class(folder: Path) -> type | None:
    import diffusers

    name = _read(folder / "model_index.json").get("_class_name")
    return getattr(diffusers, name, None) if isinstance(name, str) else None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON that can be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object: got {type(found).__name__}")
    return found
