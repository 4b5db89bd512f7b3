"""Tasks: prompts to train on, prompts held out, and the reward function that judges both."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rlvr_fast.rewards import Message, RewardFunction
from rlvr_fast.rewards.workers import VerifierPool

Prompt: TypeAlias = str | Sequence[Message]


@dataclass(frozen=True)
class Example:
    """One prompt and what its verification needs."""

    prompt: Prompt
    """A string is used as it is; messages go through the tokenizer's chat template."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the reward function by name, one list entry per completion."""


@dataclass(frozen=True)
class Task:
    """What `load_task` returns."""

    name: str
    train: Sequence[Example]
    evaluation: Sequence[Example]
    """Disjoint from `train`, unless no holdout was asked for: then the same."""
    reward: RewardFunction

    def close(self) -> None:
        """Stop the worker of the reward function, if it has one."""
        if isinstance(self.reward, VerifierPool):
            self.reward.close()


def load_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task of that name: `addition`, or `reasoning_gym:NAME` for a dataset of reasoning-gym.

    Raises:
        ValueError: for an unknown name or option (the message lists those that exist), and for an
            option value that makes no task.
        ImportError: where the package behind the task is missing.
    """
    from rlvr_fast.tasks import addition, reasoning_gym

    family, _, dataset = name.partition(":")
    if name == "addition":
        return addition.load(options)
    if family == "reasoning_gym" and dataset:
        return reasoning_gym.load(dataset, options)
    raise ValueError(f"task must be `addition` or `reasoning_gym:NAME`, got {name!r}")


def check_options(task: str, options: Collection[str], known: Collection[str]) -> None:
    """Raise a ValueError that lists the `known` options if one of `options` is not among them."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"options of task {task} must be among {sorted(known)}, got {unknown}")


def user_message(text: str) -> list[Message]:
    """A chat of one message, the user's."""
    return [{"role": "user", "content": text}]
