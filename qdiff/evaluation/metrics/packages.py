"""The packages that compute metrics: which version, and what to install where one is missing."""

from __future__ import annotations

import importlib
from importlib import metadata
from types import ModuleType


def package(name: str) -> str:
    """Return "name version" of an installed distribution."""
    return f"{name} {metadata.version(name)}"


def optional(module: str, used_by: str, install: str = '"diffusers-qdiff[eval]"') -> ModuleType:
    """Import a module that only an extra installs.

    Raises:
        ImportError: it is not installed; the text says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{used_by} needs {module.split('.')[0]} ({error}): pip install {install}") from error
