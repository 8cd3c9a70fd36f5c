"""Weights are read early by no call but those after one that waited for them as they are now."""

from __future__ import annotations

import gc

import pytest
import torch

from qdiff.ops import _settled
from qdiff.ops._settled import settled


@pytest.fixture(autouse=True)
def nothing_read():
    _settled.forget()
    yield
    _settled.forget()


def test_the_first_call_waits_and_later_ones_do_not():
    weights = torch.zeros(4), torch.zeros(2)
    assert not settled(weights)
    assert settled(weights)
    assert settled(weights[1:])


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.add_(1),
        lambda weight: weight[1:].zero_(),  # by a view
        lambda weight: weight.detach().fill_(3),
        lambda weight: weight.copy_(torch.ones(4)),
        lambda weight: setattr(weight, "data", torch.ones(4)),
    ],
    ids=["in place", "a view", "detached", "copy", "data"],
)
def test_a_call_after_a_change_waits(change, place):
    weights = torch.zeros(4), torch.zeros(4)
    settled(weights)
    change(weights[place])
    assert not settled(weights)
    assert settled(weights)


def test_a_loaded_state_is_waited_for():
    layer = torch.nn.Linear(3, 2)
    settled((layer.weight,))
    layer.load_state_dict(torch.nn.Linear(3, 2).state_dict())
    assert not settled((layer.weight,))


def test_another_tensor_in_the_same_place_is_waited_for():
    storage = torch.zeros(8)
    first = storage[:4]
    settled((first,))
    del first
    gc.collect()
    assert not _settled._read
    assert not settled((storage[:4],))  # perhaps with the identity of the one before


def test_copies_are_waited_for():
    weight = torch.nn.Parameter(torch.zeros(4))
    settled((weight,))
    assert not settled((weight.clone(),))
    assert not settled((weight.to(torch.float64).to(torch.float32),))


def test_nothing_is_taken_for_read_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    weights = (torch.zeros(4),)
    assert not settled(weights)
    assert not settled(weights)


def test_tensors_without_versions_are_always_waited_for():
    with torch.inference_mode():
        weights = (torch.zeros(4),)
    assert not settled(weights)
    assert not settled(weights)
