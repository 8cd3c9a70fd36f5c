"""What the denoiser is shown while its ranges are measured, when the user names nothing better."""

from __future__ import annotations

from collections.abc import Sequence

# Short captions of everyday things, in a few styles: broad enough to reach most text directions. Measured with the
# default recipe on an H200: 64 of them at 10 steps leave 7.4 % of denoiser error on emoji-sd and 4.4 % on emoji-dit (64
# labels), where 16 at 20 steps left 8.0 and 5.0 %, and 32 at 20 steps, for as many calls, 7.9 and 4.6 %.
BUILTIN_PROMPTS = (
    "a red apple, noto style",
    "a cat sleeping on a chair, fluent style",
    "a blue car, twemoji style",
    "a mountain under a yellow sun",
    "a slice of pizza, fluent flat style",
    "a smiling face with glasses",
    "a tall building at night, noto style",
    "a bunch of flowers, fluent style",
    "a musical instrument, twemoji style",
    "an airplane in the sky",
    "a green tree with fruit, noto style",
    "a portrait of an old man, detailed",
    "a fish, fluent flat style",
    "a flag, twemoji style",
    "a person riding a bicycle",
    "a wooden box, fluent style",
    "a steaming cup of coffee, noto style",
    "a cabin in a winter forest, photograph",
    "a butterfly with open wings, fluent style",
    "a king in a golden crown",
    "an old sailing ship on rough water, oil painting",
    "a pair of running shoes, twemoji style",
    "a bowl of noodles with chopsticks, fluent flat style",
    "a thunderstorm over a field, dramatic light",
    "a kitchen knife on a board, noto style",
    "a robot waving its hand, fluent style",
    "a loudspeaker, twemoji style",
    "a clock that shows three, fluent flat style",
    "a portrait of a young woman, soft light",
    "a purple heart with a ribbon, noto style",
    "a dog running on a beach, photograph",
    "a train crossing a bridge, twemoji style",
    "a stack of books, fluent style",
    "a bright star among clouds, fluent flat style",
    "a crowded market street in the rain",
    "a blue bird on a branch, noto style",
    "a hand that points upwards, twemoji style",
    "an electric guitar, fluent style",
    "a castle on a hill, watercolour",
    "a warning sign, black on yellow, noto style",
    "a glass of orange juice, fluent flat style",
    "a crying face, twemoji style",
    "an astronaut on the moon, cinematic",
    "a bicycle leaning on a brick wall, photograph",
    "a chess board from above, fluent style",
    "a red balloon, noto style",
    "a woman in a white coat, fluent flat style",
    "a dinosaur, twemoji style",
    "the letter Z in a square, noto style",
    "a basket of fresh bread, still life",
    "a rocket between planets, fluent style",
    "a tiger in tall grass, photograph",
    "a green leaf, fluent flat style",
    "a mobile phone with an arrow, twemoji style",
    "a family of four holding hands",
    "a modern living room, wide angle",
    "a trophy cup, noto style",
    "a slice of cake with a cherry, fluent style",
    "a desert road at sunset, photograph",
    "a shield with a cross, fluent flat style",
    "a magnifying glass, twemoji style",
    "an elephant drinking from a river, pencil drawing",
    "a baseball cap, noto style",
    "a city skyline reflected in a lake",
)


def builtin_labels(known: Sequence[int], count: int = len(BUILTIN_PROMPTS)) -> tuple[int, ...]:
    """`count` class labels spread evenly over the known ones (all of them where there are fewer)."""
    count = min(count, len(known))
    return tuple(known[index * len(known) // count] for index in range(count))
