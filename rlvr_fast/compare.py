"""Two models on the same prompts: differences per prompt, with paired intervals."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from rlvr_fast import estimates
from rlvr_fast.config import EvalConfig
from rlvr_fast.evaluate import Answers, ask, by_task, ks_of, per_prompt, result
from rlvr_fast.tasks import Task, load_task


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean over prompts of one model's value less the other's, with its bootstrap interval.

    The interval covers other prompts of the same kind, both models asked the same ones. It is
    narrower than those of the two models suggest where both find the same prompts hard.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The first model less the second."""

    prompts: int
    better: int
    """Prompts on which the first model's mean reward is higher."""
    worse: int
    """Prompts on which it is lower."""
    differences: Mapping[str, Difference]
    """By the names of `evaluate.per_prompt`."""
    tasks: Mapping[str, "Comparison"] = field(default_factory=dict)
    """The same for each task of a mixture alone."""

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


def evaluate_models(
    models: Sequence[str], config: EvalConfig
) -> tuple[dict[str, Any], list[Mapping[str, Answers]]]:
    """What `rlvr-fast eval` reports of one model, or of one against another.

    Args:
        models: one or two folders, hub ids or names; the first one's gains count as positive.
        config: see `EvalConfig`.

    Returns:
        JSON values, and the answers of each model by kind. The values are those of
        `evaluate_model` for the first model; with two also `against`, the same for the second, and
        `difference`, a `Comparison` by kind.

    Raises:
        ValueError: for what a model or the task refuses, and for an impossible k.
    """
    with closing(load_task(config.task, config.task_options)) as task:
        answers = [ask(model, task, config) for model in models]
        values, *others = [
            result(model, task, config, found) for model, found in zip(models, answers, strict=True)
        ]
        if others:
            values["against"] = others[0]
            values["difference"] = {
                kind: compare(
                    task, found, answers[1][kind], ks=ks_of(kind, config), correct=config.correct
                ).to_json()
                for kind, found in answers[0].items()
            }
    return values, [*answers]


def compare(
    task: Task,
    first: Answers,
    second: Answers,
    *,
    ks: Sequence[int] = (),
    correct: float = 1.0,
) -> Comparison:
    """Compares the answers of two models to the same prompts, as many samples of each.

    Args:
        task: of the prompts.
        first: from the model whose gains count as positive.
        second: from the other one.
        ks: compare pass@k for these.
        correct: a completion with at least this reward counts as correct.

    Raises:
        ValueError: for answers to other examples, or to another number of them.
    """
    asked = [[group[0].prompt.example for group in answers] for answers in (first, second)]
    if asked[0] != asked[1]:
        raise ValueError(
            f"answers: wanted those of two models to the same prompts, got {len(first)} and "
            f"{len(second)} prompts, not all of them equal"
        )
    ours, theirs = (per_prompt(task, groups, ks=ks, correct=correct) for groups in (first, second))
    gains = {
        name: [a - b for a, b in zip(values, theirs[name], strict=True)]
        for name, values in ours.items()
    }
    parts = zip(by_task(task, first), by_task(task, second), strict=True)
    return Comparison(
        prompts=len(first),
        better=sum(gain > 0 for gain in gains["reward"]),
        worse=sum(gain < 0 for gain in gains["reward"]),
        differences={name: _difference(values) for name, values in gains.items()},
        tasks={
            tag: compare(part, own, other, ks=ks, correct=correct)
            for (tag, part, own), (_, _, other) in parts
        },
    )


def _difference(values: Sequence[float]) -> Difference:
    interval = estimates.bootstrap(values)
    return Difference(value=fmean(values), low=interval.low, high=interval.high)
