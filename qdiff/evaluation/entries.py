"""Which picture of a source belongs to which item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qdiff.evaluation.generation import Generation
from qdiff.evaluation.pictures import PictureStore, content_key
from qdiff.evaluation.prompts import Item
from qdiff.evaluation.sources import FolderSource, PipelineSource, Source


@dataclass(frozen=True)
class Entry:
    """A picture that is there or will be drawn: of which item, under which key, in which file."""

    item: Item
    key: str
    path: Path


def entries_of(
    source: Source, items: Sequence[Item] | None, generation: Generation, where: Sequence[str], pictures: Path
) -> list[Entry]:
    """Return an entry for each item, or for each picture of a folder where there are no items.

    where: device and dtype that pictures are drawn with.  pictures: the folder that drawn ones go to.

    Raises:
        ValueError: a pipeline without items, or a folder that lacks an item's picture.
    """
    if isinstance(source, PipelineSource):
        if items is None:
            raise ValueError(f"{source.name} is a pipeline: it needs prompts (or class labels) to draw")
        store = PictureStore(pictures / source.id)
        keys = [generation.key(item, source.id, where) for item in items]
        return [Entry(item, key, store.path(key)) for item, key in zip(items, keys)]
    if items is None:
        return [
            Entry(Item(index, name, index), content_key(path), path)
            for index, (name, path) in enumerate(source.pictures.items())
        ]
    return [Entry(item, content_key(path), path) for item, path in zip(items, _matched(source, items))]


def check_names(reference: FolderSource, candidate: FolderSource) -> None:
    """Refuse two folders whose pictures are to be paired by name and cannot be.

    Raises:
        ValueError: a name that only one of them has.
    """
    only = sorted(reference.pictures.keys() ^ candidate.pictures.keys())
    if only:
        holder, other = (reference, candidate) if only[0] in reference.pictures else (candidate, reference)
        raise ValueError(
            f"paired metrics need the same pictures on both sides: {reference.name} has {len(reference.pictures)}, "
            f"{candidate.name} has {len(candidate.pictures)}; {only[0]} is in {holder.folder} and not in "
            f"{other.folder} ({len(only)} such names)"
        )


def _matched(source: FolderSource, items: Sequence[Item]) -> list[Path]:
    """By the item's reference picture, or else by its index."""
    numbered = {int(name): path for name, path in source.pictures.items() if name.isdecimal()}
    found = []
    for item in items:
        name = str(item.index) if item.reference is None else item.reference.stem
        path = numbered.get(item.index) if item.reference is None else source.pictures.get(name)
        if path is None:
            raise ValueError(
                f"{source.name}: {source.folder} has {len(source.pictures)} pictures, and none called {name} for "
                f"prompt {item.index} ({item.prompt!r}) of {len(items)}; name pictures by the prompt's index (0.png, "
                "1.png, ...), or give the prompts a reference column"
            )
        found.append(path)
    return found
