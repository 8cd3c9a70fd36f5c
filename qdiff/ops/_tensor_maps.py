"""Tensor maps: what Hopper's copy engine is told of the tensors that it reads and writes."""

from __future__ import annotations

import ctypes
import itertools
import operator
from typing import Any

from qdiff.ops import _cupy

NO_MAP = bytes(128)
_MAX_MAPS = 1024


class Maps(dict[int, bytes]):
    """The maps of one shape, by address; made when they are first asked for.

    A map says where and how to read and holds nothing else, so one that was made for an address and a shape stays right
    for them; the caching allocator hands out the same addresses again and again.
    """

    def __init__(self, *shape: Any) -> None:
        self.shape = shape

    def __missing__(self, address: int) -> bytes:
        if len(self) >= _MAX_MAPS:
            self.clear()
        found = self[address] = encode(address, *self.shape)
        return found


_maps: dict[tuple[Any, ...], Maps] = {}


def maps_of(*shape: Any) -> Maps:
    """Those of these sizes, box and windows: `encode`'s arguments but for the address."""
    if len(_maps) >= _MAX_MAPS:
        forget()  # launches that are ready keep theirs
    return _maps.setdefault(shape, Maps(*shape))


def forget() -> None:
    """Make every map anew."""
    _maps.clear()


def encode(address: int, sizes: tuple[int, ...], box: tuple[int, int], *windows: tuple[int, int, int]) -> bytes:
    """The map of a dense tensor of bytes.

    Args:
        address: where it begins.
        sizes: the innermost first: (columns, rows), or of images (C, W, H, N).
        box: bytes of a row, 64 or 128, and rows, that are copied at once; of images, pixels. In shared memory the rows'
            pieces of 16 bytes are swapped as far as a row is wide.
        windows: for images, of rows and of columns: where the first window begins, and the last, counted from the
            last pixel; the step from one to the next.
    """
    strides = list(itertools.accumulate(sizes[:-1], operator.mul))
    room = ctypes.create_string_buffer(192)
    at = (ctypes.addressof(room) + 63) // 64 * 64
    head = (
        ctypes.c_void_p(at),
        0,  # bytes
        len(sizes),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * len(sizes))(*sizes),
        (ctypes.c_uint64 * len(strides))(*strides),
    )
    # Not interleaved; swizzled by 64 or 128 bytes; 128 bytes at a time are fetched into L2; zeros outside.
    tail = (0, {64: 2, 128: 3}[box[0]], 2, 0)
    if windows:  # columns first, here too, though the driver's documentation has the corners the other way round
        first, last, steps = ([values[0], values[1]] for values in zip(*reversed(windows), strict=True))
        corners = ((ctypes.c_int * 2)(*first), (ctypes.c_int * 2)(*last))
        result = _cupy.tensor_map_encoder("Im2col")(*head, *corners, *box, (ctypes.c_uint32 * 4)(1, *steps, 1), *tail)
    else:
        steps_of_one = (ctypes.c_uint32 * 2)(1, 1)
        result = _cupy.tensor_map_encoder("Tiled")(*head, (ctypes.c_uint32 * 2)(*box), steps_of_one, *tail)
    if result != 0:
        raise RuntimeError(f"the driver makes no tensor map (CUresult {result}) of {sizes}, {box}, {windows}")
    return ctypes.string_at(at, 128)
