"""What every method costs over the baseline, and what it learns on the tiny task.

`rlvr-fast bench methods [NAME ...]` runs these as cases of the suite and draws them; under pytest
they are benches like the others. Everything iterates over the registered methods and knows of each
only its hooks.

update: `Optimiser.update` on one batch of drawn tokens: the method's `shape` and `prepare` with the
passes they ask for, forward, backward, clipping, AdamW at a learning rate of 0. Advantages are
there already. One update per batch, so no ratio differs from 1.

loss: `policy_loss` alone, on ratios of which some lie outside of all bounds.

learning: training of a random two-layer model on 25 sums, several seeds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benches import drawn, measure
from benches.learning import learning
from benches.measure import Call, Timing
from benches.parts import Case, Machine, Part
from benches.peers import attempt
from benches.problems import Problem, differentiated, problem
from benches.report import Entry, Row, Table
from benches.shapes import GROUP
from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.methods import METHODS, method
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.objectives import Objective
from rlvr_fast.ops.active_rows import mark_active
from rlvr_fast.ops.policy_loss import policy_loss
from rlvr_fast.optimise import Optimiser, needs_reference
from rlvr_fast.scored import ScoredTokens
from rlvr_fast.tasks import load_task
from rlvr_fast.tracing.tokens import TokenFields, Tokens
from rlvr_fast.tracing.trace import AnyExtra

BASELINE = "grpo"
TOGETHER = 5
"""Methods that are timed in turn with the baseline, so that each is near it in time."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    model: str
    prompts: int
    samples: int
    length: int
    """Tokens of each completion."""
    shape: tuple[int, int, int]
    """T, D, V of the loss."""
    rounds: int
    steps: int
    seeds: int


FULL = Size(
    model="smollm2-135m", prompts=16, samples=8, length=12, shape=(1024, 576, 49152), rounds=3,
    steps=100, seeds=3,
)  # fmt: skip
QUICK = Size(
    model="tiny", prompts=4, samples=4, length=3, shape=(160, 64, 1000), rounds=2, steps=3, seeds=2
)


def parts(names: Sequence[str], size: Size) -> dict[str, tuple[Part, float]]:
    """For the suite; the shares of the time are about what they take.

    Args:
        names: of methods; none: all.
    """
    chosen, what = list(names) or list(METHODS), ", ".join(names) or "all methods"

    def one(run: Callable[[Sequence[str], Size, str], Entry]) -> Part:
        def cases(on: Machine) -> Iterator[Case]:
            yield Case(name=what, run=lambda seconds: run(chosen, size, on.device))

        return cases

    return {"update": (one(updates), 50.0), "loss": (one(losses), 10.0),
            "learning": (one(learned), 40.0)}  # fmt: skip


def updates(names: Sequence[str], size: Size, device: str) -> Entry:
    """The time of an update over the baseline's."""
    model, tokenizer = _on(device, size.model)
    reference = _on(device, size.model)[0].requires_grad_(False)
    ready: dict[str, Callable[[], object]] = {}
    left_out: list[str] = []
    shared: torch.optim.Optimizer | None = None
    for name in _with_baseline(names):
        made, reason = attempt(partial(_update, name, size, model, reference, tokenizer))
        if reason is None:
            # Two moments of each parameter for each method would not fit.
            shared = made.optimiser.adamw = shared or made.optimiser.adamw
            reason = attempt(made)[1]
        if reason:
            left_out.append(f"{name}: {reason}")
        else:
            ready[name] = made
    if BASELINE not in ready:
        return Entry(left_out=left_out)
    tokens = size.prompts * size.samples * size.length
    rows, seconds = _timed(ready, tokens, size.rounds, device)
    title = (
        f"One update: {size.model}, {size.prompts} prompts x {size.samples} completions x "
        f"{size.length} tokens, {size.rounds} rounds"
    )
    notes = ["with the scoring passes that a method asks for, without generation"]
    return Entry(
        tables=[Table(title=title, rows=rows, notes=notes)], seconds=seconds, left_out=left_out
    )


@dataclass(frozen=True)
class _Update:
    optimiser: Optimiser
    groups: Groups

    def __call__(self) -> None:
        found = self.optimiser.update(self.groups, step=1)
        if not found["microbatches"]:
            raise ValueError("advantages: wanted some other than 0, got none")


def _update(
    name: str,
    size: Size,
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> _Update:
    fixed = {"run_folder": "unused", "learning_rate": 0.0, "max_completion_tokens": size.length}
    config = configs.load("addition", fixed | drawn.fitting(name))
    chosen = method(name, config.method_options)
    with closing(load_task(config.task, config.task_options)) as task:
        examples = [
            replace(example, columns={**drawn.COLUMNS, **example.columns})
            for example in task.train[: size.prompts]
        ]
    lengths = (size.length, size.length)
    on = drawn.context(examples, tokenizer, samples=size.samples, lengths=lengths)
    groups = chosen.advantages(drawn.verified(chosen, on))
    frozen = reference if needs_reference(config, chosen) else None
    made = Optimiser(config, chosen, model, frozen, vocab_size=len(tokenizer))
    return _Update(made, groups)


def losses(names: Sequence[str], size: Size, device: str) -> Entry:
    """The time of `policy_loss`, forward and backward, over that of the baseline's objective."""
    given = problem(*size.shape, device=device)
    ready: dict[str, Callable[[], object]] = {}
    left_out: list[str] = []
    for name in _with_baseline(names):
        objective = method(name, drawn.needed_options(METHODS[name])).objective()
        if not isinstance(objective, Objective):
            left_out.append(f"{name}: distils")
            continue
        step = _loss(given, objective)
        _, reason = attempt(step)
        if reason:
            left_out.append(f"{name}: {reason}")
        else:
            ready[name] = step
    rows, seconds = _timed(ready, given.num_tokens, size.rounds, device)
    title = f"policy_loss by objective: {given.title}, {size.rounds} rounds"
    notes = ["rows that an objective clips are left out of the gradient GEMMs on the CPU"]
    return Entry(
        tables=[Table(title=title, rows=rows, notes=notes)], seconds=seconds, left_out=left_out
    )


def _loss(given: Problem, objective: Objective) -> Callable[[], object]:
    tokens = _tokens(given, objective)
    if given.device != "cpu":
        tokens = mark_active(tokens, objective).to(given.device)
    return partial(_solved, given, objective, tokens)


def _solved(given: Problem, objective: Objective, tokens: ScoredTokens) -> object:
    loss = policy_loss(given.hidden, given.weight, tokens, objective).loss
    return differentiated(loss, given.hidden, given.weight)


def _tokens(given: Problem, objective: Objective) -> ScoredTokens:
    """With whatever the objective may read: logps near the policy's, extras between 0 and 1."""
    draw = torch.Generator().manual_seed(0)
    plain = given.tokens()
    assert plain.old_logp is not None
    near = [plain.old_logp + 0.1 * torch.randn(given.num_tokens, generator=draw) for _ in "ab"]
    tokens = replace(
        plain,
        group_offsets=torch.arange(0, len(given.lengths) + 1, GROUP),
        ref_logp=near[0],
        rollout_logp=near[1],
    )
    asked = _Asked()
    objective.token_loss(asked)
    return replace(tokens, extras={name: 0.1 + 0.8 * torch.rand(given.num_tokens, generator=draw)
                                   for name in sorted(asked.names)})  # fmt: skip


class _Asked(Tokens):
    """Has every field; notes the extras that an objective looks at."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        x = torch.full((3,), -0.5)
        fields = {"old_logp": x, "ref_logp": x, "rollout_logp": x, "advantage": -x}
        super().__init__(x, -x, TokenFields(weight=-x, extras={}, **fields))

    @property
    def extras(self) -> Mapping[str, Tensor]:
        return AnyExtra(self._noted)

    def _noted(self, name: str) -> Tensor:
        self.names.add(name)
        return torch.full((3,), 0.5)

    def seq_sum(self, x: Tensor) -> Tensor:
        return x

    seq_mean = seq_max = group_sum = group_mean = seq_sum


def learned(names: Sequence[str], size: Size, device: str) -> Entry:
    """Rewards on the tiny task."""
    return learning(names, size.steps, size.seeds, device)


def _timed(
    ready: Mapping[str, Callable[[], object]], tokens: int, rounds: int, device: str
) -> tuple[list[Row], dict[str, Sequence[float]]]:
    """A row for each, warmed up by now; the baseline is timed again beside every few others."""
    others = [name for name in ready if name != BASELINE]
    found: dict[str, Timing] = {}
    for first in range(0, max(len(others), 1), TOGETHER):
        turn = [BASELINE, *others[first : first + TOGETHER]]
        calls = [Call(name=name, run=ready[name], work=float(tokens)) for name in turn]
        timings = measure.compare(calls, floor=BASELINE, rounds=rounds, device=device, warm_up=0)
        found = {timing.name: timing for timing in timings} | found
    rows: list[Row] = [
        {
            "": name,
            "median ms": timing.row("TFLOP/s")["median ms"],
            f"x {BASELINE}": timing.ratio,
            "tokens/s": timing.rate,
        }
        for name, timing in sorted(found.items())
    ]
    return rows, {name: timing.seconds for name, timing in found.items()}


def _with_baseline(names: Sequence[str]) -> list[str]:
    return [BASELINE, *(name for name in names if name != BASELINE)]


def _on(device: str, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = models.load(models.resolve(name))
    return torch.nn.Module.to(model, device), tokenizer


Report = Callable[[Table], None]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_update(benchmark: BenchmarkFixture, report: Report) -> None:
    report(benchmark.pedantic(updates, (list(METHODS), FULL, DEVICE), rounds=1).tables[0])


def test_loss(benchmark: BenchmarkFixture, report: Report) -> None:
    report(benchmark.pedantic(losses, (list(METHODS), FULL, DEVICE), rounds=1).tables[0])


def test_learning(benchmark: BenchmarkFixture, report: Report) -> None:
    report(benchmark.pedantic(learned, (list(METHODS), FULL, DEVICE), rounds=1).tables[0])
