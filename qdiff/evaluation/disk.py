"""Errors of writing to disk, with what to do about them."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Raise an `OSError` of the block as one that names `path`, and says what to do where the disk is full."""
    try:
        yield
    except OSError as error:
        advice = "; free some space and run the same command again" if error.errno in FULL else ""
        why = error.strerror or error
        raise OSError(error.errno, f"cannot write {path}: {why}; what was written before is kept{advice}") from error
