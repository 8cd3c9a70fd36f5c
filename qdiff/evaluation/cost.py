"""What a model takes up."""

from __future__ import annotations

import copy

from torch import nn


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of every parameter and buffer of `module`, each tensor counted once, as it is stored now."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def half_precision_bytes(module: nn.Module) -> int:
    """Return `stored_bytes` of `module` in half precision: what it takes when nothing is kept wider than it need be.

    What a module keeps at a width of its own under `.half()` (codes, scales) is counted at that width.
    """
    return stored_bytes(copy.deepcopy(module).half())
