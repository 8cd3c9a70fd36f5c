"""Which pairs of pictures a person should look at: the least alike, and ordinary ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qdiff.evaluation.entries import Entry

WORST = MEDIAN = 4


def shown_pairs(
    name: str, candidate: Sequence[Entry], reference: Sequence[Entry], psnr: Mapping[int, float], out: Path
) -> list[dict[str, Any]]:
    """Return the pairs of the smallest and of the middle PSNR, as `Report.pairs` has them, the worst first.

    psnr: in dB, by place in the sequences.  out: the report's folder, which the paths start from.
    """
    ranked = sorted(psnr, key=lambda index: (psnr[index], index))
    middle = max(WORST, len(ranked) // 2 - MEDIAN // 2)
    return [
        {
            "key": candidate[index].key,
            "prompt": candidate[index].item.subject,
            "group": candidate[index].item.group or "",
            "candidate": name,
            "reference_png": _relative(reference[index].path, out),
            "candidate_png": _relative(candidate[index].path, out),
            "psnr_db": psnr[index],
        }
        for index in (*ranked[:WORST], *ranked[middle : middle + MEDIAN])
    ]


def _relative(path: Path, out: Path) -> str:
    return Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()
