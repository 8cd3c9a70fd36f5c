from __future__ import annotations

import warnings

import pytest
import torch

from qdiff.numerics.cholesky import damped_upper_factor


def test_factor_is_upper_and_its_square_the_damped_moment():
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    hessian = x.T @ x / 200
    given = hessian.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factor = damped_upper_factor(given, 0.1, "it")
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor @ factor.T, hessian + 0.1 * torch.eye(12))
    torch.testing.assert_close(given, hessian + 0.1 * torch.eye(12))


def test_damping_grows_tenfold_and_is_reported_until_there_is_a_factor():
    indefinite = torch.eye(4)
    indefinite[0, 1] = indefinite[1, 0] = 1.5
    with pytest.warns(UserWarning, match="this moment") as said:
        factor = damped_upper_factor(indefinite, 0.01, "this moment")
    assert [str(one.message) for one in said] == [
        f"this moment is singular; damped by {damping} of its mean diagonal instead of 0.01" for damping in (0.1, 1)
    ]
    torch.testing.assert_close((factor @ factor.T).diagonal(), torch.full((4,), 2.0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_damping_mends_what_is_not_finite(value):
    hessian = torch.eye(4)
    hessian[2, 2] = value
    with pytest.raises(ValueError, match="this moment must be finite: got NaN or infinite values"):
        damped_upper_factor(hessian, 0.01, "this moment")
