"""`Calibration`: which prompts, how many steps, which seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from qdiff.recipe import SAMPLINGS, check_choice


@dataclass(frozen=True)
class Calibration:
    """How the pipeline is run while its activations are measured.

    prompts:         captions (str) or class labels (int or str, as the pipeline takes them); None: the built-in ones.
    steps:           denoising steps a prompt, by the pipeline's own scheduler. More prompts teach more than more steps.
    guidance_scale:  None: the pipeline's default.
    batch_size:      prompts run together; more is faster and takes more memory.
    sampling:        at which of the steps statistics are collected (every trajectory runs through all of them):
                     "all"; "uniform", `sampled_steps` of them at equal distances (Q-Diffusion, arXiv 2302.04304:
                     a sample every c steps); or "normal", as many, their times distributed normally
                     (PTQ4DM, arXiv 2211.15736), a mean below 0.5 being nearer to the finished picture.
                     PTQ4DM draws a time for each of its pictures; here the times are the distribution's quantiles.
    sampled_steps:   how many steps; None with "all".
    mean, std:       of "normal", as fractions of the trajectory's time, which falls from 1 to 0. 0.4 and 0.4 are those
                     of the authors' scripts. Steps are distinct, and within the trajectory.
    seed:            of the initial noise and of what is sampled. The same seed gives the same statistics, bit for bit.

    Raises `ValueError` for zero prompts, a count below one, and a sampling that does not fit its steps.
    """

    prompts: Sequence[str | int] | None = None
    steps: int = 10
    guidance_scale: float | None = None
    batch_size: int = 8
    sampling: str = "all"
    sampled_steps: int | None = None
    mean: float = 0.4
    std: float = 0.4
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

        self._check_sampling()

    def _check_sampling(self) -> None:
        check_choice("calibration sampling", self.sampling, SAMPLINGS)
        if (self.sampling == "all") != (self.sampled_steps is None):
            raise ValueError(
                "calibration sampled_steps goes with sampling 'uniform' or 'normal': "
                f"got sampling={self.sampling!r}, sampled_steps={self.sampled_steps}"
            )
        if self.sampled_steps is not None and not 1 <= self.sampled_steps <= self.steps:
            raise ValueError(f"calibration sampled_steps must be in 1 to {self.steps}: got {self.sampled_steps}")
        if not 0 <= self.mean <= 1 or not self.std > 0:
            raise ValueError(
                f"calibration mean must be in [0, 1] and std above 0: got mean={self.mean}, std={self.std}"
            )

    @property
    def observed_steps(self) -> tuple[int, ...] | None:
        """The numbers of the steps that statistics are collected at, ascending, 0 the noisiest; None: all of them."""
        count = self.sampled_steps
        if count is None:
            return None
        shares = [(index + 0.5) / count for index in range(count)]
        if self.sampling == "uniform":
            return tuple(int(share * self.steps) for share in shares)
        times = NormalDist(self.mean, self.std)
        low, high = times.cdf(0), times.cdf(1)
        wanted = [(1 - times.inv_cdf(low + share * (high - low))) * self.steps - 0.5 for share in shares]
        free = set(range(self.steps))
        for position in sorted(wanted, key=lambda position: abs(position - wanted[count // 2])):
            free.discard(min(free, key=lambda step: abs(step - position)))  # the centre first: it has the neighbours
        return tuple(sorted(set(range(self.steps)) - free))

    @classmethod
    def of(cls, value: Calibration | Sequence[str | int] | None, seed: int = 0) -> Calibration:
        """A `Calibration` as it is, a list of prompts, or None for the built-in prompts."""
        return value if isinstance(value, Calibration) else cls(prompts=value, seed=seed)
