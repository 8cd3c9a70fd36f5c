"""Prompt sets for the pipelines in `assets/`, by name; nothing of them is picked by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

from qdiff.evaluation.prompts import Item

STYLES = ("noto", "fluent", "flat", "twemoji")
HELD_OUT = "emoji-heldout.json"
PICTURES_A_CLASS = 10


def builtin_prompts(name: str, assets: Path) -> tuple[Item, ...]:
    """Return a built-in set; the first n items of any are a fair sample of it.

    emoji-sd-held-out: the 500 captions that emoji-sd was not trained on; the group is the icon's style.
    emoji-sd-held-out-categories: the same captions and seeds, by the icon's category.
    emoji-sd-styles, emoji-sd-categories: the names of these 500 in all four styles: 2,000 captions, of which 1,500 were
    trained on.
    emoji-dit-classes: every class of emoji-dit ten times; the group is its category.

    assets: the project's assets folder.

    Raises:
        ValueError: no set of this name.
        FileNotFoundError: the folder does not have what the set is made of.
    """
    if name not in SETS:
        raise ValueError(f"prompts must be a file, or a built-in set ({', '.join(SETS)}): got {name!r}")
    return tuple(
        Item(index, prompt, index, group) for index, (prompt, group) in enumerate(SETS[name](_checked(assets)))
    )


def _checked(assets: Path) -> Path:
    if not (assets / HELD_OUT).is_file():
        raise FileNotFoundError(f"no {HELD_OUT} in {assets}: the built-in prompt sets need a checkout's assets folder")
    return assets


Prompts = Iterable[tuple[str | int, str]]


def _held_out(group: str) -> Callable[[Path], Prompts]:
    def prompts(assets: Path) -> Prompts:
        entries = json.loads((assets / HELD_OUT).read_text(encoding="utf-8"))
        random.Random(0).shuffle(entries)
        return [(entry["caption"], entry[group]) for entry in entries]

    return prompts


def _all_styles(group: str) -> Callable[[Path], Prompts]:
    def prompts(assets: Path) -> Prompts:
        entries = json.loads((assets / HELD_OUT).read_text(encoding="utf-8"))
        random.Random(0).shuffle(entries)
        return [
            (f"{entry['caption'].rpartition(',')[0]}, {style} style", style if group == "style" else entry[group])
            for entry in entries
            for style in STYLES
        ]

    return prompts


def _classes(assets: Path) -> Prompts:
    index = json.loads((assets / "emoji-dit" / "model_index.json").read_text(encoding="utf-8"))
    labels = {int(label): name for label, name in index["id2label"].items()}
    order = list(labels) * PICTURES_A_CLASS
    return [(label, labels[label].rpartition(" · ")[0]) for label in order]


SETS: dict[str, Callable[[Path], Prompts]] = {
    "emoji-sd-held-out": _held_out("style"),
    "emoji-sd-held-out-categories": _held_out("group"),
    "emoji-sd-styles": _all_styles("style"),
    "emoji-sd-categories": _all_styles("group"),
    "emoji-dit-classes": _classes,
}
