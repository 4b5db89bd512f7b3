"""Tasks: prompts to train on, prompts held out, and the reward function that judges both."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeAlias

from rlvr_fast.rewards import Message, RewardFunction
from rlvr_fast.rewards.answers import answer_key
from rlvr_fast.rewards.workers import VerifierPool

Prompt: TypeAlias = str | Sequence[Message]

NAMES = ("addition", "dataset", "mixture", "word_problems", "reasoning_gym:NAME")


@dataclass(frozen=True)
class Example:
    """One prompt and what its verification needs.

    Raises:
        ValueError: for `samples` that are no count.
    """

    prompt: Prompt
    """A string is used as it is; messages go through the tokenizer's chat template."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the reward function by name, one list entry per completion."""
    task: str = ""
    """Which task of a mixture it belongs to."""
    samples: int | None = None
    """Completions to sample in training; None: as many as of every other prompt."""

    def __post_init__(self) -> None:
        if self.samples is not None and not (type(self.samples) is int and self.samples >= 1):
            raise ValueError(f"samples: wanted an integer >= 1, got {self.samples!r}")


@dataclass(frozen=True)
class Task:
    """What `load_task` returns."""

    name: str
    train: Sequence[Example]
    evaluation: Sequence[Example]
    """Disjoint from `train`, unless no holdout was asked for: then the same."""
    reward: RewardFunction
    answer_key: Callable[[str], str | None] = answer_key
    """What a completion answers, for a majority vote: equal answers have equal keys. None: it
    answers nothing and does not vote."""
    parts: Mapping[str, "Task"] = field(default_factory=dict)
    """The tasks of a mixture by `Example.task`; empty for any other task."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of the parts, > 0: their shares of the training prompts."""

    def part(self, example: Example) -> "Task":
        """The task of a mixture that the example belongs to; of any other task, itself."""
        return self.parts[example.task] if self.parts else self

    def close(self) -> None:
        """Stop the workers of the reward function, if it has any."""
        for part in self.parts.values():
            part.close()
        if isinstance(self.reward, VerifierPool):
            self.reward.close()


def load_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task of that name, one of `NAMES`; each is a module of this package.

    Raises:
        ValueError: for an unknown name or option (the message lists those that exist, or names the
            nearest), and for an option value that makes no task.
        ImportError: where the package behind the task is missing.
        OSError: for a file that cannot be read.
    """
    family, _, dataset = name.partition(":")
    if family == "reasoning_gym" and dataset:
        from rlvr_fast.tasks import reasoning_gym

        return reasoning_gym.load(dataset, options)
    if name not in NAMES[:-1]:
        raise ValueError(f"task must be one of {', '.join(NAMES)}, got {name!r}")
    task: Task = import_module(f"rlvr_fast.tasks.{name}").load(options)
    return task


def check_options(task: str, options: Collection[str], known: Collection[str]) -> None:
    """Raise a ValueError that lists the `known` options if one of `options` is not among them."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"options of task {task} must be among {sorted(known)}, got {unknown}")


def user_message(text: str) -> list[Message]:
    """A chat of one message, the user's."""
    return [{"role": "user", "content": text}]
