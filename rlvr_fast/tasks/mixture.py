"""Several tasks at once, each with its share of the training prompts.

    task = "mixture"

    [task_options.addition]
    weight = 0.7
    options = { high = 50 }

    [task_options.words]
    task = "word_problems"
    weight = 0.3

The name of a table is the tag of its examples, and the task itself unless `task` names another.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from typing import Any

from rlvr_fast import options as settings
from rlvr_fast.rewards import Completion
from rlvr_fast.tasks import Example, Task, load_task

TAG = "mixture_task"
"""The column that tells the reward function whose completion it has."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One task of a mixture."""

    task: str = ""
    """Its name; empty: that of the table."""
    weight: float = 1.0
    """Its share of the training prompts, relative to the other weights."""
    options: settings.Table = field(default_factory=dict)
    """Table of the task's own options."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight: wanted > 0 and finite, got {self.weight}")


def load(options: Mapping[str, Any]) -> Task:
    """The task `mixture`: a table of `Part` for every tag.

    Examples to evaluate on come in turns, one of every task, so that the first few of them are a
    fair choice. Without holdouts they are the training examples.

    Raises:
        ValueError: for no task at all, for what is no table, and for what a task refuses.
        ImportError: where the package behind a task is missing.
        OSError: for a file that cannot be read.
    """
    if not options:
        raise ValueError("task_options: wanted a table for each task of the mixture, got none")
    chosen = {tag: _part(tag, values) for tag, values in options.items()}
    parts: dict[str, Task] = {}
    for tag, part in chosen.items():
        try:
            parts[tag] = load_task(part.task or tag, part.options)
        except (ValueError, ImportError, OSError) as error:
            kind = next(k for k in (ValueError, ImportError, OSError) if isinstance(error, k))
            raise kind(f"task {tag} of the mixture: {error}") from error
    train = list(_in_turns(_tagged(tag, task.train) for tag, task in parts.items()))
    evaluation = list(_in_turns(_tagged(tag, task.evaluation) for tag, task in parts.items()))
    if all(task.evaluation is task.train for task in parts.values()):
        evaluation = train
    weights = {tag: part.weight for tag, part in chosen.items()}
    reward = MixtureReward(parts)
    return Task("mixture", train, evaluation, reward, parts=parts, weights=weights)


class MixtureReward:
    """A reward function that has every completion judged by the task that it belongs to."""

    def __init__(self, parts: Mapping[str, Task]) -> None:
        self._parts = parts
        self._columns = {
            tag: sorted({name for e in chain(task.train, task.evaluation) for name in e.columns})
            for tag, task in parts.items()
        }

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Sequence[Any]
    ) -> list[float | None]:
        """Rewards `[S]`; a task sees its own completions and columns only."""
        tags = columns[TAG]
        rewards: list[float | None] = [None] * len(tags)
        for tag, task in self._parts.items():
            own = [index for index, other in enumerate(tags) if other == tag]
            if not own:
                continue
            found = task.reward(
                prompts=[prompts[index] for index in own],
                completions=[completions[index] for index in own],
                **{name: [columns[name][index] for index in own] for name in self._columns[tag]},
            )
            for index, reward in zip(own, found, strict=True):
                rewards[index] = reward
        return rewards


def _part(tag: str, values: object) -> Part:
    if not tag or not isinstance(values, Mapping):
        raise ValueError(f"task_options.{tag}: wanted a table of a task, got {values!r}")
    part = settings.build(f"option of task {tag} of the mixture", Part, values)
    if (part.task or tag) == "mixture":
        raise ValueError(f"task_options.{tag}: wanted a task that is no mixture itself")
    return part


def _tagged(tag: str, examples: Sequence[Example]) -> Iterator[Example]:
    for example in examples:
        if TAG in example.columns:
            raise ValueError(f"task {tag} of the mixture: wanted no column named {TAG}")
        yield replace(example, columns={**example.columns, TAG: tag}, task=tag)


def _in_turns(parts: Iterator[Iterator[Example]]) -> Iterator[Example]:
    """One of each, until none has any left."""
    for turn in zip_longest(*parts):
        yield from (example for example in turn if example is not None)
