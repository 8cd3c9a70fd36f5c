import json

import pytest
import torch

from qdiff.calibration import Calibration
from qdiff.demo.measure import DemoSettings, demo_inputs, generate, replayed_rows


@pytest.fixture
def assets(tiny_sd, tiny_dit, tmp_path):
    for name, pipe in (("emoji-sd", tiny_sd()), ("emoji-dit", tiny_dit())):
        pipe.save_pretrained(tmp_path / name)
    captions = [{"caption": f"red apple {index}, noto style", "name": "", "style": ""} for index in range(5)]
    (tmp_path / "emoji-heldout.json").write_text(json.dumps(captions))
    return tmp_path


def settings(assets, **changes):
    return DemoSettings(
        assets, **{"count": 3, "steps": 2, "calibration": Calibration(["red apple"], steps=2)} | changes
    )


def test_captions_are_held_out_ones_drawn_the_same_every_time(assets, tiny_sd):
    inputs = demo_inputs(tiny_sd(), settings(assets))
    held_out = {entry["caption"] for entry in json.loads((assets / "emoji-heldout.json").read_text())}
    assert len(inputs) == 3
    assert set(inputs.values()) <= held_out
    assert inputs == demo_inputs(tiny_sd(), settings(assets))
    assert list(inputs) != list(demo_inputs(tiny_sd(), settings(assets, seed=1)))


def test_more_pictures_than_captions_takes_them_all(assets, tiny_sd):
    assert len(demo_inputs(tiny_sd(), settings(assets, count=9))) == 5


def test_class_labels_go_by_their_names(assets, tiny_dit):
    inputs = demo_inputs(tiny_dit(), settings(assets))
    assert all(caption == f"thing {index}" for caption, index in inputs.items())
    assert len(inputs) == 3


@pytest.mark.parametrize("guidance", [4.0, 1.0], ids=["guided", "unguided"])
def test_replayed_rows_are_of_the_first_pictures(assets, guidance):
    rows = replayed_rows(3, settings(assets, replayed=2, guidance=guidance))
    assert rows == ([0, 1, 3, 4] if guidance > 1 else [0, 1])


def test_a_picture_does_not_depend_on_the_others(assets, tiny_sd):
    together = generate(tiny_sd(), ["red apple", "green cat"], settings(assets))
    alone = generate(tiny_sd(), ["red apple"], settings(assets))
    # Another batch size: float32 sums in another order.
    torch.testing.assert_close(together.pictures[:1], alone.pictures, atol=1e-4, rtol=0)
    assert [tuple(step.shape) for step in together.latents] == [(2, 4, 8, 8)] * 2


@pytest.mark.parametrize("field", ["count", "steps", "replayed"])
def test_counts_below_one_are_refused(assets, field):
    with pytest.raises(ValueError, match=f"{field} must be 1 or more: got 0"):
        settings(assets, **{field: 0})
