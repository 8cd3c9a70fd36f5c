"""A quantized pipeline on disk: safetensors and JSON, written aside and renamed, checked before it is believed.

    checkpoint/
        qdiff.json               format version, recipe, plan of each layer, size and sha256 of every other file
        model_index.json         diffusers' own: the pipeline's class and components
        unet/config.json         diffusers' own: the configuration of the full-precision denoiser
        unet/qdiff.safetensors   every parameter and buffer of the quantized denoiser
        vae/ scheduler/ ...      the other components, by their own save_pretrained

Nothing in it is executed: no pickle is read, no code is imported from it, and it can only name classes of diffusers
and transformers.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qdiff import __version__
from qdiff.denoising import StepTracker
from qdiff.layers import LayerSizes
from qdiff.plugin.attention import check_probabilities, quantize_probabilities
from qdiff.plugin.directory import fingerprints, interrupted, verify, written_aside
from qdiff.plugin.fuse import fuse_blocks
from qdiff.plugin.pipeline import LAYER_CLASSES, QuantLayer
from qdiff.plugin.structure import DENOISER_NAMES, QuantizationRecord, find_denoiser, install, quantization_of
from qdiff.recipe import LayerPlan, Recipe

FORMAT_VERSION = 2  # 2: 4-bit weights in blocks of 32
MANIFEST = "qdiff.json"
TENSORS = "qdiff.safetensors"
# diffusers 0.42 knows both names and warns of the older.
_DTYPE_ARGUMENT = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_FIELDS = {
    "denoiser": str,
    "recipe": dict,
    "layers": dict,
    "kept": dict,
    "timesteps": list,
    "dtypes": dict,
    "files": dict,
}


def save(pipe: DiffusionPipeline, directory: str | os.PathLike[str]) -> None:
    """Writes a quantized pipeline, all of it, to a directory that `load` reads.

    It should be the case that `load(directory)` gives the same pictures, bit for bit. An older qdiff checkpoint in the
    directory is replaced as a whole; on any error, a full disk included, it stays as it was.

    Raises:
        ValueError: the pipeline is not quantized, was changed since (LoRA, offloading), has a component that cannot be
            saved, or the directory holds something else than a qdiff checkpoint.
        OSError: a file could not be written (with its errno, such as ENOSPC).
    """
    name, denoiser = find_denoiser(pipe)
    record = _record_to_save(denoiser)
    target = Path(directory).expanduser().resolve()
    _check_replaceable(target)
    parts = {key: part for key, part in pipe.components.items() if part is not None and part is not denoiser}
    for key, part in parts.items():
        if not hasattr(part, "save_pretrained"):
            raise ValueError(f"pipe.{key} must have save_pretrained to be saved: {type(part).__name__} has none")
    try:
        with written_aside(target) as aside:
            for key, part in parts.items():
                takes_safe = "safe_serialization" in inspect.signature(part.save_pretrained).parameters
                part.save_pretrained(str(aside / key), **({"safe_serialization": True} if takes_safe else {}))
            pipe.save_config(str(aside))
            denoiser.save_config(str(aside / name))  # type: ignore[operator]  # a ModelMixin
            save_file(_tensors(denoiser), aside / name / TENSORS)
            manifest = _manifest(pipe, name, denoiser, record) | {"files": fingerprints(aside)}
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or (errno.ENOSPC if "os error 28" in str(error) else errno.EIO)
        raise OSError(
            number, f"saving to {target} failed, and what was there is unchanged: {error}; free space or save elsewhere"
        ) from error


def _record_to_save(denoiser: nn.Module) -> QuantizationRecord:
    record = quantization_of(denoiser)
    if record is None:
        raise ValueError("the pipeline is not quantized: call quantize_pipeline first, or pipe.save_pretrained instead")
    if getattr(denoiser, "peft_config", None):
        raise ValueError("the denoiser carries LoRA adapters; call pipe.unload_lora_weights() before saving")
    for name, plan in record.plans.items():
        layer = denoiser.get_submodule(name)
        if not isinstance(layer, LAYER_CLASSES[plan.kind]):
            raise ValueError(
                f"layer {name!r} was replaced after quantizing (now {type(layer).__name__}); undo that first"
            )
    if any(tensor.is_meta for tensor in denoiser.state_dict().values()):
        raise ValueError("the weights are not in memory (meta device); call pipe.remove_all_hooks() before saving")
    return record


def _check_replaceable(target: Path) -> None:
    """Only an empty directory, or files that `save` wrote, may be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"directory must be a directory: {target} is a file; save elsewhere")
    present = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    try:
        ours = {MANIFEST, *json.loads((target / MANIFEST).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if foreign := sorted(present - ours):
        raise ValueError(
            f"directory must be new, empty or a qdiff checkpoint: {target} holds {', '.join(foreign[:3])}"
            f"{', ...' if len(foreign) > 3 else ''}, which saving would delete; move them or save elsewhere"
        )


def _tensors(denoiser: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, non-persistent buffers too: rebuilt ones could differ in dtype or value."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in {**denoiser.state_dict(), **dict(denoiser.named_buffers())}.items():
        tensor = tensor.detach().cpu().contiguous()
        shared = tensor.untyped_storage().data_ptr() in storages  # safetensors refuses tensors that share memory
        tensors[name] = tensor.clone() if shared else tensor
        storages.add(tensors[name].untyped_storage().data_ptr())
    return tensors


def _manifest(pipe: DiffusionPipeline, name: str, denoiser: nn.Module, record: QuantizationRecord) -> dict[str, Any]:
    dtypes = {key: str(getattr(part, "dtype", "")).removeprefix("torch.") for key, part in pipe.components.items()}
    return {
        "format_version": FORMAT_VERSION,
        "qdiff_version": __version__,
        "denoiser": name,
        "recipe": record.recipe.to_dict(),
        "layers": {key: _layer_entry(denoiser.get_submodule(key), plan) for key, plan in record.plans.items()},
        "kept": record.kept,
        "timesteps": list(record.tracker.timesteps),
        "dtypes": {key: dtype for key, dtype in dtypes.items() if dtype in _DTYPES},
    }


def _layer_entry(layer: nn.Module, plan: LayerPlan) -> dict[str, Any]:
    """The plan, and the sizes that it does not determine."""
    return {
        "plan": plan.to_dict(),
        "dtype": str(layer.compute_dtype).removeprefix("torch."),
        **dataclasses.asdict(LayerSizes.of_layer(layer)),
    }


def load(
    directory: str | os.PathLike[str],
    *,
    torch_dtype: torch.dtype | None = None,
    pipeline_class: type[DiffusionPipeline] | None = None,
) -> DiffusionPipeline:
    """Reads a pipeline that `save` wrote; runs nothing that the checkpoint contains.

    Args:
        directory: the checkpoint.
        torch_dtype: what to compute in; None takes the dtypes that were saved.
        pipeline_class: for a checkpoint of a pipeline class that diffusers does not have.

    Raises:
        ValueError: no checkpoint there, one that is incomplete, truncated or damaged (the file is named), written by a
            newer qdiff, or that holds code.
    """
    folder = Path(directory).expanduser().resolve()
    manifest = _read_manifest(folder)
    verify(folder, manifest["files"])
    index = _read_index(folder)
    pipeline_class = pipeline_class or _diffusers_class(folder, index.get("_class_name"), DiffusionPipeline)
    name = manifest["denoiser"]
    try:
        denoiser = _load_denoiser(folder, manifest, index[name][1])
        dtypes = {key: _DTYPES[dtype] for key, dtype in manifest["dtypes"].items()}
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}; save it again") from error
    pipe = pipeline_class.from_pretrained(
        str(folder), **{name: denoiser, _DTYPE_ARGUMENT: dtypes}, use_safetensors=True, local_files_only=True
    )
    return pipe if torch_dtype is None else pipe.to(torch_dtype)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        left = interrupted(folder)
        advice = f"an interrupted save left the old one at {left[-1]}" if left else "pass a directory that save wrote"
        raise ValueError(f"no qdiff checkpoint at {folder}: {MANIFEST} is missing; {advice}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {folder} is damaged: {MANIFEST} cannot be read ({error}); save it again"
        ) from error
    if version != FORMAT_VERSION:
        advice = "update qdiff" if isinstance(version, int) and version > FORMAT_VERSION else "quantize the model again"
        raise ValueError(
            f"checkpoint {folder} has format_version {version!r}; this qdiff {__version__} reads {FORMAT_VERSION}; "
            f"{advice}"
        )
    if bad := [field for field, kind in _FIELDS.items() if not isinstance(manifest.get(field), kind)]:
        raise ValueError(f"checkpoint {folder} is damaged: {MANIFEST} lacks {', '.join(bad)}; save it again")
    if manifest["denoiser"] not in DENOISER_NAMES:
        raise ValueError(f"checkpoint {folder} is damaged: unknown denoiser {manifest['denoiser']!r} in {MANIFEST}")
    return manifest


def _read_index(folder: Path) -> dict[str, Any]:
    """diffusers' model_index.json, refused where loading it could import anything but diffusers and transformers."""
    if code := next(folder.rglob("*.py"), None):
        raise ValueError(f"checkpoint {folder} holds code ({code.relative_to(folder)}), which is never run; remove it")
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None and not name.startswith("_"):
            library = entry[0]
            if library not in ("diffusers", "transformers") and not hasattr(diffusers.pipelines, str(library)):
                raise ValueError(
                    f"checkpoint {folder} takes {name} from {library!r}; only diffusers and transformers may"
                )
    return index


def _diffusers_class(folder: Path, name: object, base: type) -> Any:
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"checkpoint {folder} names {name!r}, which is no {base.__name__} of diffusers; pass pipeline_class"
        )
    return found


def _load_denoiser(folder: Path, manifest: dict[str, Any], class_name: str) -> nn.Module:
    model_class = _diffusers_class(folder, class_name, ModelMixin)
    part = folder / manifest["denoiser"]
    with init_empty_weights(include_buffers=False):
        denoiser = model_class.from_config(model_class.load_config(str(part)))
    plans = {name: LayerPlan.from_dict(entry["plan"]) for name, entry in manifest["layers"].items()}
    layers = {
        name: _empty_layer(denoiser.get_submodule(name), plan, manifest["layers"][name]) for name, plan in plans.items()
    }
    recipe, tracker = Recipe.from_dict(manifest["recipe"]), StepTracker(tuple(manifest["timesteps"]))
    install(denoiser, layers, QuantizationRecord(recipe, plans, dict(manifest["kept"]), tracker))
    check_probabilities(denoiser, recipe.probabilities)
    quantize_probabilities(denoiser, recipe.probabilities)
    _assign(denoiser, load_file(part / TENSORS))
    fuse_blocks(denoiser)
    return denoiser.eval()


def _empty_layer(meta: nn.Module, plan: LayerPlan, entry: dict[str, Any]) -> QuantLayer:
    sizes = LayerSizes(
        **{field.name: entry[field.name] for field in dataclasses.fields(LayerSizes) if field.name in entry}
    )
    layer = LAYER_CLASSES[plan.kind].empty(meta, plan, sizes)  # type: ignore[arg-type]  # kind says which
    layer.compute_dtype = _DTYPES[entry["dtype"]]
    return layer


def _assign(denoiser: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Every parameter and buffer takes its tensor, in the tensor's dtype; none may be left over or left out."""
    buffers = dict(denoiser.named_buffers())
    unlisted = buffers.keys() - denoiser.state_dict().keys()  # non-persistent: load_state_dict does not know them
    denoiser.load_state_dict({k: v for k, v in tensors.items() if k not in unlisted}, strict=True, assign=True)
    for name in unlisted:
        if tensors[name].shape != buffers[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(buffers[name].shape)}")
        owner, _, attribute = name.rpartition(".")
        denoiser.get_submodule(owner)._buffers[attribute] = tensors[name]
