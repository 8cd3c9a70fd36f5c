"""Weights that a package cannot read: said with their path, before anything is drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from qdiff.evaluation.weights import Found


@contextlib.contextmanager
def loading(found: Found, used_by: str) -> Iterator[None]:
    """Raise what goes wrong in the block as a `ValueError` that names the weights; a missing package stays itself."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # packages say in many ways that a file is not what they expect
        why = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise ValueError(
            f"{used_by}: {found.path} cannot be loaded as its weights ({why}); put them there anew"
        ) from error
