"""Which timestep the denoiser is running, told to the quantized layers.

Activation scales are tables over the timestep's *value* (the noise level), never over a step's index, so any scheduler
and any number of steps work. A :class:`StepTracker` turns the value into interpolation weights once per denoiser call;
every layer of that denoiser holds the same tracker and reads the weights from it. There is no module-level state: two
denoisers, or a denoiser and its deep copy, never see each other's timestep.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# The first argument of a diffusers denoiser is the noisy latent; UNets call it `sample`, transformers `hidden_states`.
_LATENT_NAMES = ("sample", "hidden_states", "x")


class DenoiserCall(NamedTuple):
    """What one denoiser call says about the trajectory.

    Attributes:
        timestep: the `timestep` argument as the pipeline passed it: a number or a tensor of shape [], [1] or [B].
        latent: the noisy latent [B, ...].
    """

    timestep: Tensor | float
    latent: Tensor


@dataclass(frozen=True)
class TimestepReader:
    """Finds timestep and latent among the arguments of a denoiser's forward; called with a pre-hook's (args, kwargs).

    Each attribute is an argument's name and position.
    """

    latent: tuple[str, int]
    timestep: tuple[str, int]

    @classmethod
    def of(cls, denoiser: nn.Module) -> TimestepReader:
        """Look at the signature once.

        Raises:
            ValueError: `forward` has no argument named `timestep`, or none that can be the latent.
        """
        names = list(inspect.signature(denoiser.forward).parameters)
        latent = next((name for name in _LATENT_NAMES if name in names), None)
        if "timestep" not in names or latent is None:
            raise ValueError(
                f"denoiser: {type(denoiser).__name__}.forward takes {names}, expected an argument `timestep` "
                f"and one of {list(_LATENT_NAMES)}; wrap the denoiser in a module with such a forward"
            )
        return cls((latent, names.index(latent)), ("timestep", names.index("timestep")))

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> DenoiserCall:
        latent, timestep = (_argument(place, args, kwargs) for place in (self.latent, self.timestep))
        if not isinstance(latent, Tensor):
            raise ValueError(
                f"{self.latent[0]}: got {type(latent).__name__}, expected a tensor of noisy latents [B, ...]"
            )
        if timestep is None:
            raise ValueError(
                "timestep: got None, expected a number or a tensor; pass the timestep the latent belongs to"
            )
        return DenoiserCall(timestep, latent)


def read_timestep(denoiser: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor | float, int]:
    """The `timestep` argument of one call of a denoiser, and the rows B of its noisy latent.

    Raises:
        ValueError: the denoiser's `forward` has no such arguments, or this call does not give them.
    """
    call = TimestepReader.of(denoiser)(args, kwargs)
    return call.timestep, call.latent.shape[0]


class StepTracker:
    """Interpolation weights of the running timestep over a calibrated grid of timesteps.

    Laws: each row of `weights` is non-negative, has at most two non-zero entries, and sums to 1; at a grid point it is
    that point's unit vector; outside the grid it is the nearest end's. Hence `weights @ table` is the piecewise-linear
    function of the timestep through the table's rows, constant beyond its ends.

    Attributes:
        timesteps: the grid, strictly ascending, in the scheduler's own units.
        weights: float32 [B, T] for the running call, or None before the first one.
    """

    def __init__(self, timesteps: Sequence[float]) -> None:
        grid = tuple(float(value) for value in timesteps)
        points = torch.tensor(grid, dtype=torch.float32)  # what distances are measured in
        if not grid or not points.isfinite().all() or not (points.diff() > 0).all():
            raise ValueError(
                f"timesteps: got {grid}, expected at least one number, strictly ascending; sort and deduplicate"
            )
        self.timesteps = grid
        self.weights: Tensor | None = None
        self._grids: dict[torch.device, Tensor] = {}
        # Weights, and by the id of a table: the table, so that no other gets its id; its version; its rows.
        self._shared: tuple[Tensor, dict[int, tuple[Tensor, int, Tensor]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_shared": None}  # a copy's tables have other ids

    def set(self, timestep: Tensor | float, batch: int, device: torch.device | str | None = None) -> None:
        """Set `weights` for a denoiser call.

        Only tensor operations on `device`: no value travels to the host, so a captured CUDA graph follows the timestep.

        Args:
            timestep: number, or tensor [], [1] or [R] with R dividing `batch`; row r then stands for batch / R samples.
            batch: rows B of the denoiser's input.
            device: where the weights are wanted; by default where the timestep is.
        """
        device = torch.device(device) if device is not None else getattr(timestep, "device", torch.device("cpu"))
        values = torch.as_tensor(timestep, device=device).to(torch.float32).reshape(-1)
        if values.numel() == 0 or batch % values.numel():
            raise ValueError(
                f"timestep: got {values.numel()} values for a batch of {batch}, expected a number that divides it"
            )
        self.weights = self._hat_weights(values).repeat_interleave(batch // values.numel(), dim=0)

    def _hat_weights(self, values: Tensor) -> Tensor:
        grid = self._grid(values.device)
        # passed[:, j] is how far the timestep has moved from grid point j to j + 1, in [0, 1]. Differences of
        # neighbours are the hat functions, and telescope to 1.
        passed = ((values[:, None] - grid[:-1]) / (grid[1:] - grid[:-1])).clamp(0, 1)
        ones = torch.ones_like(values)[:, None]
        return torch.cat([ones, passed], dim=1) - torch.cat([passed, torch.zeros_like(ones)], dim=1)

    def _grid(self, device: torch.device) -> Tensor:
        # Kept per device: making it copies from the host, which must not happen inside a CUDA graph capture.
        if device not in self._grids:
            self._grids[device] = torch.tensor(self.timesteps, dtype=torch.float32, device=device)
        return self._grids[device]

    def _running(self) -> Tensor:
        """The weights of the denoiser call that is running."""
        if self.weights is None:
            raise RuntimeError(
                "no timestep is known: call the denoiser, or StepTracker.set, before a layer with temporal scales"
            )
        return self.weights

    def share(self, tables: Iterable[Tensor]) -> None:
        """Resample these [T, S] tables at the running timestep, a few operations for all of them: `resample` then has
        their rows, bit for bit those that it would compute, for as long as neither weights nor table change.

        Raises:
            RuntimeError: no timestep is set.
        """
        weights = self._running()
        alike: dict[int, list[Tensor]] = {}
        for table in tables:
            if self._can_share(table, weights):
                alike.setdefault(table.shape[1], []).append(table)
        rows_of: dict[int, tuple[Tensor, int, Tensor]] = {}
        for columns, group in alike.items():
            # Each table's rows begin at a multiple of 16 bytes, as kernels want to read them.
            rows = weights.new_empty(len(group), -(-len(weights) // 4) * 4, columns)[:, : len(weights)]
            torch.sum(weights[:, :, None] * torch.stack(group)[:, None], dim=2, out=rows)
            rows_of |= {id(table): (table, table._version, row) for table, row in zip(group, rows.unbind())}
        self._shared = weights, rows_of

    def _can_share(self, table: Tensor, weights: Tensor) -> bool:
        fits = table.device == weights.device and table.dtype == torch.float32 and len(table) == len(self.timesteps)
        # Nobody counts the versions of inference tensors.
        return fits and not (table.requires_grad or weights.requires_grad or table.is_inference())

    def _shared_rows(self, table: Tensor) -> Tensor | None:
        # What is compiled has no host to save time of, and would be compiled anew for other Python values.
        if torch.compiler.is_compiling() or self._shared is None or self._shared[0] is not self.weights:
            return None
        known = self._shared[1].get(id(table))
        return known[2] if known is not None and known[1] == table._version else None

    def resample(self, table: Tensor, batch: int) -> Tensor:
        """Rows of a [T, S] table at the running timestep: float32 [batch, S].

        Args:
            table: float32 [T, S], one row a grid timestep.
            batch: rows of the asking layer's input; a multiple of the denoiser's batch (a layer may fold frames or
                tokens into its batch; they follow their sample).

        Raises:
            RuntimeError: no denoiser call has set a timestep yet.
            ValueError: `batch` is no multiple of the denoiser's batch, or the table has another number of rows than the
                grid.
        """
        weights = self._running()
        if table.shape[0] != len(self.timesteps):
            raise ValueError(
                f"table: got {table.shape[0]} rows, expected one for each of {len(self.timesteps)} timesteps"
            )
        rows = weights.shape[0]
        if batch % rows:
            raise ValueError(
                f"batch: got a layer input of {batch} rows, expected a multiple of the denoiser's batch, {rows}"
            )
        scales = self._shared_rows(table)
        if scales is None:
            # A sum of products and not a matrix product, which TF32 settings could round to 10 bits.
            scales = (weights.to(table.device)[:, :, None] * table).sum(dim=1)
        return scales if batch == rows else scales.repeat_interleave(batch // rows, dim=0)

    def attach(self, denoiser: nn.Module, layers: Sequence[nn.Module] = ()) -> RemovableHandle:
        """Follow the `timestep` argument of every call of this denoiser; `.remove()` the handle to stop.

        Args:
            layers: those whose buffers `act_scales` are tables to `share` at every call.
        """
        follow = _FollowTimestep(self, TimestepReader.of(denoiser), layers)
        return denoiser.register_forward_pre_hook(follow, with_kwargs=True)


@dataclass
class _FollowTimestep:
    # An object and not a closure: deep-copying a denoiser copies its hooks, and copies of functions still see the old
    # tracker.
    tracker: StepTracker
    read: TimestepReader
    layers: Sequence[nn.Module] = field(repr=False)  # and not their buffers, which others replace when a layer moves

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.read(args, kwargs)
        self.tracker.set(call.timestep, call.latent.shape[0], call.latent.device)
        if not torch.compiler.is_compiling():
            self.tracker.share([table for layer in self.layers if (table := layer._buffers["act_scales"]) is not None])


def _argument(place: tuple[str, int], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    name, position = place
    return kwargs[name] if name in kwargs else args[position] if position < len(args) else None
