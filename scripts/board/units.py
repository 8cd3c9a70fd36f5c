"""What is to be measured, in which order, and what has to be there first."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from board.peers import SECTION as PEERS
from board.peers import Peer
from board.rows import Row, all_rows
from qdiff import Calibration, Recipe
from qdiff.demo.measure import DemoSettings
from qdiff.plugin.calibrate import settings_of


@dataclass(frozen=True)
class Settings:
    """What is the same for all rows. dtype: what quantized denoisers compute in; the reference is always float32."""

    assets: Path
    work: Path
    count: int = 64
    steps: int = 20
    guidance: float = 4.0
    replayed: int = 8
    device: str = "cpu"
    dtype: str = "float32"

    def run(self, seed: int) -> DemoSettings:
        """Pictures of seed s start from noise 1000 (s + 1) + i, calibration's from 100 s + i: none in common."""
        return DemoSettings(self.assets, (), self.count, self.steps, self.guidance, 1000 * (seed + 1), self.replayed)


@dataclass(frozen=True)
class Shared:
    """One calibration for all the recipes that can share it."""

    calibration: Calibration
    recipes: tuple[Recipe, ...]

    @classmethod
    def by(cls, row: Row, seed: int) -> Shared:
        """With all rows that calibrate at the same steps, and as this one with or without the first token."""
        alike = [other for other in all_rows() if _how(other) == _how(row)]
        return cls(dataclasses.replace(_how(row)[0], seed=100 * seed), tuple(other.recipe for other in alike))


def _how(row: Row) -> tuple[Calibration, bool]:
    skips = any(spec.name == "first_token" for spec in row.recipe.transforms)
    return settings_of(row.calibration, None, row.recipe), skips


@dataclass(frozen=True)
class Unit:
    """What one process does at a time.

    row: what is measured, or what has to be there before: None, the full-precision run that all are compared with, or
    the statistics that rows share.
    """

    model: str
    seed: int
    row: Row | Peer | Shared | None

    @property
    def preparations(self) -> tuple[Unit, ...]:
        """What has to be there before."""
        reference = Unit(self.model, self.seed, None)
        if isinstance(self.row, Row):
            return (reference, Unit(self.model, self.seed, Shared.by(self.row, self.seed)))
        return (reference,) if isinstance(self.row, Peer) else ()

    def key(self, settings: Settings) -> str:
        """Changes with everything that the figures depend on but the code."""
        row = self.row
        what = {
            "model": self.model,
            "seed": self.seed,
            "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("assets", "work")},
            "recipe": row.recipe.to_dict() if isinstance(row, Row) else None,
            "calibration": dataclasses.asdict(row.calibration) if isinstance(row, Row | Shared) else None,
            "peer": dataclasses.asdict(row) if isinstance(row, Peer) else None,
        }
        if isinstance(row, Shared):
            what["shared"] = [recipe.to_dict() for recipe in row.recipes]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Task:
    """A unit with its key, and the keys of those that must be over before it starts."""

    unit: Unit
    key: str
    after: frozenset[str] = frozenset()


def tasks_of(units: Iterable[Unit], settings: Settings) -> list[Task]:
    """The units, and before them what they need, in the order in which they should start.

    The first seed of every row comes first, so that time running out costs repetitions and not rows; then the other
    seeds of presets and peers, of roundings, of the rest.
    """
    ranked: list[tuple[tuple[int, int, bool], Task]] = []
    known: set[str] = set()
    for unit in sorted(units, key=_rank):
        needed = {preparation.key(settings): preparation for preparation in unit.preparations}
        ranked += [((*_rank(unit), False), Task(need, key)) for key, need in needed.items() if key not in known]
        ranked.append(((*_rank(unit), True), Task(unit, unit.key(settings), frozenset(needed))))
        known |= needed.keys()
    return [task for _, task in sorted(ranked, key=lambda item: item[0])]


def _rank(unit: Unit) -> tuple[int, int]:
    section = unit.row.section if isinstance(unit.row, Row | Peer) else ""
    return (0 if unit.seed == 0 else {"presets": 1, PEERS: 1, "rounding": 2}.get(section, 3)), unit.seed


def next_ready(waiting: Sequence[Task], unfinished: set[str]) -> Task | None:
    """The first task that waits for nothing that is still to be done."""
    return next((task for task in waiting if not task.after & unfinished), None)
