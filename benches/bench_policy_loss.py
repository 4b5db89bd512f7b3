"""The clipped surrogate, forward and backward, against three bare GEMMs and against peers.

The same contenders and columns as in `rlvr-fast bench` (see `cases.py`), at one shape, here with
every round counted by pytest-benchmark. Whoever is further from fp64 than a few bf16 roundings
fails the bench.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benches import measure, shapes
from benches.cases import plan, run_case
from benches.contenders import EVERYBODY, OURS, SCORERS
from benches.other_cases import row_sweeps, scoring
from benches.problems import problem
from benches.report import Entry, Table

Report = Callable[[Table], None]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD = shapes.BY_MODEL["SmolLM2-135M"]
MINUTE = 60.0
ALL = [name for name in EVERYBODY if "chunk 1" not in name and "plain CE" not in name]
LONG = [OURS, f"{OURS}, fp32 weights, autocast", "torch"]
"""At 4096 tokens on two cores; `rlvr-fast bench` has the peers there too if time allows."""


@pytest.mark.parametrize(
    ("num_tokens", "names"),
    [(1024, ALL), (4096, LONG)],
    ids=["1024 tokens", "4096 tokens"],
)
def test_forward_and_backward(
    num_tokens: int, names: list[str], benchmark: BenchmarkFixture, report: Report
) -> None:
    given = problem(num_tokens, HEAD.hidden_size, HEAD.vocab_size, device=DEVICE)
    chosen = plan(
        [EVERYBODY[name] for name in names],
        given.shape,
        DEVICE,
        seconds=5 * MINUTE,
        rate=measure.gemm_rate(DEVICE),
        memory=measure.free_bytes(DEVICE),
    )
    found = run_case(given, chosen.contenders, seconds=MINUTE, pedantic=benchmark.pedantic)
    hand_in(found, report, chosen.left_out)
    assert not found.tables[0].notes


def test_scoring(benchmark: BenchmarkFixture, report: Report) -> None:
    """Log-probabilities and entropies without gradients."""
    shape = (1024, HEAD.hidden_size, HEAD.vocab_size)
    contenders = [EVERYBODY[name] for name in SCORERS]
    hand_in(
        benchmark.pedantic(
            lambda: scoring(shape, DEVICE, measure.gemm_rate(DEVICE), contenders, MINUTE)
        ),
        report,
    )


def test_row_sweeps(benchmark: BenchmarkFixture, report: Report) -> None:
    """What our two sweeps over the logits cost beside the GEMMs: `x floor` is their share."""
    shape = (1024, HEAD.hidden_size, HEAD.vocab_size)
    hand_in(benchmark.pedantic(lambda: row_sweeps(shape, DEVICE, MINUTE)), report)


def hand_in(found: Entry, report: Report, left_out: list[str] | None = None) -> None:
    """Every table; who was left out goes to the notes."""
    notes = [f"left out: {line}" for line in [*(left_out or []), *found.left_out]]
    for table in found.tables:
        report(Table(title=table.title, rows=table.rows, notes=[*table.notes, *notes]))
