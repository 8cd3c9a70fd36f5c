"""Rows of numbers on disk, one a picture: appended by many processes, killed at any time, never counted twice.

    <folder>/<process>.rows   float32 rows, one after another
    <folder>/<process>.keys   "width <d>", then the keys of these rows, a line each

A row counts once its key's line is whole, and is written before it. Every process writes a pair of files of its own.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import numpy as np

from qdiff.evaluation.disk import writing_to

if TYPE_CHECKING:
    from jaxtyping import Float

_GATHERED = 4096  # rows that `ordered` copies at a time: 32 MB of the widest features


class RowWriter:
    """Appends rows to files of its own below `folder`; they are made when the first row comes."""

    def __init__(self, folder: Path, process: int = 0) -> None:
        self.folder, self.process = folder, process
        self._files: tuple[IO[bytes], IO[bytes]] | None = None
        self._width = 0

    def append(self, keys: Sequence[str], rows: Float[np.ndarray, "n d"]) -> None:
        """Add a row for each key.

        Raises:
            ValueError: not a row of the same width for each key.
            OSError: they could not be written; rows of earlier calls are kept.
        """
        rows = np.ascontiguousarray(rows, dtype="<f4")
        if rows.ndim != 2 or len(rows) != len(keys) or (self._width and rows.shape[1] != self._width):
            raise ValueError(f"rows must be [{len(keys)}, {self._width or 'd'}]: got {rows.shape}")
        with writing_to(self.folder):
            data, names = self._files or self._open(rows.shape[1])
            data.write(rows.tobytes())
            data.flush()
            names.write("".join(f"{key}\n" for key in keys).encode())
            names.flush()

    def _open(self, width: int) -> tuple[IO[bytes], IO[bytes]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = self.folder / f"{self.process:05d}-{secrets.token_hex(4)}"
        self._width = width
        self._files = stem.with_suffix(".rows").open("wb"), stem.with_suffix(".keys").open("wb")
        self._files[1].write(f"width {width}\n".encode())
        return self._files

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files or ():
            # After an error of writing, closing tries to write the same again, and fails: the first one is told.
            with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
                file.close()


@dataclass(frozen=True)
class Rows:
    """All rows below one folder. width: 0 where there is none.  places: of each key, its file and its row there."""

    width: int
    places: dict[str, tuple[Path, int]]

    def ordered(self, keys: Sequence[str], scratch: IO[bytes]) -> Float[np.ndarray, "n d"]:
        """Return the rows of `keys` in their order, as a memory map of the empty file `scratch`.

        Raises:
            KeyError: there is no row for a key.
            OSError: there is no room for them.
        """
        files: dict[Path, np.ndarray] = {}
        # Written, not mapped and filled: a mapping that finds the disk full ends the process without a word.
        for start in range(0, len(keys), _GATHERED):
            gathered = np.empty((len(keys[start : start + _GATHERED]), self.width), dtype=np.float32)
            for index, key in enumerate(keys[start : start + _GATHERED]):
                path, row = self.places[key]
                if path not in files:
                    # By the file's length: a killed process may have left part of a row.
                    count = path.stat().st_size // (4 * self.width)
                    files[path] = np.memmap(path, dtype="<f4", mode="r", shape=(count, self.width))
                gathered[index] = files[path][row]
            scratch.write(gathered.data)
        scratch.flush()
        shape = (len(keys), self.width)
        # Writable, as torch wants its arrays, and nothing that is written reaches the file.
        return np.memmap(scratch, dtype=np.float32, mode="c", shape=shape) if keys else np.empty(shape, np.float32)


def read_rows(folder: Path) -> Rows:
    """Return what all processes wrote below `folder`; of several rows with one key, the first.

    Raises:
        ValueError: files of different widths: they were not made by one version of one metric.
    """
    width, places = 0, dict[str, tuple[Path, int]]()
    for path in sorted(folder.glob("*.keys")):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line break is cut short
        data = path.with_suffix(".rows")
        if not lines or not data.is_file():
            continue
        this = int(lines[0].removeprefix("width "))
        if width and this != width:
            raise ValueError(f"{folder} has rows of {width} and of {this} numbers; remove it to measure again")
        width = this
        whole = data.stat().st_size // (4 * width)
        for row, key in enumerate(lines[1 : whole + 1]):
            places.setdefault(key, (data, row))
    return Rows(width, places)
