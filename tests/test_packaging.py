"""What is installed is complete: the wheel's content, its metadata, and an import of it from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import qdiff
from qdiff.ops._cuda_sources import cuda_source_dir

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, built by the backend itself, so without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_carries_every_source_and_nothing_else(wheel):
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "qdiff").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    device = {
        f"qdiff/_cuda/{path.relative_to(ROOT / 'cuda').as_posix()}"
        for path in (ROOT / "cuda").rglob("*")
        if path.is_file()
    }
    assert device
    assert {name for name in names_in(wheel) if ".dist-info/" not in name} == package | device


def test_the_wheel_has_the_licence_and_the_command(wheel):
    (licence,) = (name for name in names_in(wheel) if name.endswith("licenses/LICENSE"))
    (entry_points,) = (name for name in names_in(wheel) if name.endswith("entry_points.txt"))
    with zipfile.ZipFile(wheel) as archive:
        assert "Apache License" in archive.read(licence).decode()
        assert "qdiff = qdiff.cli:main" in archive.read(entry_points).decode()


def test_the_installed_package_finds_its_own_device_code(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import qdiff\n"
        "from qdiff.ops._cuda_sources import cuda_source_dir\n"
        "print(qdiff.__file__, cuda_source_dir(), sep='\\n')"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    assert Path(output[0]) == tmp_path / "qdiff" / "__init__.py"
    assert Path(output[1]) == tmp_path / "qdiff" / "_cuda"


def test_the_checkout_reads_its_device_code_in_place():
    assert cuda_source_dir() == ROOT / "cuda"


def test_the_version_is_the_same_everywhere():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert declared[1] == qdiff.__version__


def test_import_and_help_do_not_wait_for_torch():
    program = "import sys, qdiff, qdiff.cli; print('torch' in sys.modules or 'diffusers' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert output.stdout.strip() == "False"


def test_the_public_names_are_all_there():
    for name in qdiff.__all__:
        assert getattr(qdiff, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qdiff.quantise  # noqa: B018  # the access is the test
