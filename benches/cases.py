"""One problem, some contenders: who can take part, who is right, how long, how much memory.

TFLOP/s: `6 T D V` flops over the time, whatever a contender computes beyond that (peers that
recompute the logits spend `8 T D V`). Scoring: `2 T D V`.

MB: most memory during the call above inputs, and without the gradients that it returns. The
floors' logits lie ready, so they have none.

Errors: against fp64 on 64 other tokens of the same workload with the same head, 40 % of them with a
ratio outside of the clip bounds. d_hidden and
d_weight are relative in the 2-norm; the loss, a sum of both signs, is relative to the mean size of
an advantage. Whoever is further off than a few bf16 roundings is named in the notes.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benches import measure
from benches.contenders import FLOOR, FRESH_FLOOR, Contender, Gemms
from benches.measure import Call
from benches.peers import attempt
from benches.problems import Problem, Solved, Step
from benches.report import Entry, Table

TOLERANCE = 4 * torch.finfo(torch.bfloat16).eps
ERROR_NAMES = ("error loss", "error d_hidden", "error d_weight")
MB = 1e6
LEAST_ROUNDS, MOST_ROUNDS = 2, {"cpu": 7, "cuda": 30}
OVERHEAD = 0.01
"""Seconds that a call costs beside the GEMMs, for planning."""


@dataclass(kw_only=True)
class Plan:
    """Who takes part; grows notes on who does not."""

    contenders: list[Contender]
    left_out: list[str] = field(default_factory=list)

    def drop(self, contender: Contender, reason: str) -> None:
        self.contenders.remove(contender)
        self.left_out.append(f"{contender.name}: {reason}")


def plan(
    contenders: Sequence[Contender],
    shape: tuple[int, int, int],
    device: str,
    *,
    seconds: float,
    rate: float,
    memory: float,
    padding: float = 1.0,
) -> Plan:
    """Who is there, fits the memory, and fits the time with the fewest rounds.

    Args:
        contenders: the first ones get the time first.
        shape: T, D, V.
        seconds: to spend on all.
        rate: flops per second of a GEMM.
        memory: free bytes.
        padding: what the work grows by for those who pad.
    """
    floor, logits = 6.0 * math.prod(shape) / rate, float(shape[0] * shape[2])
    found = Plan(contenders=list(contenders))
    for contender in contenders:
        reason = contender.missing(device)
        # The floors' logits, and fp64 of the head for the check, are there as well.
        needed = (contender.logit_bytes + 2) * logits + 16.0 * shape[1] * shape[2]
        if reason is None and needed > memory:
            reason = f"would need about {needed / 1e9:.0f} GB"
        if reason:
            found.drop(contender, reason)

    # The floors, and about as much again for making the problem and for fp64.
    spent = 4 * (LEAST_ROUNDS + 1) * floor
    for contender in list(found.contenders):
        more = _cost(contender, device, floor * (padding if contender.padded else 1.0))
        if spent + more > seconds:
            found.drop(contender, f"would take about {more:.1f} s, which the budget lacks")
        else:
            spent += more
    return found


def _cost(contender: Contender, device: str, floor: float) -> float:
    """Seconds for the fewest rounds."""
    each = contender.cost[device] * floor + OVERHEAD
    return contender.setup + (LEAST_ROUNDS + 1) * each


def run_case(
    given: Problem,
    contenders: Sequence[Contender],
    *,
    seconds: float,
    title: str = "",
    pedantic: Callable[..., object] | None = None,
) -> Entry:
    """Checks, weighs and times everybody on one problem, in about `seconds`."""
    started = time.perf_counter()
    left_out: list[str] = []
    notes: list[str] = []
    steps, errors = _checked(given, contenders, left_out, notes)
    gemms = Gemms(given)
    calls: dict[str, Callable[[], object]] = {FLOOR: gemms.into_place, FRESH_FLOOR: gemms.fresh}
    compiles = {c.name for c in contenders if c.setup}
    weighed, one_round = _weighed(given, steps, compiles, left_out)
    calls |= {name: steps[name] for name in weighed}
    fits = int((seconds - (time.perf_counter() - started)) / (one_round + OVERHEAD))
    timings = measure.compare(
        [Call(name=n, run=run, work=3 * given.gemm_flops) for n, run in calls.items()],
        floor=FLOOR,
        rounds=max(LEAST_ROUNDS, min(MOST_ROUNDS[given.device], fits)),
        device=given.device,
        warm_up=0,
        pedantic=pedantic,
    )
    rows = [
        timing.row("TFLOP/s")
        | {"MB": weighed.get(timing.name)}
        | errors.get(timing.name, dict.fromkeys(ERROR_NAMES))
        for timing in timings
    ]
    title = f"{title or given.title}, {len(timings[0].seconds)} rounds"
    return Entry(
        tables=[Table(title=title, rows=rows, notes=notes)],
        facts=facts(given),
        seconds={t.name: t.seconds for t in timings},
        left_out=left_out,
    )


def _weighed(
    given: Problem, steps: Mapping[str, Step], compiles: Collection[str], left_out: list[str]
) -> tuple[dict[str, float], float]:
    """Peak MB of everybody who works at this size, which also warms up; seconds for all of them."""
    found: dict[str, float] = {}
    one_round = 6 * given.gemm_flops / measure.gemm_rate(given.device)
    for name, step in steps.items():
        reason = attempt(step)[1] if name in compiles else None
        watched, seconds = _watched(step, given.device)
        if reason is None:
            weight, reason = attempt(partial(megabytes, watched, given.device))
        if reason:
            left_out.append(f"{name}: {reason}")
        else:
            found[name] = weight
            one_round += seconds[0] + OVERHEAD
    return found, one_round


def _watched(step: Step, device: str) -> tuple[Step, list[float]]:
    """The step, and a list that gets the seconds it takes."""
    seconds: list[float] = []

    def run() -> Solved:
        start = time.perf_counter()
        solved = step()
        if device != "cpu":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        return solved

    return run, seconds


def facts(given: Problem) -> dict[str, Any]:
    num_tokens, hidden_size, vocab_size = given.shape
    return {"T": num_tokens, "D": hidden_size, "V": vocab_size, "workload": given.workload.name}


def _checked(
    given: Problem, contenders: Sequence[Contender], left_out: list[str], notes: list[str]
) -> tuple[dict[str, Step], dict[str, dict[str, float]]]:
    """The steps of those who work at all, and everybody's distance to fp64."""
    torch.compiler.reset()
    small = given.small()
    exact = {kind: kind(small) for kind in {c.truth for c in contenders}}
    steps: dict[str, Step] = {}
    errors: dict[str, dict[str, float]] = {}
    for contender in contenders:
        solved, reason = attempt(contender.build(small))
        if reason is None:
            errors[contender.name] = distances(solved, exact[contender.truth], small)
            steps[contender.name], reason = attempt(lambda c=contender: c.build(given))
        if reason:
            left_out.append(f"{contender.name}: {reason}")
        elif not max(errors[contender.name].values()) <= TOLERANCE:
            notes.append(f"{contender.name}: further than {TOLERANCE:.1e} from fp64")
    return {n: s for n, s in steps.items() if s is not None}, errors


def distances(solved: Solved, exact: Solved, given: Problem) -> dict[str, float]:
    """Relative errors of loss, d_hidden and d_weight."""
    loss_scale = max(float(given.advantage.abs().mean()), float(exact[0].abs()))
    scales = (loss_scale, float(exact[1].norm()), float(exact[2].norm()))
    return {
        name: float((own.double() - true).norm()) / scale
        for name, own, true, scale in zip(ERROR_NAMES, solved, exact, scales, strict=True)
    }


def megabytes(step: Step, device: str) -> float:
    """Peak memory of a step beyond inputs and the gradients it returns."""
    solved: list[Solved] = []
    peak = measure.peak_bytes(lambda: solved.append(step()), device)
    return max(0, peak - sum(gradient.nbytes for gradient in solved[0][1:])) / MB
