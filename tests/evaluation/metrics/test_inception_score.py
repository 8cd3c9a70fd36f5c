import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from qdiff.evaluation.metrics import metric
from qdiff.evaluation.metrics.inception import WIDTHS


def scores(n, seed=0):
    """Scores of pictures of eight classes, more or less clear."""
    found = np.random.default_rng(seed).normal(0, 2, size=(n, WIDTHS["logits_unbiased"])).astype(np.float32)
    found[:, 8:] -= 30
    return found


def test_inception_score_is_that_of_torch_fidelity(fidelity, weights, pictures):
    expected = fidelity(pictures, isc=True)["inception_score_mean"]
    score = metric("inception-score-random", weights)
    [record] = score.reduce(score.rows(pictures).numpy())
    # A random network hardly tells pictures apart: what counts is how far the score is above one.
    assert record.value - 1 == pytest.approx(expected - 1, rel=1e-2)
    assert expected - 1 > 1e-4
    assert (record.name, record.n) == ("inception_score_random", 20)


def test_the_interval_has_the_width_of_repeated_experiments(weights):
    score = metric("inception-score-random", weights)
    found = [score.reduce(scores(300, seed))[0] for seed in range(40)]
    true = np.std([record.value for record in found])
    claimed = np.mean([(record.high - record.low) / (2 * 1.96) for record in found])
    assert claimed == pytest.approx(true, rel=0.3)  # 40 experiments know their deviation to 11 %


def test_pictures_that_are_no_numbers_are_left_out(weights):
    score, rows = metric("inception-score-random", weights), scores(40)
    rows[3, 0] = np.inf
    with pytest.warns(UserWarning, match="1 of 40"):
        record, left_out = score.reduce(rows)
    kept = torch.from_numpy(np.delete(rows, 3, 0))
    assert record.value == pytest.approx(isc_features_to_metric(kept)["inception_score_mean"], rel=1e-9)
    assert left_out.value == 1


def test_too_few_pictures_for_the_splits_are_refused(weights):
    with pytest.raises(ValueError, match="needs 20 pictures or more for its 10 splits: got 19"):
        metric("inception-score-random", weights).reduce(scores(19))
