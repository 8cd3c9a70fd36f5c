"""The CPU emulator as fixtures: kernels are compiled once a session."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def _module(name: str) -> ModuleType:
    # By its path: the tests are no package.
    spec = importlib.util.spec_from_file_location(f"emulator_{name}", Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def build() -> ModuleType:
    """build.py."""
    return _module("build")


@pytest.fixture(scope="session")
def problems() -> ModuleType:
    """problems.py."""
    return _module("problems")


@pytest.fixture(scope="session")
def guarded(build: ModuleType) -> Callable:
    """`guarded(tensor, alignment)`: see build.py."""
    return build.guarded


@pytest.fixture(scope="session")
def load_kernel(build: ModuleType, shared_folder: Path) -> Callable:
    """`load_kernel(source, defines)`: see `load` of build.py."""
    return functools.lru_cache(None)(lambda source, defines=(): build.load(source, defines, shared_folder))


@pytest.fixture(scope="session")
def emulated_kernel(build: ModuleType, load_kernel: Callable) -> Callable:
    """`emulated_kernel(source, defines)`: what `_cupy.kernel` returns, emulated."""
    return lambda source, defines=(): build.EmulatedKernel(load_kernel(source, defines))
