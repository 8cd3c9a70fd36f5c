"""The same work by other packages, as they are released: SDNQ 0.2.8 and optimum-quanto 0.2.7.

Neither is a dependency of qdiff, and nothing of them is copied: they are imported when a row of theirs is measured, and
a package that is not installed makes a row that says so. Both keep activations in floating point, but for SDNQ's
quantized matmul.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

SECTION = "peers"


@dataclass(frozen=True)
class Peer:
    """One configuration of a peer. package: its module's name.  options: what its own function is called with."""

    label: str
    package: str
    options: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    section: str = SECTION


def all_peers() -> Iterator[Peer]:
    """Every peer's row, in the table's order."""
    for bits in (4, 5, 6):
        yield Peer(f"SDNQ int{bits}", "sdnq", _sdnq(bits))
        yield Peer(f"SDNQ int{bits}, SVD", "sdnq", _sdnq(bits, use_svd=True), f"SDNQ int{bits}")
    for bits in (4, 5, 6):
        # Its integer convolutions fail with int6 on emoji-sd (0.2.8: "cannot unpack non-iterable NoneType object").
        matmul = {"use_quantized_matmul": True, "use_quantized_matmul_conv": bits < 6}
        which = "int8 products" if bits < 6 else "int8 products in linear layers"
        yield Peer(f"SDNQ int{bits}, {which}", "sdnq", _sdnq(bits, **matmul))
    yield Peer("SDNQ int4, embeddings too", "sdnq", _sdnq(4, quant_embedding=True))
    yield Peer("quanto int4, linear layers", "optimum.quanto", {"convolutions": False})
    yield Peer("quanto int4", "optimum.quanto", {"convolutions": True})


def _sdnq(bits: int, **more: Any) -> dict[str, Any]:
    return {"weights_dtype": f"int{bits}", "quant_conv": True, **more}


def quantized(peer: Peer, denoiser: nn.Module) -> nn.Module:
    """The denoiser as the peer quantizes it; the module given is used up.

    Raises:
        ImportError: the package is not installed.
    """
    return QUANTIZERS[peer.package](denoiser, peer.options)


def bytes_of(peer: Peer, denoiser: nn.Module) -> int:
    """Bytes that the peer stores for a float16 denoiser: every tensor at the width that it keeps it in."""
    # On the CPU: on a GPU, quanto repacks float16 weights for kernels that it compiles first.
    module = quantized(peer, copy.deepcopy(denoiser).cpu().half())
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(_inner_bytes(tensor) for tensor in tensors.values())


def _inner_bytes(tensor: Tensor) -> int:
    """Of what a tensor subclass holds: it reports the size of the float tensor that it stands for."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_inner_bytes(getattr(tensor, name)) for name in names)


def _by_sdnq(denoiser: nn.Module, options: dict[str, Any]) -> nn.Module:
    # Compilation changes its speed, which is not measured here, and takes minutes.
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
    from sdnq import sdnq_post_load_quant

    if torch.cuda.is_available():
        import triton

        # For its integer products; Triton has no allocator of its own. It belongs to this thread, which runs them too.
        triton.set_allocator(_scratch)
    module: nn.Module = sdnq_post_load_quant(denoiser, **options)
    return module


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for a Triton kernel on the current stream; torch aligns to more than a kernel asks for (128 bytes)."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _by_quanto(denoiser: nn.Module, options: dict[str, Any]) -> nn.Module:
    from optimum.quanto import freeze, qint4, quantize
    from optimum.quanto.library.extensions import get_extension, is_extension_available

    for name in ("quanto_cpp", "quanto_cuda"):  # it would compile them on first use: minutes, or for ever
        if is_extension_available(name):
            get_extension(name)._lib = SimpleNamespace(unpack=_unpack)
    convolutions = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Conv2d)]
    # An empty list would be taken for "all".
    exclude = {} if options["convolutions"] or not convolutions else {"exclude": convolutions}
    quantize(denoiser, weights=qint4, **exclude)
    freeze(denoiser)
    return denoiser


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """What quanto's extensions compute: the first values of all bytes, then the second."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])


QUANTIZERS: dict[str, Callable[[nn.Module, dict[str, Any]], nn.Module]] = {
    "sdnq": _by_sdnq,
    "optimum.quanto": _by_quanto,
}
