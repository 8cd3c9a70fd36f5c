"""`Calibration`: which prompts, how many steps, which seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Calibration:
    """How the pipeline is run while its activations are measured.

    prompts:         captions (str) or class labels (int or str, as the pipeline takes them); None: the built-in ones.
    steps:           denoising steps a prompt, by the pipeline's own scheduler.
    guidance_scale:  None: the pipeline's default.
    batch_size:      prompts run together; more is faster and takes more memory.
    seed:            of the initial noise and of what is sampled. The same seed gives the same statistics, bit for bit.

    Raises `ValueError` for zero prompts and for a count below one.
    """

    prompts: Sequence[str | int] | None = None
    steps: int = 20
    guidance_scale: float | None = None
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise ValueError(
                f"calibration prompts must be a list: got the string {self.prompts!r}; use [{self.prompts!r}]"
            )
        if self.prompts is not None:
            object.__setattr__(self, "prompts", tuple(self.prompts))
            if not self.prompts:
                raise ValueError(
                    "calibration needs at least one prompt: got none; pass prompts=None for the built-in ones"
                )
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"calibration {name} must be at least 1: got {getattr(self, name)}")

    @classmethod
    def of(cls, value: Calibration | Sequence[str | int] | None, seed: int = 0) -> Calibration:
        """A `Calibration` as it is, a list of prompts, or None for the built-in prompts."""
        return value if isinstance(value, Calibration) else cls(prompts=value, seed=seed)
