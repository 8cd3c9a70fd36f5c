"""From rows on disk to records, memory does not grow with the number of pictures (but for their names)."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from qdiff.evaluation import groups, rows
from qdiff.evaluation.entries import Entry
from qdiff.evaluation.measuring import flaw_folder, row_folder, row_key
from qdiff.evaluation.metrics import finite, kernel, statistics
from qdiff.evaluation.metrics.features import Features
from qdiff.evaluation.metrics.frechet import FrechetDistance
from qdiff.evaluation.metrics.kernel import KernelDistance
from qdiff.evaluation.metrics.pixels import Psnr
from qdiff.evaluation.prompts import Item
from qdiff.evaluation.reducing import PictureSet, Reduction
from qdiff.evaluation.rows import RowWriter
from qdiff.evaluation.weights import Found

CPU = torch.device("cpu")
WIDTH, AT_ONCE = 256, 256
NAMES = 800  # bytes a picture: its key, where its row is, a few numbers; 390 to 520 were measured


class Synthetic(Features):
    name, width, resize = "synthetic", WIDTH, "none"

    def provenance(self):
        return {}

    def load(self):
        raise NotImplementedError

    def extract(self, pictures):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """What is taken at a time, in the proportion that 50,000 rows of 2,048 numbers have to it."""
    for module in (finite, kernel, statistics):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", AT_ONCE)
    monkeypatch.setattr(rows, "_GATHERED", AT_ONCE)
    monkeypatch.setattr(kernel, "OTHERS", 50)
    monkeypatch.setattr(kernel, "SUBSETS", 3)
    monkeypatch.setattr(kernel, "SUBSET_SIZE", 50)
    monkeypatch.setattr("qdiff.evaluation.bootstrap.DRAWN_AT_ONCE", 1 << 14)
    monkeypatch.setattr("qdiff.evaluation.bootstrap.RESAMPLES", 50)
    monkeypatch.setattr(groups, "SHUFFLED_AT_ONCE", 1 << 14)
    monkeypatch.setattr(groups, "PERMUTATIONS", 50)


def written(folder, metric, count):
    """The pictures of a candidate and of its reference, with rows of a metric."""
    rng, sets = np.random.default_rng(0), {}
    for name in ("reference", "candidate"):
        entries = [
            Entry(Item(index, f"thing {index}", index, "ab"[index % 2]), f"{name}-{index:06}", Path(name))
            for index in range(count)
        ]
        reference = sets["reference"].entries if sets else entries
        with RowWriter(flaw_folder(folder, name)) as writer:
            writer.append([entry.key for entry in entries], np.zeros((count, 1)))
        with RowWriter(row_folder(folder, metric, name, "reference")) as writer:
            width = 1 if metric.needs_reference else WIDTH
            keys = [row_key(metric, *pair) for pair in zip(entries, reference)]
            writer.append(keys, rng.normal(size=(count, width)))
        sets[name] = PictureSet.read(folder, name, entries)
    return sets


def peak(folder, metric, count):
    """The most memory that reducing takes, in bytes, and the records."""
    sets = written(folder / str(count), metric, count)
    reduction = Reduction(folder / str(count), sets["reference"], paired=True)
    tracemalloc.start()
    try:
        records = reduction.records(metric, sets["candidate"], {"candidate": "it"})
        return tracemalloc.get_traced_memory()[1], records
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance, Psnr])
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path, kind):
    metric = Psnr(CPU) if kind is Psnr else kind(Synthetic(Found(tmp_path, "0" * 64), CPU))
    peak(tmp_path, metric, 300)  # what is imported on first use
    few, many = 2000, 10000
    (less, _), (more, records) = (peak(tmp_path, metric, count) for count in (few, many))
    assert records[0].n == many
    # A copy of one set's rows would be another 1,024 bytes a picture, and so would one of a group's of both sets.
    assert more - less < NAMES * (many - few)
