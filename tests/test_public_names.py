"""`import qdiff` is light, and has exactly the names that it promises."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

import qdiff


def test_import_is_light():
    program = (
        "import sys, qdiff; print([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_public_names():
    expected = {"Calibration", "Recipe", "__version__", "calibrate", "load", "quantize_pipeline", "save", "summary"}
    assert set(qdiff.__all__) == expected
    assert expected <= set(dir(qdiff))
    for name in expected:
        assert getattr(qdiff, name) is not None


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"no attribute 'quantise'; it has Calibration"):
        _ = qdiff.quantise


def test_version_is_that_of_the_distribution():
    try:
        installed = version("diffusers-qdiff")
    except PackageNotFoundError:
        pytest.skip("not installed")
    assert qdiff.__version__ == installed
