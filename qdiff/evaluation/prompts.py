"""What is drawn: prompts or class labels, each with its seed, read from text, CSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "seed", "group", "negative_prompt", "reference")
FORMATS = (".txt", ".csv", ".jsonl")


@dataclass(frozen=True)
class Item:
    """One picture to draw.

    index: its place in the evaluation.  prompt: text, or a class label.  seed: of its initial noise.  group: whom it
    stands for, where figures are compared by group.  reference: a picture to compare with, where the reference is a
    folder.
    """

    index: int
    prompt: str | int
    seed: int
    group: str | None = None
    negative_prompt: str | None = None
    reference: Path | None = None

    @property
    def subject(self) -> str:
        """What the picture is to show, for people: the text, or "class 207"."""
        return self.prompt if isinstance(self.prompt, str) else f"class {self.prompt}"


def read_prompts(path: str | Path) -> tuple[Item, ...]:
    """Return the items of a prompt file.

    .txt: a prompt a line, whole numbers are class labels, blank lines are skipped.  .csv: with a header.  .jsonl: an
    object a line. Columns: prompt (needed), seed, group, negative_prompt, reference (relative to the file's folder);
    an item without a seed has its index for one.

    Raises:
        ValueError: another suffix, no prompt, a line that is malformed (its number is given), texts and class labels
            in one file, or two lines that would draw the same picture.
        OSError: the file cannot be read.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"prompts must be a file of {', '.join(FORMATS)}: got {path.name!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: prompts must be UTF-8 text: {error}") from error
    rows = {".txt": _text_rows, ".csv": _csv_rows, ".jsonl": _jsonl_rows}[path.suffix](path, text)
    numbered = [(line, _item(f"{path}:{line}", index, row, path.parent)) for index, (line, row) in enumerate(rows)]
    if not numbered:
        raise ValueError(f"{path} has no prompt: write one a line")
    _check_alike(path, numbered)
    return tuple(item for _, item in numbered)


def items_of(prompts: Sequence[str | int | Item]) -> tuple[Item, ...]:
    """Return prompts, class labels or items as items; what is no item has its index for a seed.

    Raises:
        ValueError: no prompt.
    """
    if not prompts:
        raise ValueError("prompts must be one or more: got none")
    return tuple(
        Item(index, prompt.prompt, prompt.seed, prompt.group, prompt.negative_prompt, prompt.reference)
        if isinstance(prompt, Item)
        else Item(index, prompt, index)
        for index, prompt in enumerate(prompts)
    )


def _text_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, prompt in enumerate(text.split("\n"), start=1):
        if prompt.strip():
            yield line, {"prompt": prompt.strip()}


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}:{reader.line_num}: got other columns than the header's {reader.fieldnames}")
            yield reader.line_num, {name: value.strip() for name, value in row.items() if value.strip()}
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.reader.line_num}: malformed CSV: {error}") from error


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{line}: malformed JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{line}: expected an object with a prompt: got {content[:60]!r}")
        yield line, {name: value for name, value in row.items() if value is not None}


def _item(where: str, index: int, row: Mapping[str, Any], folder: Path) -> Item:
    if unknown := sorted(row.keys() - set(COLUMNS)):
        raise ValueError(f"{where}: unknown columns {', '.join(unknown)}; known: {', '.join(COLUMNS)}")
    prompt = row.get("prompt", "")
    if isinstance(prompt, str) and prompt.isdecimal():
        prompt = int(prompt)
    if isinstance(prompt, bool) or not isinstance(prompt, str | int) or prompt == "":
        raise ValueError(f"{where}: prompt must be a text or a class label: got {prompt!r}")
    for name in ("group", "negative_prompt", "reference"):
        if name in row and not isinstance(row[name], str):
            raise ValueError(f"{where}: {name} must be a text: got {row[name]!r}")
    reference = row.get("reference")
    return Item(
        index=index,
        prompt=prompt,
        seed=_seed(where, row.get("seed", index)),
        group=row.get("group"),
        negative_prompt=row.get("negative_prompt"),
        reference=None if reference is None else folder / reference,
    )


def _seed(where: str, given: object) -> int:
    seed = int(given) if isinstance(given, str) and given.isdecimal() else given
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"{where}: seed must be a whole number in [0, 2^63): got {given!r}")
    return seed


def _check_alike(path: Path, numbered: Sequence[tuple[int, Item]]) -> None:
    first_line, first = numbered[0]
    seen: dict[tuple[object, ...], int] = {}
    for line, item in numbered:
        if type(item.prompt) is not type(first.prompt):
            kinds = {str: "a text", int: "a class label"}
            raise ValueError(
                f"{path}:{line}: prompt is {kinds[type(item.prompt)]} ({item.prompt!r}), but line {first_line} has "
                f"{kinds[type(first.prompt)]}; a pipeline takes the one or the other"
            )
        key = (item.prompt, item.seed, item.negative_prompt)
        if key in seen:
            raise ValueError(f"{path}:{line}: draws the same picture as line {seen[key]}; give it another seed")
        seen[key] = line
