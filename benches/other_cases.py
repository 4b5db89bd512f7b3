"""Cases that are not a whole training step: errors, scoring, sweeps, skipping, linear_kl."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benches import measure, problems, shapes
from benches.cases import MB, MOST_ROUNDS, distances, facts
from benches.contenders import (
    EVERYBODY,
    FLOOR,
    OURS,
    SCORE_FLOOR,
    Contender,
    Gemms,
    share_skipped,
)
from benches.measure import Call
from benches.peers import attempt
from benches.problems import Problem, problem, true_scores, truth
from benches.report import Entry, Table
from benches.shapes import ZERO_SHARES, zero_advantage
from rlvr_fast.ops.logprobs import row_grad, row_stats

Shape = tuple[int, int, int]


def rounds_for(flops: float, device: str, *, seconds: float, rate: float) -> int:
    """As many as fit, with one to warm up and one for memory. At least three."""
    return max(3, min(MOST_ROUNDS[device], int(seconds / (flops / rate)) - 2))


def accuracy(
    hidden_size: int, vocab_size: int, device: str, contenders: Sequence[Contender], seconds: float
) -> Entry:
    """Relative errors of everybody against fp64, on three kinds of logits."""
    tables, left_out = [], []
    head = problem(64, hidden_size, vocab_size, device=device)
    for workload in (shapes.DENSE, shapes.CONFIDENT, shapes.LOW_ENTROPY):
        given = head.like(64, workload)
        exact, scores = truth(given), true_scores(given)
        rows = []
        for contender in contenders:
            if contender.truth is not truth:
                continue
            reason = contender.missing(device)
            if reason is None:
                row, reason = attempt(partial(_errors, contender, given, exact, scores))
            if reason:
                left_out.append(f"{contender.name}: {reason}")
            else:
                rows.append({"": contender.name, **row})
        name = "diffuse logits" if workload is shapes.DENSE else workload.name
        tables.append(Table(title=f"{name}: relative error against fp64", rows=rows))
    return Entry(tables=tables, facts=facts(head), left_out=list(dict.fromkeys(left_out)))


def _errors(
    contender: Contender, given: Problem, exact: problems.Solved, scores: tuple[Tensor, Tensor]
) -> dict[str, float | None]:
    found: dict[str, float | None] = {"logp": None, "entropy": None}
    if contender.score is not None:
        own = contender.score(given)()
        for name, mine, true in zip(found, own, scores, strict=True):
            if mine is not None:
                found[name] = float((mine.detach().double() - true).norm() / true.norm())
    solved = distances(contender.build(given)(), exact, given)
    return found | {k.removeprefix("error "): v for k, v in list(solved.items())[1:]}


def scoring(
    shape: Shape, device: str, rate: float, contenders: Sequence[Contender], seconds: float
) -> Entry:
    """Log-probabilities and entropies without gradients, against one GEMM."""
    given = problem(*shape, device=device)
    gemms = Gemms(given)
    calls: dict[str, Callable[[], object]] = {SCORE_FLOOR: gemms.logits_only}
    left_out = []
    with torch.no_grad():
        for contender in contenders:
            reason = contender.missing(device)
            if reason is None:
                assert contender.score is not None
                call, reason = attempt(partial(contender.score, given))
            if reason is None:
                _, reason = attempt(call)
            if reason:
                left_out.append(f"{contender.name}: {reason}")
            else:
                calls[contender.name.removesuffix(" + eager loss")] = call
        flops = 4 * len(calls) * given.gemm_flops
        timings = measure.compare(
            [Call(name=n, run=c, work=given.gemm_flops) for n, c in calls.items()],
            floor=SCORE_FLOOR,
            rounds=rounds_for(flops, device, seconds=seconds, rate=rate),
            device=device,
        )
        rows = [
            t.row("TFLOP/s") | {"MB": measure.peak_bytes(calls[t.name], device) / MB if i else None}
            for i, t in enumerate(timings)
        ]
    table = Table(title=f"Scoring, logp and entropy, forward only: {given.title}", rows=rows)
    seconds_by = {t.name: t.seconds for t in timings}
    return Entry(tables=[table], facts=facts(given), seconds=seconds_by, left_out=left_out)


def row_sweeps(shape: Shape, device: str, seconds: float) -> Entry:
    """What our two sweeps over bf16 logits cost beside the GEMMs: `x floor` is their share."""
    tokens, hidden_size, vocab_size = shape
    given = problem(min(tokens, 8192), hidden_size, vocab_size, device=device)
    gemms = Gemms(given)
    gemms.logits_only()
    dlogp = torch.randn(given.num_tokens, device=device)
    logits, targets, out = gemms.logits, given.targets, torch.empty_like(gemms.logits)
    stats = row_stats(logits, targets, 1.0, 0.0)
    size = logits.nbytes
    calls = [
        Call(name=FLOOR, run=gemms.into_place),
        Call(name="copy", run=lambda: out.copy_(logits), work=2 * size),
        Call(
            name="row_stats, reads",
            run=lambda: row_stats(logits, targets, 1.0, 0.0),
            work=size,
        ),
        Call(
            name="row_grad, reads and writes",
            run=lambda: row_grad(logits, targets, stats, dlogp, None, 1.0, 0.0, out),
            work=2 * size,
        ),
    ]
    timings = measure.compare(calls, floor=FLOOR, rounds=MOST_ROUNDS[device], device=device)
    rows = [t.row("GB/s") | {"GB/s": t.rate / 1e9 or None} for t in timings]
    table = Table(title=f"Row sweeps: {given.title}", rows=rows)
    return Entry(tables=[table], facts=facts(given), seconds={t.name: t.seconds for t in timings})


def skipping(shape: Shape, device: str, rate: float, seconds: float) -> Entry:
    """policy_loss where 0 to 60 % of the groups have advantage 0, all in the same rounds."""
    dense = problem(*shape, workload=zero_advantage(0.0), device=device)
    given = {s: dense.like(dense.num_tokens, zero_advantage(s)) for s in ZERO_SHARES}
    calls, left_out = {FLOOR: Gemms(dense).into_place}, []
    for name in (OURS, f"{OURS}, score_all"):
        for share, one in given.items():
            step = EVERYBODY[name].build(one)
            _, reason = attempt(step)
            if reason:
                left_out.append(f"{name}: {reason}")
                break
            calls[f"{name}, {share:.0%}"] = step
    timings = measure.compare(
        [Call(name=n, run=c, work=3 * dense.gemm_flops) for n, c in calls.items()],
        floor=FLOOR,
        rounds=rounds_for(3.6 * len(calls) * dense.gemm_flops, device, seconds=seconds, rate=rate),
        device=device,
    )
    by_name = {t.name: t for t in timings}
    rows = [_skipped_row(share, one, by_name) for share, one in given.items()]
    title = f"Zero-advantage groups: {dense.title.split(': ')[1]}"
    notes = ["skipped: share of the tokens that take part in no GEMM"]
    return Entry(
        tables=[Table(title=title, rows=rows, notes=notes)],
        facts=facts(dense),
        seconds={t.name: t.seconds for t in timings},
        left_out=left_out,
    )


def _skipped_row(
    share: float, given: Problem, timings: dict[str, measure.Timing]
) -> dict[str, str | float | None]:
    zero = float((given.token_advantage == 0).double().mean())
    row: dict[str, str | float | None] = {
        "": f"{share:.0%} of the groups",
        "% zero": 100 * zero,
        "% skipped": 100 * share_skipped(given),
    }
    for name, short in ((OURS, OURS), (f"{OURS}, score_all", "score_all")):
        own, none = timings.get(f"{name}, {share:.0%}"), timings.get(f"{name}, 0%")
        known = own is not None and none is not None
        row[f"{short} x floor"] = own.ratio if own else None
        row[f"{short} x none"] = own.ratio / none.ratio if known else None
    return row


def divergence(shape: Shape, device: str, rate: float, seconds: float) -> Entry:
    """linear_kl between two heads of the same size, against its four bare GEMMs."""
    from benches import kl

    return kl.run(shape, device, rate, seconds)
