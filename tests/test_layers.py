"""The layering of the package, held over the syntax tree: imports point down only."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up; a module may import its own layer and those before it.
LAYERS = [
    ["kernels"],
    ["_C", "scored", "packed", "tuning"],
    ["tracing"],
    ["ops"],
    ["objectives", "advantages", "aggregate", "embeddings"],
    [
        "rollout",
        "rewards",
        "tasks",
        "models",
        "attention",
        "attention_plans",
        "fused_layers",
        "prompts",
        "options",
    ],
    ["methods"],
    [
        "ahead",
        "autotune",
        "collect",
        "config",
        "devices",
        "checkpoint",
        "lora",
        "memory",
        "metrics",
        "microbatch",
        "mismatch",
        "optimise",
        "policy",
        "scoring",
        "progress",
        "parallel",
        "engines",
        "estimates",
        "evaluate",
        "report",
        "trackers",
        "trainer",
        "run",
    ],
    ["compare", "curves", "panels", "plot", "show"],
    ["integrations"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

METHODS = sorted(
    path.stem
    for path in (ROOT / "rlvr_fast/methods").glob("*.py")
    if "paper: ClassVar[Paper] = Paper(" in path.read_text()
)
SOURCES = sorted(
    path for path in (ROOT / "rlvr_fast").rglob("*.py") if path != ROOT / "rlvr_fast/__init__.py"
)


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT / "rlvr_fast").with_suffix("").parts[0]


def imported_layers(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {n.split(".")[1] for n in names if n.startswith("rlvr_fast.") and n.count(".")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_only(path):
    own = RANK[layer_of(path)]
    above = {name for name in imported_layers(path) if RANK.get(name, -1) > own}
    assert not above


@pytest.mark.parametrize(
    "path",
    [
        *(ROOT / "kernels").glob("*.py"),
        *(ROOT / "csrc").glob("*.*"),
        *(ROOT / "rlvr_fast/ops").glob("*.py"),
        *(ROOT / "rlvr_fast/tracing").glob("*.py"),
        *(
            ROOT / f"rlvr_fast/{name}.py"
            for name in ("collect", "optimise", "packed", "policy", "scored", "scoring", "trainer")
        ),
    ],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_kernel_op_or_trainer_knows_a_method(path):
    words = set(re.findall(r"\w+", path.read_text().lower()))
    assert len(METHODS) > 30
    assert not words & {*METHODS}


def test_kernels_are_no_package_of_their_own():
    """Another project owns that name; see the note on shipping in pyproject.toml."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_the_top_level_holds_what_it_should():
    names = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")} - {"build", "runs"}
    assert names == {
        "LICENSE", "Makefile", "README.md", "benches", "constraints.txt", "csrc", "kernels",
        "pyproject.toml", "rlvr_fast", "tests",
    }  # fmt: skip


def test_importing_the_package_needs_neither_torch_nor_triton():
    import subprocess
    import sys

    code = "import sys, rlvr_fast; print([m for m in ('torch', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
