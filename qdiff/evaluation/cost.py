"""What a model takes up."""

from __future__ import annotations

import copy

from torch import Tensor, nn


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of every parameter and buffer of `module`, each tensor counted once, as it is stored now."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(map(_bytes, tensors.values()))


def half_precision_bytes(module: nn.Module) -> int:
    """Return `stored_bytes` of `module` in half precision: what it takes when nothing is kept wider than it need be.

    What a module keeps at a width of its own under `.half()` (codes, scales) is counted at that width.
    """
    return stored_bytes(copy.deepcopy(module).half())


def _bytes(tensor: Tensor) -> int:
    """Of what is inside a tensor subclass too: it reports the size of the float tensor that it stands for."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)
