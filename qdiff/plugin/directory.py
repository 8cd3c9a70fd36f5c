"""A directory of files that is replaced as a whole or not at all, and checked file by file."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20  # bytes read at a time while hashing: larger ones measured no faster


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A new, empty directory beside `target`, to be filled; it takes the place of `target` when the block ends.

    Every file reaches the disk before the first rename. On any error, at any point, `target` is as it was and the new
    directory is gone. Only a crash of the machine between the two renames leaves `target` missing; it then lies,
    whole, beside its place (see `interrupted`).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        aside.mkdir()
        yield aside
        for path in [*(path for path in sorted(aside.rglob("*"))), aside]:
            _sync(path)
        _take_place(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _take_place(aside: Path, target: Path) -> None:
    if not target.exists():
        aside.rename(target)
        return
    old = aside.with_suffix(".old")
    target.rename(old)
    try:
        aside.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file or a directory is on the disk: a full disk may say so only now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def interrupted(target: Path) -> list[Path]:
    """What a crash in the middle of a replacement may have left: whole old directories, newest last."""
    return sorted(target.parent.glob(f".{target.name}.*.old"), key=lambda path: path.stat().st_mtime)


def fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and sha256 of every file below `folder`, by its relative path with forward slashes."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def verify(folder: Path, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares the files below `folder` with their `fingerprints`.

    Raises:
        ValueError: a file is missing, truncated or changed (it is named), or a path leads out of the folder.
    """
    for name, fingerprint in expected.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"checkpoint {folder} is damaged: it lists {name!r}, which is outside of it")
        if not path.is_file():
            raise ValueError(f"checkpoint {folder} is incomplete: {name} is missing; copy or download it again")
        size = path.stat().st_size
        if size != fingerprint["bytes"]:
            kind = "truncated" if size < fingerprint["bytes"] else "damaged"
            raise ValueError(
                f"checkpoint {folder} is {kind}: {name} has {size} bytes, expected {fingerprint['bytes']}; "
                "copy or download it again"
            )
        if _sha256(path) != fingerprint["sha256"]:
            raise ValueError(
                f"checkpoint {folder} is damaged: the sha256 of {name} is not the recorded one; "
                "copy or download it again"
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
