"""Where the CUDA sources are, in a checkout and in an installed wheel alike."""

from __future__ import annotations

from pathlib import Path


def cuda_source_dir() -> Path:
    """Return the folder of the device code: `cuda/` of the checkout, or `qdiff/_cuda/` of an installed wheel.

    The checkout goes first, so that an edit of a source is seen at once in an editable install.

    Raises:
        FileNotFoundError: neither folder exists, so the installation is incomplete.
    """
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "cuda").is_dir():
        return checkout / "cuda"
    if (package / "_cuda").is_dir():
        return package / "_cuda"
    raise FileNotFoundError(
        f"no CUDA sources: looked for {checkout / 'cuda'} and {package / '_cuda'}; "
        "reinstall diffusers-qdiff from a wheel, or from a complete checkout"
    )
