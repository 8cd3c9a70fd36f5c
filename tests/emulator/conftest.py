"""The CPU emulator as a fixture: kernels are compiled once a session."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def load_kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`load_kernel(source, defines)`: see `load` of build.py."""
    # By its path: the tests are no package.
    spec = importlib.util.spec_from_file_location("emulator_build", Path(__file__).parent / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    folder = tmp_path_factory.mktemp("emulator")
    return functools.lru_cache(None)(lambda source, defines=(): build.load(source, defines, folder))
