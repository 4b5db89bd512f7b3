"""What NOTES.md cites: tile sizes, threads, fresh memory and the parts of policy_loss.

Skipped without `--curves`.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benches.bench_policy_loss import HEAD
from benches.cases import megabytes
from benches.contenders import EVERYBODY, FLOOR, OURS, Gemms, ours
from benches.measure import Call, compare
from benches.peers import liger_grpo
from benches.problems import Problem, problem
from benches.report import Table
from rlvr_fast.ops.logprobs import row_grad, row_stats
from rlvr_fast.ops.tiled_head import add_product

pytestmark = pytest.mark.curve

Report = Callable[[Table], None]
Calls = dict[str, Callable[[], object]]

SHAPE = (HEAD.hidden_size, HEAD.vocab_size)


@pytest.mark.parametrize(("num_tokens", "rounds"), [(1024, 5), (4096, 2)])
def test_logits_budget(
    num_tokens: int, rounds: int, benchmark: BenchmarkFixture, report: Report
) -> None:
    given = problem(num_tokens, *SHAPE)
    rows_of = {mib: (mib << 20) // (2 * HEAD.vocab_size) for mib in (12, 24, 48, 96, 192, 384, 512)}
    steps = {
        f"{mib} MiB, {min(rows, num_tokens)} rows": ours("", logits_budget=mib << 20).build(given)
        for mib, rows in rows_of.items()
        if rows <= num_tokens or mib == min(m for m, r in rows_of.items() if r >= num_tokens)
    }
    calls: Calls = {FLOOR: Gemms(given).into_place, **steps}
    contenders = [Call(name=n, run=c, work=3 * given.gemm_flops) for n, c in calls.items()]
    timings = compare(contenders, floor=FLOOR, rounds=rounds, pedantic=benchmark.pedantic)
    rows = [
        t.row("TFLOP/s") | {"MB": megabytes(steps[t.name], "cpu") if t.name in steps else None}
        for t in timings
    ]
    report(Table(title=f"policy_loss by logits_budget: {given.title}", rows=rows))


def test_threads(benchmark: BenchmarkFixture, report: Report) -> None:
    given = problem(1024, *SHAPE)
    solo = {FLOOR: Gemms(given).into_place, "policy_loss": EVERYBODY[OURS].build(given)}
    calls: Calls = {
        f"{name}, threads: {count}": partial(_with_threads, count, call)
        for count in range(1, torch.get_num_threads() + 1)
        for name, call in solo.items()
    }
    contenders = [Call(name=n, run=c, work=3 * given.gemm_flops) for n, c in calls.items()]
    timings = compare(
        contenders, floor=f"{FLOOR}, threads: 1", rounds=5, pedantic=benchmark.pedantic
    )
    report(Table(title=f"Threads: {given.title}", rows=[t.row("TFLOP/s") for t in timings]))


def _with_threads(count: int, call: Callable[[], object]) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def test_parts(benchmark: BenchmarkFixture, report: Report) -> None:
    """Everything that policy_loss does at this size, alone; `x floor` is its share."""
    given = problem(1024, *SHAPE)
    calls = _gemm_parts(given) | _sweep_parts(given) | _memory_parts(given)
    contenders = [Call(name=n, run=c, work=0) for n, c in calls.items()]
    timings = compare(contenders, floor=FLOOR, rounds=7, pedantic=benchmark.pedantic)
    rows = [{k: v for k, v in t.row("GB/s").items() if k != "GB/s"} for t in timings]
    report(Table(title=f"Parts: {given.title}", rows=rows))


def _gemm_parts(given: Problem) -> Calls:
    gemms = Gemms(given)
    hidden, weight, logits = gemms.hidden, gemms.weight, gemms.logits
    d_weight = torch.empty(len(weight), hidden.shape[1])
    gemms.logits_only()
    return {
        FLOOR: gemms.into_place,
        "logits": gemms.logits_only,
        "d_hidden": lambda: torch.mm(logits, weight, out=gemms.d_hidden),
        "d_weight": lambda: torch.mm(logits.t(), hidden, out=gemms.d_weight),
        "d_weight in fp32, first tile": lambda: add_product(d_weight, logits, hidden, first=True),
        "d_weight in fp32, next tile": lambda: add_product(d_weight, logits, hidden, first=False),
    }


def _sweep_parts(given: Problem) -> Calls:
    logits = given.hidden.detach() @ given.weight.detach().t()
    stats = row_stats(logits, given.targets, 1.0, 0.0)
    dlogp, out = torch.randn(given.num_tokens), torch.empty_like(logits)
    return {
        "row_stats": lambda: row_stats(logits, given.targets, 1.0, 0.0),
        "row_grad": lambda: row_grad(logits, given.targets, stats, dlogp, None, 1.0, 0.0, out),
        "(copy of the logits)": lambda: out.copy_(logits),
    }


def _memory_parts(given: Problem) -> Calls:
    """What fresh pages cost: the same writes into new memory and into old."""
    master, kept = given.master.detach(), torch.empty_like(given.weight)
    kept_wide = torch.empty_like(master)

    def in_huge_pages() -> object:
        # NumPy asks for huge pages; torch does not.
        return np.empty(kept.shape, np.uint16).fill(0)

    return {
        "cast of fp32 weights, fresh": lambda: master.to(torch.bfloat16),
        "cast of fp32 weights, into place": lambda: kept.copy_(master),
        "zeros [V, D] bf16, fresh": lambda: torch.empty_like(kept).zero_(),
        "zeros [V, D] bf16, fresh huge pages": in_huge_pages,
        "zeros [V, D] bf16, into place": kept.zero_,
        "zeros [V, D] fp32, fresh": lambda: torch.empty_like(kept_wide).zero_(),
        "zeros [V, D] fp32, into place": kept_wide.zero_,
    }


def test_overhead(benchmark: BenchmarkFixture, report: Report) -> None:
    """A problem so small that only calls cost anything."""
    given = problem(16, 32, 128)
    names = ["torch", OURS, f"{OURS}, fp32 weights, autocast", "TRL op", "Liger fused GRPO"]
    calls: Calls = {name: EVERYBODY[name].build(given) for name in names}
    calls[f"{OURS}, one tile per token"] = ours("", logits_budget=1).build(given)
    contenders = [Call(name=n, run=c, work=0) for n, c in calls.items()]
    timings = compare(contenders, floor="torch", rounds=50, pedantic=benchmark.pedantic)
    rows = [
        {"": t.name, "median ms": 1e3 * sorted(t.seconds)[25], "x torch": t.ratio} for t in timings
    ]
    report(Table(title=f"Overhead: {given.title}", rows=rows))


def test_liger_chunks(benchmark: BenchmarkFixture, report: Report) -> None:
    given = problem(1024, *SHAPE)
    calls: Calls = {FLOOR: Gemms(given).into_place} | {
        f"Liger fused GRPO, chunk_size={size}": liger_grpo(given, sequences_per_chunk=size)
        for size in (1, 2, 8)
    }
    contenders = [Call(name=n, run=c, work=3 * given.gemm_flops) for n, c in calls.items()]
    timings = compare(contenders, floor=FLOOR, rounds=2, pedantic=benchmark.pedantic)
    report(Table(title=f"Liger: {given.title}", rows=[t.row("TFLOP/s") for t in timings]))
