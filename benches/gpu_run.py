"""The run behind `gpu_suite.py`, which makes this importable first."""

import importlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from benches import gpu_tables, measure
from benches.gpu_behaviour import every_behaviour
from benches.gpu_checks import Where, every_check
from benches.parts import (
    QUICK,
    SCALES,
    Case,
    Machine,
    Part,
    accuracy_part,
    linear_kl_part,
    policy_loss_part,
    scoring_part,
    skipping_part,
    tokens_part,
)
from benches.peers import attempt
from benches.report import Entry, Results, Table
from benches.suite import finish, release, run_parts, say, today
from rlvr_fast.ops import policy_rows
from rlvr_fast.ops.policy_rows import fusible
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.trace import Traced, trace

TINY = {"vocab_size": 131, "hidden_size": 16, "rows": 8}


def run(out: Path, *, minutes: float, rehearse: bool, only: Sequence[str] = ()) -> int:
    """Checks first, then the tables as time allows. 1 if anything failed.

    Args:
        only: `checks` and names of `parts`; empty for all.
    """
    deadline = time.monotonic() + 60 * minutes
    if not rehearse and not torch.cuda.is_available():
        say("no CUDA GPU here; --rehearse runs every step on the CPU")
        return 2
    device = "cpu" if rehearse else "cuda"
    # Without the compiled extension what is prepared on the CPU is prepared in plain torch.
    on_the_cpu("triton" if rehearse else "reference")
    if rehearse:
        torch.set_num_threads(1)
        policy_rows.fusible = fusible_anywhere
    results = Results(out, device, today() + ("-rehearsal" if rehearse else ""))
    say(results.data["machine"])
    if not only or "checks" in only:
        checks(results, Where(device=device, **(TINY if rehearse else {})))
    if rehearse:
        on_the_cpu("reference")
        policy_rows.fusible = fusible
    scale = QUICK["cpu"] if rehearse else SCALES["cuda"]
    on = Machine(device=device, scale=scale, rate=measure.gemm_rate(device))
    say(f"GEMM {on.rate / 1e12:.2f} TFLOP/s")
    chosen = {n: p for n, p in parts(rehearse=rehearse).items() if not only or n in only}
    run_parts(results, on, chosen, seconds=deadline - time.monotonic())
    finish(results)
    failed = {key: e["failed"] for key, e in results.entries.items() if e["failed"]}
    say(f"{len(results.entries) - len(failed)} passed, {len(failed)} failed")
    for key, reason in failed.items():
        say(f"failed: {key}: {reason}")
    return int(bool(failed))


OPS = [
    ("logprobs", "row_stats", "BACKENDS"),
    ("logprobs", "row_grad", "GRAD_BACKENDS"),
    ("group_advantages", "_group_advantages", "BACKENDS"),
    ("divergence", "row_divergence", "BACKENDS"),
    ("row_statistics", "row_statistics", "BACKENDS"),
    ("row_statistics", "row_statistics_grad", "GRAD_BACKENDS"),
]
"""What has a C++ kernel: module of `rlvr_fast.ops`, op, table of its backends."""


def on_the_cpu(backend: str) -> None:
    """`triton` (in its interpreter) or `reference` in place of the compiled extension."""
    for module, op, table in OPS:
        home = importlib.import_module(f"rlvr_fast.ops.{module}")
        getattr(home, op).register_kernel("cpu", getattr(home, table)[backend])


def fusible_anywhere(objective: Objective, _: torch.device) -> Traced | None:
    """Of `policy_rows`, without looking at the device."""
    return trace(objective) if level(objective) is Level.TOKEN else None


def checks(results: Results, on: Where) -> None:
    """Each is saved by itself; one that passed at these sources is not run again."""
    named = [*every_check(), *every_behaviour(cuda=on.device != "cpu")]
    for name, check in named:
        key = f"check: {name}"
        if results.done(key):
            continue
        torch.manual_seed(0)
        start = time.monotonic()
        told, reason = attempt(partial(check, on))
        seconds = time.monotonic() - start
        results.save(key, Entry(facts={"told": told, "seconds": seconds}, failed=reason))
        say(f"{name}: {'FAILED: ' + reason if reason else told}, {seconds:.1f} s")
        release()
    entries = [(name, results.entries[f"check: {name}"]) for name, _ in named]
    rows = [{"": n, "result": e["failed"] or e["facts"]["told"]} for n, e in entries]
    results.save("checks: all", Entry(tables=[Table(title="Checks", rows=rows)]))


def parts(*, rehearse: bool) -> Mapping[str, tuple[Part, float]]:
    """With the share of the time that the checks leave over."""
    found: dict[str, tuple[Part, float]] = {
        "ceilings": (partial(ceilings_part, rehearse=rehearse), 2.0),
        "bars": (partial(gpu_tables.bars_part, rehearse=rehearse), 14.0),
        "pieces": (partial(pieces_part, rehearse=rehearse), 8.0),
        "policy_loss": (policy_loss_part, 22.0),
        "scoring": (scoring_part, 8.0),
        "skipping": (skipping_part, 12.0),
        "clipped": (clipped_part, 5.0),
        "budgets": (budgets_part, 10.0),
        "accuracy": (accuracy_part, 4.0),
        "linear_kl": (linear_kl_part, 6.0),
        "tokens": (tokens_part, 12.0),
    }
    if not rehearse:
        # On the CPU it would time whole heads of real models.
        found["tuning"] = (tuning_part, 10.0)
    return found


def ceilings_part(on: Machine, *, rehearse: bool) -> Iterator[Case]:
    size = 256 if rehearse else 8192
    yield Case(name="copy and GEMM", run=partial(gpu_tables.ceilings, on.device, size))


def pieces_part(on: Machine, *, rehearse: bool) -> Iterator[Case]:
    yield Case(name="one tile", run=partial(gpu_tables.pieces, on, 4 if rehearse else None))


def clipped_part(on: Machine) -> Iterator[Case]:
    yield Case(name="half of the rows", run=partial(gpu_tables.clipped, on))


def budgets_part(on: Machine) -> Iterator[Case]:
    yield Case(name="logits alive", run=partial(gpu_tables.budgets, on))


def tuning_part(on: Machine) -> Iterator[Case]:
    yield Case(name="row kernels", run=partial(gpu_tables.tuned, on))
