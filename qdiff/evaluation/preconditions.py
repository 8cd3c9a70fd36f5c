"""What can be refused before anything is drawn: misfit requests, and too few or too small pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qdiff.evaluation.entries import Entry
from qdiff.evaluation.generation import Generation, call_arguments
from qdiff.evaluation.pictures import picture_size
from qdiff.evaluation.pipeline_facts import facts_of
from qdiff.evaluation.prompts import Item
from qdiff.evaluation.sources import PipelineSource, Source

if TYPE_CHECKING:
    from qdiff.evaluation.metrics.contract import Metric

Size = tuple[int, int]  # width and height in pixels


def check_requests(sources: Mapping[str, Source], items: Sequence[Item], generation: Generation) -> None:
    """Refuse items and settings that a pipeline does not take.

    Raises:
        ValueError: text for a pipeline that takes class labels or the reverse, a class label that it does not have, or
            a setting that it has no argument for.
    """
    for name, source in sources.items():
        if not isinstance(source, PipelineSource):
            continue
        facts = facts_of(source)
        if facts.kind is not None:
            call_arguments(facts.kind, items, generation)
        labels = [item for item in items if isinstance(item.prompt, int)]
        wrong = next((item for item in labels if facts.classes is not None and item.prompt >= facts.classes), None)  # type: ignore[operator]
        if wrong is not None:
            raise ValueError(
                f"class labels must be below {facts.classes}, the number of classes of {name}: item {wrong.index} has "
                f"{wrong.prompt}"
            )


def check_pictures(
    metrics: Sequence[Metric],
    sources: Mapping[str, Source],
    entries: Mapping[str, Sequence[Entry]],
    generation: Generation,
    reference: str,
) -> None:
    """Refuse pictures that are too few or too small for a metric, and pairs of two sizes, as far as sizes are known.

    reference: the name of the source that the others are paired with, where metrics need pairs.

    Raises:
        ValueError: these, or a file of a folder that is no picture.
    """
    sizes = {name: _sizes(source, entries[name], generation) for name, source in sources.items()}
    for metric in metrics:
        for name, source in sources.items():
            if len(entries[name]) < metric.minimum_pictures:
                raise ValueError(
                    f"{metric.name} needs {metric.minimum_pictures} pictures or more: {name} has "
                    f"{len(entries[name])}; leave it out, or give more prompts or pictures"
                )
            for entry, size in zip(entries[name], sizes[name]):
                if size is not None and min(size) < metric.minimum_side:
                    raise ValueError(
                        f"{metric.name} needs pictures of {metric.minimum_side} pixels a side or more: "
                        f"{_whose(source, entry)} {_text(size)}; leave it out, or use larger pictures"
                    )
    if any(metric.needs_reference for metric in metrics):
        for name in sources.keys() - {reference}:
            _check_pairs(sources, entries, sizes, name, reference)


def _check_pairs(
    sources: Mapping[str, Source],
    entries: Mapping[str, Sequence[Entry]],
    sizes: Mapping[str, Sequence[Size | None]],
    name: str,
    reference: str,
) -> None:
    for index, (own, other) in enumerate(zip(sizes[name], sizes[reference])):
        if own is not None and other is not None and own != other:
            first, second = (_whose(sources[one], entries[one][index]) for one in (name, reference))
            raise ValueError(
                f"pairs must have one size: {first} {_text(own)}, {second} {_text(other)}; draw both at the same size"
            )


def _sizes(source: Source, entries: Sequence[Entry], generation: Generation) -> list[Size | None]:
    if not isinstance(source, PipelineSource):
        return [picture_size(entry.path) for entry in entries]
    side = facts_of(source).side
    width, height = generation.width or side, generation.height or side
    return [None if width is None or height is None else (width, height)] * len(entries)


def _whose(source: Source, entry: Entry) -> str:
    return f"{source.name} draws" if isinstance(source, PipelineSource) else f"{entry.path} is"


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
