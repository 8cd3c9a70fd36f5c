"""emoji-sd before and after quantization, on 2,000 pictures: `assets/benchmarks/evaluation.json`, the README's table.

    python scripts/build_emoji_dataset.py                      # the real icons; without them no distance to them
    pip install --no-deps sdnq==0.2.8                          # the peer; without it no row of it
    python scripts/evaluate_assets.py --readme README.md       # one GPU
    accelerate launch --num_processes 4 scripts/evaluate_assets.py --readme README.md

The 500 held-out names in all four styles, 20 DDIM steps, guidance 4, each picture from the noise of its own seed,
paired with that of the full-precision pipeline. Figures: PSNR, SSIM, LPIPS where its weights are found (--weights),
the Frechet distance over EfficientNet-Lite0's features to the full-precision pictures, and to the 6,540 real icons: of
that, the change from full precision. By style and by category: the worst one, the gap, and a permutation test.

Killed and run again it goes on where it was. Pictures, and the page to look at: out/assets/report.html.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from board.peers import Peer, all_peers, bytes_of, quantized
from board.table import into_readme
from diffusers import DiffusionPipeline

import qdiff
from qdiff.evaluation import evaluate
from qdiff.evaluation.builtin_prompts import builtin_prompts
from qdiff.evaluation.generation import Generation
from qdiff.evaluation.measuring import row_folder
from qdiff.evaluation.metrics import metric
from qdiff.evaluation.metrics.gaussian_influence import influences
from qdiff.evaluation.metrics.statistics import Statistics
from qdiff.evaluation.plan import make_plan
from qdiff.evaluation.processes import Processes, this_process
from qdiff.evaluation.prompts import Item
from qdiff.evaluation.report import Record, Report
from qdiff.evaluation.rows import read_rows
from qdiff.evaluation.weights import MissingWeightsError, Weights
from qdiff.plugin.structure import find_denoiser

MARKER = "<!-- figures: scripts/evaluate_assets.py -->"
FULL, PEER, DISTANCE = "full precision", "SDNQ int4", "fd-efficientnet-lite0"
RECIPES = ("w4a8", "naive")
STEPS, GUIDANCE = 20, 4.0


def main() -> None:
    arguments = parse_arguments()
    processes = this_process()
    # As the leaderboard computes: float32 convolutions in float32.
    torch.backends.cudnn.allow_tf32 = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of calibration; what matters is in the report
        candidates = make_candidates(arguments, processes)
    settings = {"dtype": arguments.dtype, "accelerator": processes, "offline": True, "weights": arguments.weights}
    settings |= {"steps": STEPS, "guidance_scale": GUIDANCE, "batch_size": arguments.batch, "out": arguments.out}
    items = {name: builtin_prompts(name, arguments.assets)[: arguments.count] for name in SETS}
    reference = arguments.assets / "emoji-sd"
    names = ["psnr", "ssim", *([LPIPS] if has_weights(LPIPS, arguments.weights) else []), DISTANCE]
    alone = {"costs": False, "drift": 0}
    # Groups of the one set are its second name; the pictures are the same and are not drawn again.
    categories = evaluate(reference, candidates, items[CATEGORIES], ["psnr"], **settings, **alone)
    to_icons = changes = ()
    if (arguments.data / "icons.npz").is_file():
        everything = {FULL: reference, **candidates}
        icons = icon_statistics(arguments, processes)
        to_icons = evaluate(icons, everything, items[STYLES], [DISTANCE], **settings, **alone).records
        changes = distance_changes(icons, everything, items[STYLES], arguments, processes)
    report = evaluate(reference, candidates, items[STYLES], names, costs=arguments.costs, **settings)
    if processes.is_main_process:
        extra = [*by_category(categories), *(renamed(to_icons)), *changes]
        write(report, extra, candidates, arguments)


STYLES, CATEGORIES = SETS = ("emoji-sd-styles", "emoji-sd-categories")
LPIPS = "lpips-alex"
TO_ICONS = "fd_to_icons_efficientnet_lite0"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="the real icons")
    parser.add_argument("--out", type=Path, default=Path("out/assets"))
    parser.add_argument("--json", type=Path, default=Path("assets/benchmarks/evaluation.json"))
    parser.add_argument("--readme", type=Path, help=f"put the table between the two markers {MARKER} of this file")
    parser.add_argument("--weights", type=Path, help="a folder of weights for LPIPS")
    parser.add_argument("--count", type=int, help="only so many pictures; default: all 2,000")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"), help="of everything")
    parser.add_argument("--no-costs", dest="costs", action="store_false", help="leave out time, memory and energy")
    return parser.parse_args()


def make_candidates(arguments: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    """Quantized once, by one process, and saved; the peer's in memory, as it cannot be saved by us."""
    folders = {name: arguments.out / "quantized" / name for name in RECIPES}
    if processes.is_main_process:
        for name, folder in folders.items():
            if not (folder / "qdiff.json").is_file():
                pipe = load(arguments).to(processes.device)
                qdiff.save(qdiff.quantize_pipeline(pipe, recipe=name, progress=False).to("cpu"), folder)
    processes.wait_for_everyone()
    candidates: dict[str, Any] = dict(folders)
    pipe = load(arguments)
    name, denoiser = find_denoiser(pipe)
    try:
        setattr(pipe, name, quantized(peer(), copy.deepcopy(denoiser)))
    except ImportError as error:
        if processes.is_main_process:
            print(f"{PEER} is left out: {error}")
    else:
        candidates[PEER] = pipe.to(processes.device)
    return candidates


def peer() -> Peer:
    return next(peer for peer in all_peers() if peer.label == PEER)


def load(arguments: argparse.Namespace) -> DiffusionPipeline:
    dtypes = {"float32": torch.float32, "float16": torch.float16}
    pipe = DiffusionPipeline.from_pretrained(str(arguments.assets / "emoji-sd"), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtypes[arguments.dtype])


def has_weights(name: str, folder: Path | None) -> bool:
    try:
        metric(name, Weights(folder, offline=True))
    except (MissingWeightsError, ImportError) as error:
        print(f"{name} is left out: {error}")
        return False
    return True


def icon_statistics(arguments: argparse.Namespace, processes: Processes) -> Statistics:
    """Of all real icons, made once by one process."""
    path = arguments.out / "icons.npz"
    if processes.is_main_process and not path.is_file():
        features = metric(DISTANCE, device=processes.device)
        pictures = torch.from_numpy(np.load(arguments.data / "icons.npz")["images"]).permute(0, 3, 1, 2)
        rows = np.concatenate([features.rows(batch).numpy() for batch in pictures.split(arguments.batch)])
        Statistics.of_rows(rows, features.feature_key, features.provenance()).save(path)
    processes.wait_for_everyone()
    return Statistics.load(path)


def distance_changes(
    icons: Statistics,
    candidates: dict[str, Any],
    items: Sequence[Item],
    arguments: argparse.Namespace,
    processes: Processes,
) -> list[Record]:
    """How much further from the real icons than full precision; pictures of one item are resampled together."""
    if not processes.is_main_process:
        return []
    found = metric(DISTANCE)
    generation = Generation(STEPS, GUIDANCE, arguments.batch)
    device = processes.device.type
    plan = make_plan(icons, candidates, items, [found], generation, arguments.out, device, arguments.dtype)
    distances, moves = {}, {}
    for name, source in plan.sources.items():
        with tempfile.TemporaryFile() as file:
            keys = [entry.key for entry in plan.entries[name]]
            rows = read_rows(row_folder(arguments.out, found, source.id, None)).ordered(keys, file)
            kept = np.ones(len(rows), dtype=bool)
            distances[name] = found.reduce(rows, icons, {"candidate": name})[0]
            own = Statistics.of_rows(rows, found.feature_key)
            (moves[name],) = influences(own, icons, (rows, kept))
    return [
        Record.smooth(
            f"{TO_ICONS}_change", record.value - distances[FULL].value, moves[name] - moves[FULL], candidate=name
        ).sourced(record.provenance)
        for name, record in distances.items()
        if name != FULL
    ]


def by_category(report: Report) -> list[Record]:
    """What the second set of groups adds; everything else of it is in the first report already."""
    return [
        dataclasses.replace(record, tags={**record.tags, "grouping": "category"})
        for record in report.records
        if "group" in record.tags or "_group" in record.name
    ]


def renamed(records: Sequence[Record]) -> list[Record]:
    reference = {FULL: "reference"}
    return [
        dataclasses.replace(record, name=TO_ICONS, tags={"candidate": reference.get(name, name)})
        for record in records
        if record.name == DISTANCE.replace("-", "_") and (name := record.tags["candidate"])
    ]


def write(report: Report, extra: Sequence[Record], candidates: dict[str, Any], arguments: argparse.Namespace) -> None:
    records = [*report.records, *extra]
    if PEER in candidates:  # counted as the leaderboard counts: of a float16 denoiser, each tensor as it is kept
        _, denoiser = find_denoiser(load(arguments))
        records = [r for r in records if (r.name, r.tags.get("candidate")) != ("stored_bytes", PEER)]
        records.append(Record.exact("stored_bytes", bytes_of(peer(), denoiser), candidate=PEER))
    date = {"date": datetime.date.today().isoformat(), "gpu": device_name()}
    # Pictures stay where they were made; what is committed has the figures alone.
    whole = dataclasses.replace(report, records=tuple(records), settings={**report.settings, **date}, pairs=())
    whole.write(arguments.json)
    text = table(whole, candidates)
    if arguments.readme:
        into_readme(arguments.readme, text, MARKER)
    print(text)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


COLUMNS = (
    ("PSNR, dB", "psnr_db", "{:.2f}"),
    ("SSIM", "ssim", "{:.4f}"),
    ("LPIPS", "lpips_alex", "{:.4f}"),
    ("FD to full precision", "fd_efficientnet_lite0", "{:.2f}"),
    ("FD to the icons, change", f"{TO_ICONS}_change", "{:+.2f}"),
    ("worst style, dB", "psnr_db_worst_group", "{:.2f}"),
    ("gap, dB", "psnr_db_group_gap", "{:.2f}"),
)


def table(report: Report, candidates: Sequence[str] | dict[str, Any]) -> str:
    """A row a candidate: each figure with its 95 % interval; columns that nobody has a figure for are left out."""
    figures = {name: {r.name: r for r in report.records if is_whole(r, name)} for name in candidates}
    columns = [column for column in COLUMNS if any(column[1] in found for found in figures.values())]
    lines = [f"| | bytes | {' | '.join(title for title, _, _ in columns)} |", "|" + " --- |" * (2 + len(columns))]
    reference = {r.name: r for r in report.records if is_whole(r, "reference")}
    for name, found in figures.items():
        cells = [shown(found.get(key), pattern) for _, key, pattern in columns]
        lines.append(f"| {name} | {shown_bytes(found, reference)} | {' | '.join(cells)} |")
    if TO_ICONS in reference:
        lines += ["", f"Full precision is {shown(reference[TO_ICONS], '{:.2f}')} from the real icons."]
    return "\n".join(lines)


def is_whole(record: Record, candidate: str) -> bool:
    return record.tags.get("candidate") == candidate and not {"group", "grouping"} & record.tags.keys()


def shown(record: Record | None, pattern: str) -> str:
    if record is None:
        return ""
    low, high = pattern.format(record.low), pattern.format(record.high)
    return f"{pattern.format(record.value)} ({low} to {high})"


def shown_bytes(found: dict[str, Record], reference: dict[str, Record]) -> str:
    own, full = found.get("stored_bytes"), reference.get("stored_bytes")
    return f"{own.value / full.value:.3f}" if own and full else ""


if __name__ == "__main__":
    main()
