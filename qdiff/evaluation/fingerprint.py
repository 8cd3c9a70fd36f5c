"""What a picture depends on, as short texts that change when it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = 1 << 20  # bytes hashed at a time
_SHOWN = 16  # hexadecimal digits: 2^-64 for two of them to be the same by chance


def short_hash(value: Any) -> str:
    """Return the hash of plain JSON values; the order of a mapping's keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_SHOWN]


def of_directory(folder: Path) -> str:
    """Return the hash of the names and contents of all files below `folder`, hidden ones apart."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            digest.update(relative.as_posix().encode() + b"\0")
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()[:_SHOWN]


def of_modules(parts: Mapping[str, Any]) -> str:
    """Return the hash of a pipeline's parts: classes, configurations, vocabularies, and the values of every tensor."""
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        digest.update(json.dumps([name, type(part).__name__, _settings(part)], sort_keys=True).encode())
        for key, tensor in _tensors(part):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_SHOWN]


def _settings(part: Any) -> dict[str, str]:
    if hasattr(part, "get_vocab"):
        return {key: str(value) for key, value in part.get_vocab().items()}
    config = getattr(part, "config", None) or {}
    items = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    # What starts with an underscore says where it came from.
    return {key: str(value) for key, value in items.items() if not key.startswith("_")}


def _tensors(part: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, nn.Module):
        for key, tensor in (*part.named_parameters(), *part.named_buffers()):
            yield from _plain(key, tensor)


def _plain(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those inside a tensor subclass, which may stand for values that it does not hold."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{key}.{name}", getattr(tensor, name))
    elif tensor.numel():
        yield key, tensor
