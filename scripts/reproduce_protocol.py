"""The literature's protocols on pipelines of yours: what each needs, how long it takes here, and the run itself.

    python scripts/reproduce_protocol.py --list
    python scripts/reproduce_protocol.py coco-10k REFERENCE w4a8=CANDIDATE --captions captions.csv --estimate
    accelerate launch scripts/reproduce_protocol.py coco-10k REFERENCE w4a8=CANDIDATE --captions captions.csv

The protocols are data, in scripts/protocols.py: where each was read, and what could not be confirmed, is printed by
--list. Nothing of them is shipped: captions (a .txt, .csv or .jsonl file), pipelines with their samplers and the
metrics' weights are yours, and --statistics takes the real pictures (a folder, or saved statistics) where distances are
to them. Two papers with one protocol's name still differ in captions and reference pictures: compare figures within one
run.

--estimate draws one batch with each pipeline, prints the hours that a run would take on this machine, and ends.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from protocols import LABELS, PROTOCOLS, Protocol

from qdiff.cli import candidate_names
from qdiff.evaluation import evaluate
from qdiff.evaluation.generation import Generation, draw
from qdiff.evaluation.markdown import markdown
from qdiff.evaluation.processes import this_process
from qdiff.evaluation.prompts import Item, read_prompts
from qdiff.evaluation.sources import PipelineSource, source_of
from qdiff.evaluation.timing import wait_for

CLASSES = 1000


def main() -> None:
    arguments = parse_arguments()
    if arguments.list or arguments.protocol is None:
        print("\n".join(line for name, protocol in PROTOCOLS.items() for line in needs(name, protocol)))
        return
    protocol = PROTOCOLS[arguments.protocol]
    items = items_of(protocol, arguments.captions)[: arguments.limit]
    candidates = candidate_names(arguments.candidates)
    if arguments.estimate:
        estimate(protocol, items, arguments.reference, candidates, arguments)
        return
    real = arguments.statistics is not None
    if protocol.real and not real:
        raise SystemExit(f"{arguments.protocol} compares with real pictures: name them with --statistics")
    metrics = list(arguments.metrics.split(",") if arguments.metrics else protocol.metrics)
    # Distances to real pictures are of full precision too: it stands among the candidates.
    named = {"full precision": arguments.reference, **candidates} if real else candidates
    settings = {"steps": protocol.steps, "guidance_scale": protocol.guidance_scale, "batch_size": arguments.batch}
    size = {"height": protocol.size, "width": protocol.size} if protocol.subject != LABELS else {}
    report = evaluate(
        arguments.statistics if real else arguments.reference,
        named,
        items,
        metrics,
        out=arguments.out,
        weights=arguments.weights,
        offline=arguments.offline,
        **settings,
        **size,
    )
    if this_process().is_main_process:
        print(markdown(report))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", nargs="?", choices=list(PROTOCOLS))
    parser.add_argument("reference", nargs="?", type=Path, help="the full-precision pipeline's folder")
    parser.add_argument("candidates", nargs="*", help="PATH or NAME=PATH")
    parser.add_argument("--list", action="store_true", help="what each protocol needs")
    parser.add_argument("--estimate", action="store_true", help="how long it would take here")
    parser.add_argument("--captions", type=Path)
    parser.add_argument("--statistics", type=Path, help="a folder of real pictures, or saved statistics (.npz)")
    parser.add_argument("--metrics", help="instead of the protocol's own, separated by commas")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/protocol"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit", type=int, help="only so many pictures: then it is not the protocol any more")
    return parser.parse_args()


def needs(name: str, protocol: Protocol) -> list[str]:
    """What a person must have, and how much there is to draw."""
    real = "; real pictures or their statistics" if protocol.real else ""
    rows = protocol.pictures * protocol.steps * protocol.passes
    return [
        f"{name}: {protocol.source}",
        f"    {protocol.pictures:,} pictures of {protocol.size} pixels a side; {protocol.sampler}, "
        f"{protocol.steps} steps, guidance {protocol.guidance_scale:g}",
        f"    {rows:,} rows through the denoiser, for each pipeline",
        f"    needs {protocol.pictures:,} {protocol.subject}{real}; metrics: {', '.join(protocol.metrics)}",
        f"    not confirmed, or otherwise here: {protocol.open}",
    ]


def items_of(protocol: Protocol, captions: Path | None) -> Sequence[Item]:
    """Class labels, equally many of each class; or as many captions as the protocol asks for."""
    if protocol.subject == LABELS:
        return [Item(index, index % CLASSES, index) for index in range(protocol.pictures)]
    if captions is None:
        raise SystemExit(f"this protocol draws {protocol.pictures:,} captions: name their file with --captions")
    items = read_prompts(captions)
    if len(items) < protocol.pictures:
        raise SystemExit(f"{captions} has {len(items):,} captions, and the protocol needs {protocol.pictures:,}")
    return items[: protocol.pictures]


def estimate(
    protocol: Protocol,
    items: Sequence[Item],
    reference: Path,
    candidates: dict[str, Path],
    arguments: argparse.Namespace,
) -> None:
    """Draw one batch to warm up and one to measure, with each pipeline."""
    device, total = this_process().device, 0.0
    size = protocol.size if protocol.subject != LABELS else None
    generation = Generation(protocol.steps, protocol.guidance_scale, arguments.batch, size, size)
    for name, folder in {"full precision": reference, **candidates}.items():
        source = source_of(name, folder)
        if not isinstance(source, PipelineSource):
            continue
        pipe = source.load(device)
        batch = items[: arguments.batch]
        draw(pipe, batch[:1], Generation(2, protocol.guidance_scale, 1, size, size))
        wait_for(device)
        started = time.perf_counter()
        draw(pipe, batch, generation)
        wait_for(device)
        seconds = (time.perf_counter() - started) / len(batch)
        total += seconds * len(items)
        print(f"{name}: {seconds:.3g} s a picture on {device}, {seconds * len(items) / 3600:.2f} h for {len(items):,}")
    print(f"all pipelines: {total / 3600:.2f} h on one such device; metrics go on beside it")


if __name__ == "__main__":
    main()
