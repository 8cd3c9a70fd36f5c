"""What the denoiser is shown while its ranges are measured, when the user names nothing better."""

from __future__ import annotations

from collections.abc import Sequence

# Short captions of everyday things, in a few styles: broad enough to reach most text directions.
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
)


def builtin_labels(known: Sequence[int], count: int = len(BUILTIN_PROMPTS)) -> tuple[int, ...]:
    """`count` class labels spread evenly over the known ones (all of them where there are fewer)."""
    count = min(count, len(known))
    return tuple(known[index * len(known) // count] for index in range(count))
