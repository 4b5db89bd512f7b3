"""The parts of the report: which problems, which contenders, in which order.

A part yields cases; `suite.py` runs them as time and memory allow. The first case of a part is the
one that matters most.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from benches import measure, shapes
from benches.cases import Plan, plan, run_case
from benches.contenders import EVERYBODY, OURS, SCORERS, SWEPT
from benches.other_cases import accuracy, divergence, row_sweeps, scoring, skipping
from benches.problems import problem
from benches.report import Entry
from benches.shapes import Head, Workload


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large the problems are on one kind of device."""

    head: Head
    tokens: int
    """Of the main shape."""
    token_sweep: tuple[int, ...]
    if_time: tuple[int, ...] = ()
    """Of the token sweep, only with the time that the others leave over."""
    hidden_sweep: tuple[int, ...]
    vocab_sweep: tuple[int, ...]
    model_tokens: int
    """For the heads of all models."""


SCALES = {
    "cpu": Scale(
        head=shapes.BY_MODEL["SmolLM2-135M"],
        tokens=1024,
        token_sweep=(1024, 256, 512, 2048, 4096, 8192, 16384),
        if_time=(8192, 16384),
        hidden_sweep=(256, 576, 1024, 2048),
        vocab_sweep=(8192, 16384, 32768, 65536, 131072),
        model_tokens=128,
    ),
    "cuda": Scale(
        head=shapes.BY_MODEL["Qwen2.5-1.5B"],
        tokens=32768,
        token_sweep=(32768, 1024, 2048, 4096, 8192, 16384, 65536),
        hidden_sweep=(512, 1024, 2048, 4096),
        vocab_sweep=(16384, 32768, 65536, 131072, 262144),
        model_tokens=16384,
    ),
}
QUICK = {
    "cpu": Scale(
        head=Head(model="tiny", hidden_size=64, vocab_size=1000),
        tokens=160,
        token_sweep=(160, 80),
        hidden_sweep=(32, 64),
        vocab_sweep=(512, 1000),
        model_tokens=0,
    ),
    "cuda": replace(
        SCALES["cuda"],
        head=shapes.BY_MODEL["Qwen2.5-0.5B"],
        tokens=8192,
        token_sweep=(8192, 2048),
        hidden_sweep=(512, 1024),
        vocab_sweep=(16384, 65536),
        model_tokens=0,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a case may use."""

    device: str
    scale: Scale
    rate: float
    """Flops per second of a bf16 GEMM."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement; saved as `part: name`."""

    name: str
    run: Callable[[float], Entry]
    """Takes the seconds that it may spend."""
    share: float = 1.0
    """Of the time of its part, relative to the other cases; 0: only what they leave over."""


Part = Callable[[Machine], Iterator[Case]]
Shape = tuple[int, int, int]
"""T, D, V."""


def head_case(on: Machine, name: str, names: list[str], shape: Shape, workload: Workload) -> Case:
    """policy_loss and `names` on one problem."""

    def run(seconds: float) -> Entry:
        chosen: Plan = plan(
            [EVERYBODY[n] for n in names],
            shape,
            on.device,
            seconds=seconds,
            rate=on.rate,
            memory=measure.free_bytes(on.device),
            padding=workload.padding,
        )
        if not chosen.contenders:
            return Entry(left_out=chosen.left_out)
        given = problem(*shape, workload=workload, device=on.device)
        entry = run_case(given, chosen.contenders, seconds=seconds)
        return replace(entry, left_out=[*chosen.left_out, *entry.left_out])

    return Case(name=name, run=run)


def sweep(on: Machine, cases: Iterable[tuple[str, Shape]]) -> Iterator[Case]:
    """The curves' contenders on many shapes, the time shared by size."""
    for name, shape in cases:
        case = head_case(on, name, SWEPT, shape, shapes.DENSE)
        yield replace(case, share=0.0 if shape[0] in on.scale.if_time else math.prod(shape))


def main_shape(on: Machine) -> Shape:
    head = on.scale.head
    return (on.scale.tokens, head.hidden_size, head.vocab_size)


def policy_loss_part(on: Machine) -> Iterator[Case]:
    """Everybody at the main shape."""
    yield head_case(on, "dense", list(EVERYBODY), main_shape(on), shapes.DENSE)


def tokens_part(on: Machine) -> Iterator[Case]:
    _, hidden_size, vocab_size = main_shape(on)
    yield from sweep(on, ((f"T={t}", (t, hidden_size, vocab_size)) for t in on.scale.token_sweep))


def hidden_part(on: Machine) -> Iterator[Case]:
    tokens, _, vocab_size = main_shape(on)
    sizes = on.scale.hidden_sweep
    yield from sweep(on, ((f"D={size}", (tokens // 2, size, vocab_size)) for size in sizes))


def vocabulary_part(on: Machine) -> Iterator[Case]:
    tokens, hidden_size, _ = main_shape(on)
    sizes = on.scale.vocab_sweep
    yield from sweep(on, ((f"V={size}", (tokens // 2, hidden_size, size)) for size in sizes))


def models_part(on: Machine) -> Iterator[Case]:
    """The heads of real models."""
    tokens = on.scale.model_tokens
    if tokens:
        yield from sweep(on, ((name, (tokens, *size)) for size, name in shapes.by_shape().items()))


def lengths_part(on: Machine) -> Iterator[Case]:
    """Log-normal lengths: who wants them padded works on the padding too."""
    yield head_case(on, "log-normal", SWEPT, main_shape(on), shapes.LENGTHS)


def low_entropy_part(on: Machine) -> Iterator[Case]:
    yield head_case(on, "80 % sure", SWEPT, main_shape(on), shapes.LOW_ENTROPY)


def skipping_part(on: Machine) -> Iterator[Case]:
    run = partial(skipping, main_shape(on), on.device, on.rate)
    yield Case(name="zero advantages", run=run)
    names = [OURS, f"{OURS}, score_all", "TRL op", "Liger fused GRPO"]
    half = shapes.zero_advantage(0.5)
    yield head_case(on, "half of the groups", names, main_shape(on), half)


def scoring_part(on: Machine) -> Iterator[Case]:
    contenders = [EVERYBODY[name] for name in SCORERS]
    run = partial(scoring, main_shape(on), on.device, on.rate, contenders)
    yield Case(name="forward only", run=run)


def rows_part(on: Machine) -> Iterator[Case]:
    yield Case(name="sweeps", run=partial(row_sweeps, main_shape(on), on.device))


def linear_kl_part(on: Machine) -> Iterator[Case]:
    yield Case(name="forward", run=partial(divergence, main_shape(on), on.device, on.rate))


def accuracy_part(on: Machine) -> Iterator[Case]:
    contenders = list(EVERYBODY.values())
    _, hidden_size, vocab_size = main_shape(on)
    run = partial(accuracy, hidden_size, vocab_size, on.device, contenders)
    yield Case(name="fp64", run=run)


PARTS: dict[str, tuple[Part, float]] = {
    "accuracy": (accuracy_part, 5.0),
    "rows": (rows_part, 2.0),
    "scoring": (scoring_part, 5.0),
    "skipping": (skipping_part, 8.0),
    "policy_loss": (policy_loss_part, 18.0),
    "linear_kl": (linear_kl_part, 4.0),
    "tokens": (tokens_part, 30.0),
    "lengths": (lengths_part, 5.0),
    "low-entropy": (low_entropy_part, 5.0),
    "models": (models_part, 14.0),
    "hidden": (hidden_part, 5.0),
    "vocabulary": (vocabulary_part, 5.0),
}
"""By name, with the share of the time; what a part leaves over goes to the next."""
