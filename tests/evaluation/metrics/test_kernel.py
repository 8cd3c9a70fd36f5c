import cleanfid.fid
import numpy as np
import pytest
import torch

from qdiff.evaluation.metrics import Statistics
from qdiff.evaluation.metrics.features import Features
from qdiff.evaluation.metrics.inception import Inception
from qdiff.evaluation.metrics.kernel import KernelDistance
from qdiff.evaluation.weights import Found

CPU = torch.device("cpu")
WIDTH = 6


class Given(Features):
    """Features for tests that have rows and no pictures."""

    name, width, resize = "given", WIDTH, "none"

    def provenance(self):
        return {"resize": self.resize}

    def load(self):
        raise NotImplementedError

    def extract(self, pictures):
        raise NotImplementedError


GIVEN = KernelDistance(Given(Found(None, "0" * 64), CPU))


def normal_rows(n, seed, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, size=(n, WIDTH)).astype(np.float32)


def test_kid_is_that_of_torch_fidelity(fidelity, weights, pictures, disturbed):
    expected = fidelity(disturbed[:12], pictures[:12], kid=True, kid_subset_size=12)["kernel_inception_distance_mean"]
    path = weights.folder / "inception-random.pth"
    distance = KernelDistance(Inception(Found(path, "0" * 64), CPU, "legacy_tensorflow", "64", "random"))
    [record] = distance.reduce(distance.rows(disturbed[:12]).numpy(), distance.rows(pictures[:12]).numpy())
    # A difference of float32 kernel means, in another order of pictures.
    assert record.value == pytest.approx(expected, rel=1e-3)
    assert record.name == "kd_inception_random"


def test_kid_is_that_of_clean_fid():
    own, other = normal_rows(300, 1, 0.5), normal_rows(300, 2)
    [record] = GIVEN.reduce(own, other)
    assert record.value == pytest.approx(cleanfid.fid.kernel_distance(own, other, num_subsets=1), rel=1e-4)
    assert record.low < record.value < record.high


def test_equal_distributions_are_at_distance_zero():
    found = [GIVEN.reduce(normal_rows(40, seed), normal_rows(50, 500 + seed))[0] for seed in range(100)]
    values = np.array([record.value for record in found])
    assert abs(values.mean()) < 3 * values.std() / 10  # unbiased, at any number of pictures


@pytest.mark.parametrize("sizes", [(200, 200), (120, 80)], ids=["as-many", "subsets"])
def test_the_interval_has_the_width_of_repeated_experiments(sizes):
    found = [GIVEN.reduce(normal_rows(sizes[0], s, 0.5), normal_rows(sizes[1], 900 + s))[0] for s in range(100)]
    true = np.std([record.value for record in found])
    claimed = np.mean([(record.high - record.low) / (2 * 1.96) for record in found])
    assert claimed == pytest.approx(true, rel=0.15)  # 100 experiments know their deviation to 7 %


def test_statistics_cannot_stand_in_for_pictures():
    with pytest.raises(ValueError, match="not their statistics"):
        GIVEN.reduce(normal_rows(30, 1), Statistics.of_rows(normal_rows(30, 2), GIVEN.feature_key))


def test_a_read_only_memory_map_is_reduced(tmp_path):
    np.save(tmp_path / "rows.npy", normal_rows(60, 1, 0.3))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert GIVEN.reduce(mapped, normal_rows(60, 2)) == GIVEN.reduce(np.array(mapped), normal_rows(60, 2))
