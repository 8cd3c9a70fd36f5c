"""Where pictures come from: a pipeline, in memory or on disk, or a folder of pictures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qdiff.evaluation import fingerprint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class PipelineSource:
    """A diffusers pipeline. given: a loaded one, or the folder that `save_pretrained` or `qdiff.save` wrote."""

    name: str
    given: DiffusionPipeline | Path
    dtype: str = "auto"

    @property
    def folder(self) -> Path | None:
        return self.given if isinstance(self.given, Path) else None

    @cached_property
    def id(self) -> str:
        """Changes with every weight and setting of the pipeline."""
        if isinstance(self.given, Path):
            return fingerprint.of_directory(self.given)
        return fingerprint.of_modules(self.given.components)

    def load(self, device: torch.device) -> Any:
        """Return the pipeline on `device`; a loaded one is returned as it is, where it is.

        A folder's pipeline computes in `dtype`; "auto" is float32 on a CPU, and elsewhere what the denoiser is stored
        in.

        Raises:
            ValueError, OSError: what is in the folder cannot be loaded.
        """
        if not isinstance(self.given, Path):
            return self.given
        with _quiet():
            pipe = _load(self.given)
            dtype = self._dtype(pipe, device)
            pipe = pipe.to(device) if dtype is None else pipe.to(device, dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _dtype(self, pipe: Any, device: torch.device) -> torch.dtype | None:
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        if device.type == "cpu":
            return torch.float32
        if is_checkpoint(self.given):  # it was loaded in the dtypes that it was saved in
            return None
        return _stored_dtype(Path(str(self.given)) / denoiser_name(pipe))


@dataclass(frozen=True)
class FolderSource:
    """A folder of pictures, each known by its file's name without the suffix."""

    name: str
    folder: Path
    pictures: dict[str, Path]

    @property
    def id(self) -> str:
        return fingerprint.short_hash(str(self.folder.resolve()))


Source = PipelineSource | FolderSource
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def source_of(name: str, given: Any, dtype: str = "auto") -> Source:
    """Return what `given` stands for: a loaded pipeline, a pipeline's folder, or a folder of pictures.

    Raises:
        ValueError: none of these, a folder with files that are no pictures (the first is named), or an unknown dtype.
        FileNotFoundError: there is no such folder.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}: got {dtype!r}")
    if not isinstance(given, str | os.PathLike):
        if not hasattr(given, "components") or not callable(given):
            raise ValueError(
                f"{name} must be a diffusers pipeline, a pipeline's folder or a folder of pictures: got "
                f"{type(given).__name__}"
            )
        return PipelineSource(name, given, dtype)
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: no folder {folder}; expected a pipeline's folder or one of pictures")
    if (folder / "model_index.json").is_file():
        return PipelineSource(name, folder, dtype)
    return FolderSource(name, folder, _pictures(name, folder))


def denoiser_of(pipe: Any) -> nn.Module:
    """Return the component of a pipeline that runs at every step."""
    from qdiff.plugin.structure import find_denoiser

    return find_denoiser(pipe)[1]


def denoiser_name(pipe: Any) -> str:
    """Return the name of that component, which is its folder's."""
    from qdiff.plugin.structure import find_denoiser

    return find_denoiser(pipe)[0]


def is_checkpoint(folder: Any) -> bool:
    """Whether `qdiff.save` wrote the folder."""
    return isinstance(folder, Path) and (folder / "qdiff.json").is_file()


def _load(folder: Path) -> Any:
    if is_checkpoint(folder):
        from qdiff.plugin.checkpoint import load

        return load(folder)
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own bars and notes while they load; as they were afterwards."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    levels = [(library, library.get_verbosity()) for library in (of_diffusers, of_transformers)]
    active = [library for library, _ in levels if library.is_progress_bar_enabled()]
    try:
        for library, _ in levels:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)
        for library in active:
            library.enable_progress_bar()


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """Of the first floating-point tensor of a model's safetensors; None where there is none."""
    from safetensors import safe_open

    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                if dtype := known.get(file.get_slice(key).get_dtype()):
                    return dtype
    return None


def _pictures(name: str, folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.stem):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            raise ValueError(
                f"{name}: {folder} must hold pictures ({', '.join(SUFFIXES)}) and nothing else, or a pipeline's "
                f"model_index.json: got {path.name}"
            )
        if path.stem in found:
            raise ValueError(f"{name}: {folder} has two pictures called {path.stem}: pictures are paired by name")
        found[path.stem] = path
    if not found:
        raise ValueError(f"{name}: {folder} is empty; expected pictures or a pipeline")
    return found
