"""The shortest way to a kernel, for calls like an earlier one.

Torch's dispatcher takes 5 us to hand a dozen arguments to a Python function, and the look at all of them that a launch
needs takes another 5: longer than small kernels run. A call with equal shapes, strides, dtypes, devices and other
arguments, in an equal state of the dispatcher, ends in the same launch of other addresses. Whether it is one is known
in 1 us by the check that `torch.compile` guards its own code with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Private to torch: without them every call takes the longer way.
try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards: Any = None  # type: ignore[no-redef]

# What computes an operator of other tensors of the same kind; None where it cannot, because of their addresses.
Launch = Callable[[Sequence[Tensor]], Any]

_MOST_KEYS = 4096
_MOST_KINDS = 16  # of a key

# By names of their own, which takes half the time.
_is_traced, _is_profiled = torch.compiler.is_dynamo_compiling, torch._C._autograd._profiler_enabled

_KEY = torch._C.DispatchKey
_DEVICES = (_KEY.CPU, _KEY.CUDA)
# What a call without a gradient passes through on its way to the device. Any other key wants to see the operator:
# modes, subclasses, functorch, tracing.
_PASSED = {_KEY.AutogradCPU, _KEY.AutogradCUDA, _KEY.ADInplaceOrView, _KEY.BackendSelect}
_PASSED |= {_KEY.AutocastCPU, _KEY.AutocastCUDA}


class _Known(NamedTuple):
    """A kind of call, and its launch."""

    others: Callable[[tuple[Any, ...]], Any]  # of the arguments, those that are no tensors
    values: Any  # of them
    tensors: Callable[[tuple[Any, ...]], tuple[Tensor, ...]]  # those that are, in the launch's order
    alike: Callable[..., bool]  # whether tensors are of the kind, and the dispatcher in the same state
    device: int
    launch: Launch


class _Offer(threading.local):
    """Where the operator that this thread runs may leave its launch."""

    open: list[tuple[Sequence[Tensor], Launch]] | None = None


_offer = _Offer()
_known: dict[Hashable, list[_Known]] = {}


def offer(tensors: Sequence[Tensor | None], launch: Launch) -> None:
    """Say what would compute the running operator again.

    Args:
        tensors: the operator's arguments, in the order in which `launch` wants their like, Nones left out. The offer is
            not taken if one of them is not an argument (but a copy of it), or an argument is not among them.
        launch: called with the tensors' device current, for tensors that differ from these in address and content.
    """
    if _offer.open is not None:
        _offer.open[:] = [([tensor for tensor in tensors if tensor is not None], launch)]


def forget() -> None:
    """Let every next call look at its arguments anew."""
    global _known
    _known = {}  # a call that is on its way enters its launch into the old one


def with_shortcut(name: str, overload: Callable[..., Any]) -> Callable[..., Any]:
    """`overload`, an operator of torch, by the shortest way. Its first argument is a tensor.

    Keywords, torch.compile, and whatever the dispatcher would show the operator to, the profiler among it, get the
    operator itself.
    """

    if TensorGuards is None:
        return overload

    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs or _is_traced() or _is_profiled() or not args or type(args[0]) is not Tensor:
            return overload(*args, **kwargs)
        table = _known
        key = (name, args[0].shape, *map(type, args))
        kinds = table.get(key)
        if kinds is not None:
            for others, values, pick, alike, device, launch in kinds:
                if others(args) == values:
                    tensors = pick(args)
                    if alike(*tensors) and (device < 0 or device == torch._C._cuda_getDevice()):
                        result = launch(tensors)
                        if result is not None:
                            return result
        before, _offer.open = _offer.open, []
        try:
            result = overload(*args)
            offered = _offer.open
        finally:
            _offer.open = before
        if offered:
            _enter(table, key, args, *offered[0])
        return result

    return call


def _enter(
    table: dict[Hashable, list[_Known]], key: Hashable, args: tuple[Any, ...], order: Sequence[Tensor], launch: Launch
) -> None:
    """Keep the launch of a call, if it reads the call's own tensors and nothing came between."""
    places = {id(value): place for place, value in enumerate(args) if isinstance(value, Tensor)}
    wanted = [places.get(id(tensor), -1) for tensor in order]
    others = [place for place, value in enumerate(args) if not isinstance(value, Tensor)]
    if len({*wanted}) + len(others) != len(args) or -1 in wanted or not all(map(_goes_straight, order)):
        return
    if len(table) >= _MOST_KEYS:
        table.clear()
    pick, device = _picker(others), order[0].get_device()
    values = tuple([*value] if isinstance(value, list) else value for value in pick(args))
    alike = TensorGuards(*order, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    kinds = table.setdefault(key, [])
    kinds.append(_Known(pick, values, _picker(wanted), alike, device, launch))
    del kinds[:-_MOST_KINDS]


def _picker(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def _goes_straight(tensor: Tensor) -> bool:
    """Whether the dispatcher would now take an operator of this tensor to the device and nowhere else."""
    if tensor.requires_grad:  # the guards do not see whether gradients are on
        return False
    keys = torch._C._dispatch_keys(tensor) | torch._C._dispatch_tls_local_include_set()
    keys = keys - torch._C._dispatch_tls_local_exclude_set()
    while (key := keys.highestPriorityTypeId()) in _PASSED:
        keys = keys.remove(key)
    return key in _DEVICES
