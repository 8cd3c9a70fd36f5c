import math

import numpy as np
import pytest
from scipy import stats

from qdiff.evaluation.groups import group_records, permutation_p_value
from qdiff.evaluation.metrics import metric
from qdiff.evaluation.metrics.per_picture import PerPicture

PSNR = metric("psnr")
GROUPS = ["noto", "fluent", "twemoji"]


def decibels(shift=0.0, seed=0, n=120):
    """Rows of n pictures in three groups; `shift` is added to those of "twemoji"."""
    labels = [GROUPS[index % 3] for index in range(n)]
    rows = np.random.default_rng(seed).normal(28, 2, size=(n, 1)).astype(np.float32)
    rows[[label == "twemoji" for label in labels]] += shift
    return rows, labels


def test_p_values_are_uniform_where_groups_are_alike():
    rng = np.random.default_rng(0)
    found = [
        permutation_p_value([rng.gamma(2, size=20), rng.gamma(2, size=7), rng.gamma(2, size=12)]) for _ in range(150)
    ]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) <= 0.1) == pytest.approx(0.1, abs=0.06)


def test_the_p_value_is_that_of_scipy():
    rng = np.random.default_rng(1)
    groups = [rng.normal(0.25, 1, 200), rng.normal(0, 1, 40), rng.normal(0, 1, 5)]  # sizes count
    expected = stats.permutation_test(
        groups,
        lambda *parts, axis: stats.f_oneway(*parts, axis=axis).statistic,
        vectorized=True,
        n_resamples=4999,
        alternative="greater",
        rng=np.random.default_rng(2),
    ).pvalue
    # Two draws of 4,999 permutations: three standard deviations of their difference.
    assert permutation_p_value(groups) == pytest.approx(expected, abs=3 * math.sqrt(2 * 0.06 / 4999) + 0.002)


def test_a_group_that_is_worse_off_is_found():
    rows, labels = decibels(shift=-3)
    records = {record.name: record for record in group_records(PSNR, rows, labels, tags={"candidate": "a"})[3:]}
    worst, gap = records["psnr_db_worst_group"], records["psnr_db_group_gap"]
    assert worst.value == pytest.approx(rows[[label == "twemoji" for label in labels]].mean(), rel=1e-6)
    assert (worst.provenance["worst"], worst.tags, worst.n) == ("twemoji", {"candidate": "a"}, 40)
    assert 1.5 < gap.low < gap.value < gap.high < 5
    assert records["psnr_db_group_p_value"].value < 0.001


def test_groups_that_are_alike_are_not_called_unequal():
    records = group_records(PSNR, *decibels(seed=1))
    assert records[-1].name == "psnr_db_group_p_value"
    assert records[-1].value > 0.05
    assert records[-2].low == 0


def test_each_group_has_its_own_record():
    rows, labels = decibels()
    records = group_records(PSNR, rows, labels)[:3]
    assert [record.tags["group"] for record in records] == sorted(GROUPS)
    assert {record.name for record in records} == {"psnr_db"}
    chosen = rows[[label == "noto" for label in labels]]
    assert records[1].value == pytest.approx(chosen.mean(), rel=1e-6)
    assert records[1].provenance["package"].startswith("torchmetrics")


class Alignment(PerPicture):
    """A metric of single pictures, as CLIP score is."""

    name, feature_key, higher_is_better = "alignment", "alignment", True

    def provenance(self):
        return {}

    def rows(self, candidate, reference=None, prompts=None):
        raise NotImplementedError


def test_without_a_reference_in_the_row_the_change_is_tested():
    rows, labels = decibels(shift=-3)  # the pictures of one group are worse, before as after
    records = group_records(Alignment(), rows, labels, reference=rows + 0.01)
    assert records[0].value == pytest.approx(rows[[label == "fluent" for label in labels]].mean(), rel=1e-6)
    assert abs(records[3].value) < 0.02
    assert records[-1].value > 0.9
    assert len(group_records(Alignment(), rows, labels)) == 3


def test_distances_between_sets_are_split_where_they_stay_unbiased():
    rng = np.random.default_rng(0)
    kernel, frechet = metric("kd-efficientnet-lite0"), metric("fd-efficientnet-lite0")
    own, other = (rng.normal(size=(30, 1280)).astype(np.float32) for _ in range(2))
    labels = ["a", "b"] * 15
    own[::2] += 0.5
    records = group_records(kernel, own, labels, other)
    assert [record.name for record in records] == [
        *["kd_efficientnet_lite0"] * 2,
        "kd_efficientnet_lite0_worst_group",
        "kd_efficientnet_lite0_group_gap",
    ]
    assert records[2].provenance["worst"] == "a"
    assert group_records(frechet, own, labels, other) == []


def test_rows_without_a_group_or_a_figure_are_left_out():
    rows, labels = decibels(n=12)
    rows[0], labels[1] = np.nan, None
    rows[2], labels[2] = np.nan, "lonely"
    with pytest.warns(UserWarning, match=r"groups without 1 finite picture.* 'lonely'"):
        records = group_records(PSNR, rows, labels)
    assert sum(record.n for record in records[:3]) == 9


def test_one_group_has_no_gap():
    assert group_records(PSNR, decibels()[0], ["noto"] * 120) == []


def test_labels_must_be_as_many_as_rows():
    with pytest.raises(ValueError, match="groups must have an entry for each of 120 rows: got 3"):
        group_records(PSNR, decibels()[0], GROUPS)
