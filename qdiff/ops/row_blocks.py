"""Cutting a pass over many rows into blocks whose intermediate results stay in a CPU core's cache.

Measured on 2 cores with 1 MiB of L2 each: elementwise work on a block that fits runs 5 to 100 times faster than on a
tensor of 32 MiB, which the allocator maps anew, page by page, for every temporary.
"""

from collections.abc import Iterator

import torch

# Bytes of one intermediate result, all cores together.
_CPU_BLOCK_BYTES = 1 << 20


def row_blocks(rows: int, bytes_per_row: int, device: torch.device, at_least: int = 16) -> Iterator[slice]:
    """Slices of `at_least` or more rows that cover range(rows) in order; a single one off the CPU."""
    step = rows if device.type != "cpu" else max(at_least, _CPU_BLOCK_BYTES // max(1, bytes_per_row))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, max(1, step)))
