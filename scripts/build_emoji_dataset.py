"""Draw the emoji data set that the pipelines in `assets/` are trained on: 64x64 icons on white, with captions.

    python scripts/build_emoji_dataset.py --out data/emoji

Needs `npm` (fetches four icon packages; versions are pinned below) and `pip install resvg-py`. Takes about a minute on
two cores. Writes

* `icons.npz`: `images` uint8 [n, 64, 64, 3];
* `icons.json`: per icon its name, style, group and caption ("croissant, noto style"), whether it is held out of
  training, and its class label; plus the list of classes ("Food & Drink, noto style"), and the packages' versions.

Left out: skin-tone variants, hidden duplicates, and names that only one of the sets draws (country flags, mostly), so
that every name can be told from its style. Held out: 500 (name, style) pairs of names drawn in all four styles, one a
name.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import re
import subprocess
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

# style name in the captions -> npm package, version. Licences and attribution: assets/README.md.
PACKAGES = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "fluent": ("@iconify-json/fluent-emoji", "1.2.7"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
}
SIZE = 64
HELD_OUT = 500
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def fetch(package: str, version: str, folder: Path) -> dict[str, dict]:
    """The JSON files of one npm icon package."""
    command = ["npm", "pack", f"{package}@{version}", "--silent", "--pack-destination", str(folder)]
    archive = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1]
    with tarfile.open(folder / archive) as tar:
        return {name: json.load(tar.extractfile(f"package/{name}.json")) for name in ("icons", "metadata")}  # type: ignore[arg-type]


def is_skin_tone_variant(name: str, names: set[str]) -> bool:
    """True for `waving-hand-dark-skin-tone` and `waving-hand-dark`, False for the swatches and for `traffic-light`."""
    if name in {f"{tone}-skin-tone" for tone in TONES}:
        return False
    if "skin-tone" in name or re.search(r"-tone\d", name):
        return True
    for tone in TONES:
        base = name.removesuffix(f"-{tone}")
        if base != name and sum(f"{base}-{other}" in names for other in TONES) >= 4:
            return True
    return False


def collect(folder: Path) -> list[dict]:
    """One record (name, style, group, svg) for every icon that is kept, in a stable order."""
    records, groups = [], {}
    for style, (package, version) in PACKAGES.items():
        data = fetch(package, version, folder)
        for group, members in data["metadata"].get("categories", {}).items():
            groups.update({name: group for name in members if name not in groups})
        icons = data["icons"]
        for name, icon in sorted(icons["icons"].items()):
            if icon.get("hidden") or is_skin_tone_variant(name, set(icons["icons"])):
                continue
            box = [icon.get(key, icons.get(key, default)) for key, default in _BOX]
            view = " ".join(map(str, box))
            svg = f'<svg {_NAMESPACES} viewBox="{view}">{icon["body"]}</svg>'
            records.append({"name": name, "style": style, "svg": svg})
    drawn_by = Counter(record["name"] for record in records)
    records = [r | {"group": groups[r["name"]]} for r in records if drawn_by[r["name"]] >= 2 and r["name"] in groups]
    return sorted(records, key=lambda r: (r["name"], r["style"]))


_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))


def draw(svg: str) -> np.ndarray:
    """uint8 [64, 64, 3], the icon on white, keeping its aspect ratio."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))
    icon = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(icon, ((SIZE - icon.width) // 2, (SIZE - icon.height) // 2))
    return np.asarray(canvas.convert("RGB"))


def caption(name: str, style: str) -> str:
    return f"{name.replace('-', ' ')}, {style} style"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/emoji"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        records = collect(Path(folder))
    with multiprocessing.Pool() as pool:
        drawn = pool.imap(draw, [r.pop("svg") for r in records], chunksize=32)
        images = np.stack(list(tqdm(drawn, total=len(records), desc="drawing")))

    in_all_styles = sorted(n for n, c in Counter(r["name"] for r in records).items() if c == len(PACKAGES))
    rng = random.Random(0)
    held_out = {(name, rng.choice(list(PACKAGES))) for name in rng.sample(in_all_styles, HELD_OUT)}
    classes = sorted({f"{r['group']}, {r['style']} style" for r in records})
    for record in records:
        record["caption"] = caption(record["name"], record["style"])
        record["held_out"] = (record["name"], record["style"]) in held_out
        record["label"] = classes.index(f"{record['group']}, {record['style']} style")

    np.savez_compressed(args.out / "icons.npz", images=images)
    table = {"packages": PACKAGES, "classes": classes, "icons": records}
    (args.out / "icons.json").write_text(json.dumps(table, indent=0))
    names = {record["name"] for record in records}
    print(f"{len(records)} icons, {len(names)} names, {len(classes)} classes, {len(held_out)} held out")


if __name__ == "__main__":
    main()
