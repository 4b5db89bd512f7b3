"""The table of all methods, from what they say of themselves and from their traced objectives.

    python -m rlvr_fast.methods.table [--write]

Prints `README.md` of this folder, or with `--write` writes it.
"""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlvr_fast.methods import METHODS, method
from rlvr_fast.methods.base import Method
from rlvr_fast.objectives import Distillation, Objective
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.trace import Traced, trace

PATH = Path(__file__).with_name("README.md")
INTRODUCTION = """\
# Methods

One short file each. `rlvr-fast methods NAME` shows the options of one, `rlvr-fast train CONFIG
--method NAME --method_options.OPTION VALUE` trains with it. This page is written by `python -m
rlvr_fast.methods.table --write`; a test compares the two.

## How to read it

`r` is the importance ratio `exp(logp - old_logp)`, `A` the advantage, `R` the reward, `sg` a value
without a gradient. *Read* says what was read of a method before it was written here. *Ours* is what
no source says: an option with a default of our own, or a part that we had to make up.

*Fused* says how `policy_loss` computes it, which follows from how far the loss of one token looks:

- **single pass**: no further than the token. On CUDA the objective is traced into the row kernel,
  which goes from logits to their gradient at once; on the CPU it runs between two sweeps in C++.
- **single pass, tiles at sequences** (or **groups**): it reads sums over those. Tiles of rows end
  where they end, and the objective runs in torch between the two sweeps of a tile. One that is
  longer than a tile has its logits computed twice.
- **single pass, objective in torch**: it looks no further than the token, but has an operation that
  the kernels lack. The objective runs in torch between the two sweeps of a tile.
- **whole batch**: it reads across groups, or cannot be followed. All of a batch is one micro-batch.
- **distillation**: two distributions over the vocabulary, tile by tile, in `linear_kl`.

*A scoring pass before* means that the method asks for scores in its hook `shape` (once a step) or
`prepare` (before each update), some only with certain options: each time a forward pass of the
model and 2 T D V flops of the head. *A change before*: it has such a hook, which asks for none.

## How to add one

1. `rlvr_fast/methods/NAME.py`: a frozen dataclass on `Method` of [base.py](base.py), whose fields
   are the options, with the hooks that differ, and a `Paper`. The first line of the file says what
   it is. What it minimises is an `Objective`: plain torch on `[T]` tensors.
2. `tests/methods/test_NAME.py`: known values, what it reduces to, and the property that makes it.
   [test_every_method.py](../../tests/methods/test_every_method.py) holds it to what holds for all.
3. A line in `METHODS` of [\\_\\_init\\_\\_.py](__init__.py).
4. `python -m rlvr_fast.methods.table --write`.
"""
HOOKS = (
    "select_prompts", "rollout", "verify", "advantages", "normalisation", "shape", "prepare",
    "observe", "seq_weights",
)  # fmt: skip
LOOKING = {"shape": "once a step", "prepare": "before each update"}
ASKS = re.compile(r"\bscorer\.(rollouts|prompts|hidden|statistics)\(")
SEEN = {
    Level.SEQUENCE: "reads sums over a sequence",
    Level.GROUP: "reads sums over a group",
    Level.BATCH: "reads more than its group, or cannot be followed",
}
CUT = {
    Level.SEQUENCE: "single pass, tiles at sequences",
    Level.GROUP: "single pass, tiles at groups",
    Level.BATCH: "whole batch",
}
Row = Mapping[str, str]


def page() -> str:
    """All of `README.md`."""
    kinds = sorted(METHODS.items())
    return "\n".join(
        [
            INTRODUCTION,
            "## What they are",
            "",
            *markdown([described(name, kind) for name, kind in kinds]),
            "",
            "## How they run",
            "",
            *markdown([running(name, kind) for name, kind in kinds]),
            "",
        ]
    )


def described(name: str, kind: type[Method]) -> Row:
    """What it is and where it is from."""
    paper = kind.paper
    return {
        "Method": f"[{name}]({Path(inspect.getfile(kind)).name})",
        "What it is": _cell(summary(kind)),
        "Formula": f"`{_cell(paper.formula)}`",
        "Source": _linked(_cell(paper.source)),
        "Read": _cell(paper.evidence),
        "Ours": _cell("; ".join(paper.reconstructed)) or "-",
    }


def running(name: str, kind: type[Method]) -> Row:
    """What it costs, which hooks it has of its own, and what it asks of the config."""
    mode, why = fused(method(name, {}).objective())
    how = "a scoring pass" if asks_for_scores(kind) else "a change"
    before = [f"{how} before ({LOOKING[hook]})" for hook in overridden(kind) if hook in LOOKING]
    wants = [f"{field} = {_plain(value)}" for field, value in kind.settings.items()]
    wants += ["one update per batch"] * kind.on_policy_only
    wants += ["a reference model"] * kind.needs_reference
    return {
        "Method": name,
        "Fused": "; ".join([mode, *before]),
        "Why": why,
        "Hooks of its own": ", ".join(f"`{hook}`" for hook in overridden(kind)) or "-",
        "Config": _cell(", ".join(wants)) or "-",
    }


def summary(kind: type[Method]) -> str:
    """The first line of its file."""
    return str(sys.modules[kind.__module__].__doc__).partition("\n")[0]


def overridden(kind: type[Method]) -> list[str]:
    """The hooks that are not those of `Method`, in the order of a step."""
    return [hook for hook in HOOKS if getattr(kind, hook) is not getattr(Method, hook)]


def asks_for_scores(kind: type[Method]) -> bool:
    """Whether its file, or that of a class it is built on, calls the scorer."""
    own = {each.__module__ for each in kind.__mro__ if issubclass(each, Method)}
    own -= {Method.__module__}
    return any(ASKS.search(inspect.getsource(sys.modules[name])) for name in own)


def fused(objective: Objective | Distillation) -> tuple[str, str]:
    """How it is computed, and why so."""
    if isinstance(objective, Distillation):
        return "distillation", f"reads two distributions ({objective.kind.name.lower()})"
    seen = level(objective)
    if seen is not Level.TOKEN:
        return CUT[seen], SEEN[seen]
    traced = trace(objective)
    if traced is None:
        return "single pass, objective in torch", "pointwise, with an operation the kernels lack"
    return "single pass", f"pointwise in its tokens; reads {', '.join(read(traced))}"


def read(traced: Traced) -> list[str]:
    """What a pointwise objective looks at beside `logp`."""
    named = [*traced.reads, *(f'extras["{name}"]' for name in traced.extras)]
    named += ["entropy"] * traced.reads_entropy
    return [f"`{name}`" for name in named] or ["nothing but `logp`"]


def markdown(rows: Sequence[Row]) -> list[str]:
    """The lines of a table."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _cell(text: str) -> str:
    """A pipe would end the cell, in code too."""
    return text.replace("|", "\\|")


def _linked(text: str) -> str:
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)


def _plain(value: object) -> object:
    return getattr(value, "value", value)


def main(arguments: Sequence[str]) -> int:
    """The exit code.

    Raises:
        ValueError: for other arguments than `--write`.
    """
    if list(arguments) not in ([], ["--write"]):
        raise ValueError(f"arguments: wanted --write or none, got {' '.join(arguments)}")
    if arguments:
        PATH.write_text(page())
    else:
        sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
