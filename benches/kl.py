"""linear_kl, the divergence of a student's head from a teacher's, against its four bare GEMMs.

Two products make the logits of both, two the student's gradients: `8 T D V` flops.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from benches import measure
from benches.cases import LEAST_ROUNDS, MB, MOST_ROUNDS, facts
from benches.contenders import Gemms
from benches.measure import Call
from benches.peers import attempt
from benches.problems import Problem, Solved, Step, differentiated, problem
from benches.report import Entry, Table

FLOOR = "floor: 4 GEMMs"
Builder = Callable[[Problem, Problem], Step]
NAMES = ("error d_hidden", "error d_weight")


def run(shape: tuple[int, int, int], device: str, rate: float, seconds: float) -> Entry:
    """Forward divergence, mean over the tokens; everybody's gradients to the student."""
    given = problem(*shape, device=device)
    teacher = problem(shape[0], *shape[1:], device=device, seed=1)
    builders: dict[str, Builder] = {"linear_kl": ours, "torch": naive, "torch.compile": compiled}
    if 24.0 * shape[0] * shape[2] > measure.free_bytes(device):
        builders = {"linear_kl": ours}
    steps, errors, left_out = _checked(given, teacher, builders)
    gemms, logits = Gemms(given), given.hidden.new_empty(shape[0], shape[2])

    def floor() -> None:
        torch.mm(teacher.hidden.detach(), teacher.weight.detach().t(), out=logits)
        gemms.into_place()

    fits = int(seconds / (4 * given.gemm_flops / rate * (1 + 2 * len(steps)))) - 2
    calls = {FLOOR: floor, **steps}
    timings = measure.compare(
        [Call(name=n, run=call, work=4 * given.gemm_flops) for n, call in calls.items()],
        floor=FLOOR,
        rounds=max(LEAST_ROUNDS, min(MOST_ROUNDS[device], fits)),
        device=device,
    )
    rows = [
        t.row("TFLOP/s")
        | {"MB": measure.peak_bytes(steps[t.name], device) / MB if t.name in steps else None}
        | errors.get(t.name, dict.fromkeys(NAMES))
        for t in timings
    ]
    title = f"linear_kl, forward divergence: {given.title}, gradients included in MB"
    return Entry(
        tables=[Table(title=title, rows=rows)],
        facts=facts(given),
        seconds={t.name: t.seconds for t in timings},
        left_out=left_out,
    )


def _checked(
    given: Problem, teacher: Problem, builders: Mapping[str, Builder]
) -> tuple[dict[str, Step], dict[str, dict[str, float]], list[str]]:
    """Who works at all, everybody's distance to fp64, and who was left out."""
    small = given.small(), teacher.small()
    exact = naive(*small, torch.float64)()
    steps: dict[str, Step] = {}
    errors, left_out = {}, []
    for name, build in builders.items():
        found, reason = attempt(build(*small))
        if reason is None:
            errors[name] = _errors(found, exact)
            steps[name] = build(given, teacher)
            _, reason = attempt(steps[name])
        if reason:
            left_out.append(f"{name}: {reason}")
            steps.pop(name, None)
    return steps, errors, left_out


def ours(given: Problem, teacher: Problem) -> Step:
    from rlvr_fast.ops.divergence import Divergence
    from rlvr_fast.ops.linear_kl import linear_kl

    heads = (teacher.hidden.detach(), teacher.weight.detach())
    weight = torch.full_like(given.old_logp, 1 / given.num_tokens)

    def step() -> Solved:
        loss = linear_kl(given.hidden, given.weight, *heads, weight, kind=Divergence.FORWARD).loss
        return differentiated(loss, given.hidden, given.weight)

    return step


def naive(given: Problem, teacher: Problem, dtype: torch.dtype | None = None) -> Step:
    """All logits of both; `dtype` for all that follows the inputs, by default fp32 after GEMMs."""

    def step() -> Solved:
        hidden, weight = (
            x if dtype is None else x.detach().to(dtype).requires_grad_()
            for x in (given.hidden, given.weight)
        )
        others = (x.detach().to(x.dtype if dtype is None else dtype)
                  for x in (teacher.hidden, teacher.weight))  # fmt: skip
        return differentiated(_mean_kl(hidden, weight, *others), hidden, weight)

    return step


def compiled(given: Problem, teacher: Problem) -> Step:
    torch.compiler.reset()
    fast = torch.compile(_mean_kl, dynamic=False)
    others = (teacher.hidden.detach(), teacher.weight.detach())

    def step() -> Solved:
        loss = fast(given.hidden, given.weight, *others)
        return differentiated(loss, given.hidden, given.weight)

    return step


def _mean_kl(hidden: Tensor, weight: Tensor, *teacher: Tensor) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    own = torch.log_softmax((hidden @ weight.t()).to(wide), -1)
    other = torch.log_softmax((teacher[0] @ teacher[1].t()).to(wide), -1)
    return F.kl_div(own, other, reduction="batchmean", log_target=True)


def _errors(solved: Solved, exact: Solved) -> dict[str, float]:
    return {
        name: float((own.double() - true).norm() / true.norm())
        for name, own, true in zip(NAMES, solved[1:], exact[1:], strict=True)
    }
