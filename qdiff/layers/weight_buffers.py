"""What the quantized layers share: their buffers, filling them, and keeping their dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdiff.denoising import StepTracker
from qdiff.layers.quantized_weights import LayerSizes, QuantizedWeights
from qdiff.numerics.input_pipeline import InputPipeline
from qdiff.numerics.packing import pack_int4, pack_multipliers, storage_block
from qdiff.ops import transform_input
from qdiff.ops.w4a16_linear import float_weight

if TYPE_CHECKING:
    from qdiff.recipe import LayerPlan


class WeightBuffers(nn.Module):
    """Mixin before a torch layer class: quantized weights as buffers, in place of the parameters `weight` and `bias`.

    Buffers, all in the `state_dict`; K in the order of `qdiff.numerics.gemm_layout`, of the channels that the input
    pipeline (`qdiff.numerics.input_pipeline`) makes:
        codes: uint8 [N, K/2] (4 bits) or int8 [N, K] (8 bits);
        multipliers: uint8 [N, ceil(K / block / 2)] of blocks of `storage_block`, or None;  codebook: int8 [N, 16] or
            None; 4-bit layers have one of them;
        scale: float32 [N];
        bias: [N] in the compute dtype, or None;
        shift: float32 [C];  index: int64 [C'];  smooth: float32 [C'];  rotation: int8 [b]; each of them or None;
        down, up: [r, K] and [N, r] in the compute dtype if that is float16 or bfloat16, otherwise float16, or None;
        act_scales: float32 [T, S] or None;
        first_input, first_output: float32 [C] and [N], a first token and what the layer makes of it, or None.

    Only the bias follows `.half()`, `.to(dtype)` and the like; the others are numbers of fixed precision and only move.

    Attributes:
        plan: what was decided about the layer.
        storage_block: neighbours along K that are stored with one multiplier; what operators know as group_size.
        segments: the channel counts of what is quantized: the plan's, or the one that an index makes.
        tracker: gives temporal scales their timestep; shared by all layers of a denoiser; set by whoever installs the
            layer.
        compute_dtype: of `weight`, and of the float layer this one stands for.
    """

    plan: LayerPlan
    storage_block: int
    segments: tuple[int, ...]
    tracker: StepTracker | None
    compute_dtype: torch.dtype
    codes: Tensor
    multipliers: Tensor | None
    codebook: Tensor | None
    scale: Tensor
    bias: Any  # a buffer here, a parameter in the base class
    shift: Tensor | None
    index: Tensor | None
    smooth: Tensor | None
    rotation: Tensor | None
    down: Tensor | None
    up: Tensor | None
    act_scales: Tensor | None
    first_input: Tensor | None
    first_output: Tensor | None

    def _register(self, rows: int, taps: int, plan: LayerPlan, like: nn.Module, sizes: LayerSizes) -> None:
        """Register every buffer that the plan and the sizes call for, uninitialized."""
        given, float_bias = like.weight, getattr(like, "bias", None)
        assert isinstance(given, Tensor)
        device = given.device
        self.plan, self.tracker, self.compute_dtype = plan, None, given.dtype
        self.storage_block = storage_block(plan.group_size)
        self.segments = (sizes.split_channels,) if sizes.split_channels else plan.segments
        self._levels = plan.activation_levels
        self._only_smooths = not (sizes.has_shift or sizes.split_channels or sizes.rotation)

        def register(name: str, shape: tuple[int, ...] | None, dtype: torch.dtype) -> None:
            self.register_buffer(name, None if shape is None else torch.empty(shape, dtype=dtype, device=device))

        four_bit = plan.stored_bits == 4
        if sizes.has_codebook and not four_bit:
            raise ValueError(f"{plan.name}: a codebook is given, expected None for {plan.weight_bits}-bit weights")
        self._check_pipeline(sizes)
        channels = sizes.split_channels or sum(plan.segments)
        k = channels * taps
        blocks = k // self.storage_block
        register("codes", (rows, k // 2 if four_bit else k), torch.uint8 if four_bit else torch.int8)
        register("multipliers", (rows, (blocks + 1) // 2) if four_bit and not sizes.has_codebook else None, torch.uint8)
        register("codebook", (rows, 16) if sizes.has_codebook else None, torch.int8)
        register("scale", (rows,), torch.float32)
        has_bias = float_bias is not None if sizes.has_bias is None else sizes.has_bias
        register("bias", (rows,) if has_bias else None, self.compute_dtype)
        register("shift", (sum(plan.segments),) if sizes.has_shift else None, torch.float32)
        register("index", (sizes.split_channels,) if sizes.split_channels else None, torch.int64)
        register("smooth", (channels,) if sizes.has_smooth else None, torch.float32)
        register("rotation", (sizes.rotation,) if sizes.rotation else None, torch.int8)
        # What the branch is computed in, so that no call casts it.
        branch = low_rank_dtype(self.compute_dtype)
        register("down", (sizes.rank, k) if sizes.rank else None, branch)
        register("up", (rows, sizes.rank) if sizes.rank else None, branch)
        scaled = plan.range_mode in ("static", "temporal")
        register("first_input", (sum(plan.segments),) if sizes.has_first_token else None, torch.float32)
        register("first_output", (rows,) if sizes.has_first_token else None, torch.float32)
        register("act_scales", (sizes.scale_rows, len(plan.segments)) if scaled else None, torch.float32)

    def _check_pipeline(self, sizes: LayerSizes) -> None:
        plan, segments, index, rotation = self.plan, self.segments, sizes.split_channels, sizes.rotation
        if index and len(plan.segments) > 1:
            raise ValueError(f"{plan.name}: an index is given for {len(plan.segments)} segments, expected a single one")
        if plan.stored_bits == 4 and any(channels % plan.group_size for channels in segments):
            raise ValueError(f"{plan.name}: index has {index} channels, expected a multiple of {plan.group_size}")
        if rotation and (rotation & (rotation - 1) or any(channels % rotation for channels in segments)):
            raise ValueError(
                f"{plan.name}: rotation has {rotation} signs, expected a power of two that divides {list(segments)}"
            )

    @property
    def _pipeline(self) -> InputPipeline:
        return InputPipeline(self.shift, self.index, self.smooth, self.rotation)

    def _transformed(self, x: Tensor, channel_dim: int) -> tuple[Tensor, Tensor | None]:
        """What the quantizer takes: an input, and the smoothing vector that is yet to be applied to it."""
        own = self._buffers  # a module's attributes take ten times as long to find
        if self._only_smooths:
            return x, own["smooth"]
        return transform_input(x, own["shift"], own["index"], own["smooth"], own["rotation"], channel_dim), None

    def _float_matrix(self, taps: int) -> Tensor:
        """The float32 weight [N, K] of the raw input, in GEMM layout."""
        integers = (self.codes, self.multipliers, self.codebook, self.scale, self.storage_block)
        matrix = float_weight(None, *integers, self.down, self.up)
        return self._pipeline.fold(matrix, self.plan.segments, taps)

    def _fill(self, weights: QuantizedWeights, bias: Tensor | None) -> None:
        """Copy the numbers in, packing 4-bit ones."""
        values: dict[str, Tensor | None] = {
            "codes": weights.codes_q,
            "scale": weights.scale,
            "shift": weights.shift,
            "index": weights.index,
            "smooth": weights.smooth,
            "rotation": weights.rotation,
            "act_scales": weights.act_scales,
            "bias": bias
            if weights.bias_change is None
            else weights.bias_change + (0 if bias is None else bias.float()),
            "codebook": weights.codebook,
        }
        if weights.codebook is not None:
            values["codes"] = pack_int4(weights.codes_q - 8, self.storage_block)
            values["multipliers"] = weights.multipliers
        elif self.plan.stored_bits == 4:
            values["codes"] = pack_int4(weights.codes_q, self.storage_block)
            values["multipliers"] = pack_multipliers(self._multipliers(weights))
        if weights.low_rank is not None:
            values["down"], values["up"] = weights.low_rank
        if weights.first_token is not None:
            values["first_input"], product = weights.first_token
            values["first_output"] = product if bias is None else product + bias.float()
        for name, value in values.items():
            self._fill_buffer(name, value)

    def _multipliers(self, weights: QuantizedWeights) -> Tensor:
        """The multipliers of the groups, repeated for each of their blocks."""
        given, (rows, k), size = weights.multipliers, weights.codes_q.shape, self.plan.group_size
        if given is None or given.shape not in ((rows, 1), (rows, k // size)):
            shape = None if given is None else tuple(given.shape)
            raise ValueError(
                f"{self.plan.name}: multipliers have shape {shape}, expected [N, {k // size}] or [N, 1] for 4 bits"
            )
        return given.expand(-1, k // size).repeat_interleave(size // self.storage_block, dim=1)

    def _fill_buffer(self, name: str, value: Tensor | None) -> None:
        buffer = getattr(self, name)
        if (value is None) != (buffer is None) or (value is not None and value.shape != buffer.shape):
            got, expected = (None if tensor is None else tuple(tensor.shape) for tensor in (value, buffer))
            raise ValueError(f"{self.plan.name}: {name} has shape {got}, expected {expected} for this plan")
        if value is not None:
            buffer.copy_(value)

    def _input_scales(self, batch: int) -> Tensor:
        """Activation scales float32 [R, S] for an input of `batch` samples, R dividing it."""
        table = self._buffers["act_scales"]
        assert table is not None, "only static and temporal layers ask for given scales"
        if self.plan.range_mode == "static":
            return table
        if self.tracker is None:
            raise RuntimeError(
                f"{self.plan.name}: temporal activation scales need the timestep: "
                "set `layer.tracker` to the denoiser's StepTracker"
            )
        return self.tracker.resample(table, batch)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightBuffers:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        bias = self.bias
        # What a conversion would do to the float layer's weight, which is not there to tell.
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.codes.device)).dtype
        return super()._apply(move, recurse)

    def _describe(self) -> str:
        plan = self.plan
        weight = f"weight=int{plan.weight_bits}" + (f"/{plan.group_size}" if plan.stored_bits == 4 else "")
        activation = "float" if plan.range_mode == "none" else f"int{plan.activation_bits}/{plan.range_mode}"
        parts = ["" if self.first_input is None else ", first token apart"]
        parts += ["" if self.shift is None else ", shifted"]
        parts += ["" if self.index is None else f", channels={self.index.shape[0]}"]
        parts += ["" if self.rotation is None else f", rotation={self.rotation.shape[0]}"]
        parts += ["" if self.down is None else f", rank={self.down.shape[0]}"]
        return f", {weight}, activation={activation}" + "".join(parts)


def low_rank_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """What a layer of this dtype stores its low-rank branch in."""
    return compute_dtype if compute_dtype in (torch.float16, torch.bfloat16) else torch.float16


def stored_bytes(module: nn.Module) -> int:
    """Bytes of every parameter and buffer of the module and its children, each stored tensor once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
