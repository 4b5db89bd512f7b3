"""The clipped surrogate, forward and backward, against three bare GEMMs and against peers.

GFLOP/s: `6 T D V` flops over the time, whatever a contender computes beyond that (peers that
recompute the logits spend `8 T D V`). Scoring: `2 T D V`.

MB: most resident memory during the call above inputs, and without the gradients that it returns.
The floors' logits lie ready, so they have none.

Errors: against fp64 on the first tokens of each sequence, 64 in all. d_hidden and d_weight are
relative in the 2-norm; the loss, a sum of both signs, is relative to the mean size of an advantage.
Whoever is further off than a few bf16 roundings stops the bench before anything is timed.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benches import heads
from benches.heads import Problem, Solved, Step
from benches.measure import Contender, Row, Table, compare, peak_bytes
from rlvr_fast.ops.linear_logprobs import linear_logprobs
from rlvr_fast.ops.logprobs import row_grad, row_stats

HIDDEN, VOCAB = 576, 49152
"""SmolLM2-135M."""
MB = 1e6
SMALL_BUDGET = 12 << 20
TOLERANCE = 4 * torch.finfo(torch.bfloat16).eps
FLOOR = "floor: 3 GEMMs"

Report = Callable[[Table], None]
Builder = Callable[[Problem], Step]

OURS: dict[str, Builder] = {
    "policy_loss": heads.ours,
    "policy_loss, fp32 weights, autocast": heads.ours_autocast,
}
PEERS: dict[str, Builder] = {
    "policy_loss, 12 MiB of logits": partial(heads.ours, logits_budget=SMALL_BUDGET),
    "torch": heads.naive,
    "torch.compile": heads.compiled,
    "TRL 1.16 op + eager loss": heads.trl,
    "Liger 0.8.5 fused GRPO loss": partial(heads.liger, sequences_per_chunk=heads.NUM_SEQUENCES),
}
LONG_PEERS = {name: PEERS[name] for name in ("torch", "TRL 1.16 op + eager loss")}


@pytest.mark.parametrize(
    ("num_tokens", "builders", "rounds"),
    [(1024, OURS | PEERS, 5), (4096, OURS | LONG_PEERS, 2)],
    ids=["1024 tokens", "4096 tokens"],
)
def test_forward_and_backward(
    num_tokens: int,
    builders: dict[str, Builder],
    rounds: int,
    benchmark: BenchmarkFixture,
    report: Report,
) -> None:
    given = heads.problem(num_tokens, HIDDEN, VOCAB)
    builders, notes = _working(builders, given)
    errors = _errors(builders, given.part(64))
    steps = {name: build(given) for name, build in builders.items()}
    gemms = Gemms(given)
    contenders = {FLOOR: gemms.into_place, "floor: fresh gradients": gemms.fresh} | steps
    work = 3 * given.gemm_flops
    timings = compare(
        [Contender(name=name, call=call, work=work) for name, call in contenders.items()],
        floor=FLOOR,
        rounds=rounds,
        benchmark=benchmark,
    )
    del gemms
    rows = [
        timing.row("GFLOP/s")
        | {"MB": megabytes(steps[timing.name]) if timing.name in steps else None}
        | errors.get(timing.name, dict.fromkeys(ERROR_NAMES))
        for timing in timings
    ]
    title = f"policy_loss, forward and backward: {shape(given)}, {rounds} rounds"
    report(Table(title=title, rows=rows, notes=notes))


def test_scoring(benchmark: BenchmarkFixture, report: Report) -> None:
    """Log-probabilities and entropies without gradients."""
    given = heads.problem(1024, HIDDEN, VOCAB)
    gemms = Gemms(given)
    hidden, weight, targets = given.hidden.detach(), given.weight.detach(), given.targets

    def score() -> object:
        return linear_logprobs(hidden, weight, targets)

    def score_autocast() -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_logprobs(hidden, given.master.detach(), targets)

    def plain() -> object:
        logp = torch.log_softmax((hidden @ weight.t()).float(), -1)
        return logp.gather(-1, targets[:, None]), -(logp.exp() * logp).sum(-1)

    calls = {
        "floor: 1 GEMM": gemms.logits_only,
        "linear_logprobs": score,
        "linear_logprobs, fp32 weights, autocast": score_autocast,
        "torch": plain,
        "TRL 1.16 op": partial(heads.trl_logp, given),
    }
    with torch.no_grad():
        timings = compare(
            [Contender(name=n, call=c, work=given.gemm_flops) for n, c in calls.items()],
            floor="floor: 1 GEMM",
            rounds=7,
            benchmark=benchmark,
        )
        rows = [
            t.row("GFLOP/s") | {"MB": peak_bytes(calls[t.name]) / MB if i else None}
            for i, t in enumerate(timings)
        ]
    report(Table(title=f"Scoring, logp and entropy, forward only: {shape(given)}", rows=rows))


def test_row_sweeps(benchmark: BenchmarkFixture, report: Report) -> None:
    """What our two sweeps over the logits cost beside the GEMMs: `x floor` is their share."""
    given = heads.problem(1024, HIDDEN, VOCAB)
    gemms = Gemms(given)
    gemms.logits_only()
    dlogp = torch.randn(given.num_tokens)
    stats = row_stats(gemms.logits, given.targets, 1.0, 0.0)
    out = torch.empty_like(gemms.logits)
    logits_bytes = gemms.logits.nbytes
    calls = {
        FLOOR: (gemms.into_place, None),
        "row_stats, reads": (
            lambda: row_stats(gemms.logits, given.targets, 1.0, 0.0),
            logits_bytes,
        ),
        "row_grad, reads and writes": (
            lambda: row_grad(gemms.logits, given.targets, stats, dlogp, None, 1.0, 0.0, out),
            2 * logits_bytes,
        ),
    }
    timings = compare(
        [Contender(name=n, call=call, work=work or 0) for n, (call, work) in calls.items()],
        floor=FLOOR,
        rounds=7,
        benchmark=benchmark,
    )
    rows: list[Row] = [t.row("GB/s") | {"GB/s": t.rate or None} for t in timings]
    report(Table(title=f"Row sweeps in bf16: {shape(given)}", rows=rows))


class Gemms:
    """The three products of a problem, and nothing else."""

    def __init__(self, given: Problem) -> None:
        self.hidden, self.weight = given.hidden.detach(), given.weight.detach()
        self.logits = torch.empty(given.num_tokens, len(self.weight), dtype=torch.bfloat16)
        self.d_hidden, self.d_weight = torch.empty_like(self.hidden), torch.empty_like(self.weight)

    def logits_only(self) -> None:
        torch.mm(self.hidden, self.weight.t(), out=self.logits)

    def into_place(self) -> None:
        """Into memory that was used before."""
        self.logits_only()
        torch.mm(self.logits, self.weight, out=self.d_hidden)
        torch.mm(self.logits.t(), self.hidden, out=self.d_weight)

    def fresh(self) -> object:
        """Into new gradients, as everybody must who returns them."""
        self.logits_only()
        return torch.mm(self.logits, self.weight), torch.mm(self.logits.t(), self.hidden)


def _working(builders: dict[str, Builder], given: Problem) -> tuple[dict[str, Builder], list[str]]:
    """Without torch.compile where inductor does not work, and a note that says why."""
    if "torch.compile" not in builders:
        return builders, []
    try:
        heads.compiled(given.part(64))
    except RuntimeError as error:
        rest = {name: build for name, build in builders.items() if name != "torch.compile"}
        return rest, [f"torch.compile left out: {str(error).splitlines()[0]}"]
    return builders, []


ERROR_NAMES = ("error loss", "d_hidden", "d_weight")


def _errors(builders: dict[str, Builder], given: Problem) -> dict[str, dict[str, float]]:
    """By contender. Raises AssertionError unless all agree with fp64."""
    exact = heads.truth(given)
    scale = float(given.advantage.abs().mean())
    found = {name: _distances(build(given)(), exact, scale) for name, build in builders.items()}
    wrong = [name for name, errors in found.items() if not max(errors.values()) <= TOLERANCE]
    assert not wrong, f"further than {TOLERANCE:.1e} from fp64: {wrong}, {found}"
    return found


def _distances(solved: Solved, exact: Solved, loss_scale: float) -> dict[str, float]:
    scales = (loss_scale, float(exact[1].norm()), float(exact[2].norm()))
    return {
        name: float((own.double() - true).norm()) / scale
        for name, own, true, scale in zip(ERROR_NAMES, solved, exact, scales, strict=True)
    }


def megabytes(step: Step) -> float:
    solved: list[Solved] = []
    peak = peak_bytes(lambda: solved.append(step()))
    return max(0, peak - sum(gradient.nbytes for gradient in solved[0][1:])) / MB


def shape(given: Problem) -> str:
    return "T={}, D={}, V={}, bf16".format(*given.shape)
