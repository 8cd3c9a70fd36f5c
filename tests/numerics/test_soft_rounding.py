from __future__ import annotations

import pytest
import torch

from qdiff.numerics.soft_rounding import SoftRounding


def soft(start, steps=100, regularization=1.0):
    return SoftRounding(start, steps, regularization, warm_start=0.2, learning_rate=0.1)


def test_starts_where_it_is_told_to():
    start = torch.tensor([0.0, 0.1, 0.5, 0.93, 1.0])
    torch.testing.assert_close(soft(start).h, start)


def test_every_choice_is_made_in_the_end():
    rounding = soft(torch.linspace(0.05, 0.95, 10), steps=300)
    for _ in range(300):
        rounding.step(torch.zeros(10))
    assert ((rounding.h == 0) | (rounding.h == 1)).all()
    assert rounding.up().tolist() == [False] * 5 + [True] * 5  # to the nearer, where the loss does not care


def test_the_loss_is_heard_before_the_regularizer():
    rounding = soft(torch.full((2,), 0.5), steps=200)
    for _ in range(200):
        rounding.step(torch.tensor([3.0, -3.0]))
    assert rounding.h.tolist() == [0, 1]


@pytest.mark.parametrize("taken", [30, 60, 95])
def test_pull_is_the_slope_of_the_papers_regularizer(taken):
    """lambda sum 1 - |2 h - 1|^beta, beta from 20 to 2, by autograd."""
    rounding = soft(torch.linspace(0.05, 0.95, 12), regularization=2.0)
    rounding._taken = taken
    progress = torch.tensor((taken / 100 - 0.2) / 0.8)
    beta = 2 + 18 * (1 + torch.cos(torch.pi * progress)) / 2
    h = rounding.h.clone().requires_grad_()
    with torch.enable_grad():
        (2.0 * (1 - (2 * h - 1).abs() ** beta).sum()).backward()
    torch.testing.assert_close(rounding._pull(), h.grad)


def test_nothing_pulls_before_the_warm_start_is_over():
    rounding = soft(torch.tensor([0.3]))
    rounding._taken = 20
    assert rounding._pull() == 0


def test_steps_are_those_of_torchs_adam():
    start = torch.linspace(0.2, 0.8, 6)
    rounding = SoftRounding(start, 1000, 1.0, warm_start=0.9, learning_rate=0.1)
    reference = rounding.v.clone().requires_grad_()
    optimizer = torch.optim.Adam([reference], lr=0.1, eps=1e-12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        slope = torch.randn(6, generator=generator)
        with torch.enable_grad():
            h = (reference.sigmoid() * 1.2 - 0.1).clamp(0, 1)
            optimizer.zero_grad()
            (h * slope).sum().backward()
        optimizer.step()
        rounding.step(slope)
    torch.testing.assert_close(rounding.v, reference.detach())
