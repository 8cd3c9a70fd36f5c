"""Pictures on disk: each is written once, whole or not at all, and found again by what it was made of."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from qdiff.evaluation.disk import writing_to

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from torch import Tensor

_FLAW = "qdiff:flaw"
NAN, BLACK = "nan", "black"


@dataclass(frozen=True)
class Picture:
    """A picture as it was read. flaw: "nan" where it was drawn with NaN or infinite values, "black", or None."""

    pixels: UInt8[Tensor, "3 height width"]
    flaw: str | None


class PictureStore:
    """The pictures of one source, `<folder>/<key>.png`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.png"

    def has(self, key: str) -> bool:
        return self.path(key).is_file()

    def write(self, key: str, pixels: UInt8[Tensor, "3 height width"], *, finite: bool = True) -> None:
        """Write a picture, and remember if its values were not finite.

        Raises:
            OSError: it could not be written, for want of space or otherwise; nothing is left under its name.
        """
        note = PngInfo()
        if not finite:
            note.add_text(_FLAW, NAN)
        image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        with written_whole(self.path(key)) as aside:
            # Level 1 takes a third of the default's time for a tenth more bytes (512 x 512 photographs).
            image.save(aside, format="PNG", pnginfo=note, compress_level=1)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new file's path, to be written; the file takes the place of `path` when the block ends without an error.

    Raises:
        OSError: naming `path`, and what to do where the disk is full.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with writing_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def read_picture(path: Path) -> Picture:
    """Return the picture in a file, as 8-bit RGB.

    Raises:
        ValueError: the file is no picture, or is cut short.
    """
    with _opened(path) as image:
        flaw = image.info.get(_FLAW)
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    return Picture(pixels, flaw or (BLACK if int(pixels.max()) == 0 else None))


def picture_size(path: Path) -> tuple[int, int]:
    """Return width and height in pixels, from the file's header.

    Raises:
        ValueError: the file is no picture.
    """
    with _opened(path) as image:
        return image.size


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Raise a `ValueError` that names the file where it is no picture, or is cut short."""
    try:
        with Image.open(path) as image:
            yield image
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from error


def content_key(path: Path) -> str:
    """Return a key for a picture that was not drawn here: a hash of its file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
