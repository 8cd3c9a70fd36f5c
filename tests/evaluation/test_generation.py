from types import SimpleNamespace

import pytest
import torch

from qdiff.evaluation.generation import Generation, call_arguments, draw
from qdiff.evaluation.prompts import Item, items_of

GENERATION = Generation(steps=2, guidance_scale=3.0)


def test_a_picture_does_not_depend_on_its_batch(tiny_sd):
    pipe, items = tiny_sd(), items_of(["red cat", "green house", "apple"])
    together = draw(pipe, items, GENERATION)
    assert together.pictures.shape == (3, 3, 16, 16)
    assert together.pictures.dtype == torch.uint8
    assert together.finite.all()
    alone = draw(pipe, items[2:], GENERATION)
    # Another batch size rounds float32 sums otherwise: one level of 255, at most.
    assert (together.pictures[2].int() - alone.pictures[0].int()).abs().max() <= 1


def test_the_seed_and_nothing_else_is_the_noise(tiny_sd):
    pipe = tiny_sd()
    one = draw(pipe, [Item(0, "red cat", 5)], GENERATION).pictures
    torch.manual_seed(1)
    assert torch.equal(draw(pipe, [Item(7, "red cat", 5)], GENERATION).pictures, one)
    assert not torch.equal(draw(pipe, [Item(0, "red cat", 6)], GENERATION).pictures, one)


def test_class_labels_and_negative_prompts_are_handed_over(tiny_sd, tiny_dit):
    assert draw(tiny_dit(), items_of([3, 5]), GENERATION).pictures.shape == (2, 3, 16, 16)
    items = [Item(0, "red cat", 0, negative_prompt="house"), Item(1, "apple", 1)]
    assert call_arguments(type(tiny_sd()), items, GENERATION)["negative_prompt"] == ["house", ""]
    plain = [Item(0, "red cat", 0), Item(1, "apple", 1)]
    assert not torch.equal(*(draw(tiny_sd(), some, GENERATION).pictures[0] for some in (items, plain)))


def test_nan_is_seen(tiny_sd):
    pipe = tiny_sd()
    broken = pipe.unet.conv_out.register_forward_hook(
        lambda module, args, output: torch.cat([output[:1] * float("nan"), output[1:]])
    )
    drawn = draw(pipe, items_of(["red cat", "apple"]), Generation(steps=2, guidance_scale=1.0))
    broken.remove()
    assert drawn.finite.tolist() == [False, True]
    assert not drawn.pictures[0].any()


@pytest.mark.parametrize(
    ("items", "settings", "message"),
    [
        pytest.param([Item(0, 3, 0)], {}, "takes texts for prompts: item 0 has 3", id="label-for-text"),
        pytest.param([Item(0, "a", 0)], {"steps": 0}, "steps must be 1 or more", id="steps"),
    ],
)
def test_items_that_do_not_fit_are_refused(tiny_sd, items, settings, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_sd(), items, Generation(**settings))


def test_a_class_conditional_pipeline_refuses_what_it_cannot_take(tiny_dit):
    with pytest.raises(ValueError, match="takes class labels"):
        call_arguments(type(tiny_dit()), [Item(0, "a cat", 0)], GENERATION)
    with pytest.raises(ValueError, match="no negative prompt"):
        call_arguments(type(tiny_dit()), [Item(0, 3, 0, negative_prompt="x")], GENERATION)
    with pytest.raises(ValueError, match="height"):
        call_arguments(type(tiny_dit()), [Item(0, 3, 0)], Generation(height=64))


def test_an_output_that_is_no_picture_is_refused():
    class Video:
        def __call__(self, prompt, num_inference_steps, generator, output_type):
            return SimpleNamespace(images=torch.zeros(1, 5, 3, 8, 8))

    with pytest.raises(ValueError, match="Video must return 1 colour pictures"):
        draw(Video(), [Item(0, "a", 0)], Generation())


def test_keys_change_with_what_is_drawn_and_not_with_the_batch():
    item, where = Item(3, "a cat", 3), ("cpu", "auto")
    key = GENERATION.key(item, "id", where)
    assert key == Generation(2, 3.0, batch_size=64).key(Item(0, "a cat", 3, group="pets"), "id", where)
    others = [
        GENERATION.key(Item(3, "a dog", 3), "id", where),
        GENERATION.key(Item(3, "a cat", 4), "id", where),
        GENERATION.key(Item(3, "a cat", 3, negative_prompt="x"), "id", where),
        GENERATION.key(item, "other", where),
        GENERATION.key(item, "id", ("cuda", "auto")),
        Generation(3, 3.0).key(item, "id", where),
        Generation(2, 4.0).key(item, "id", where),
    ]
    assert len({key, *others}) == 1 + len(others)
