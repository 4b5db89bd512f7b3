"""Reward functions: what turns completions into numbers.

A reward function has the signature of TRL's, so either library runs the other's:
`fn(prompts, completions, **columns)`, where every column is a list with one entry per completion
and the result holds one reward per completion, or None where a completion cannot be scored.

A verifier that parses what a model wrote belongs in `rlvr_fast.rewards.workers.VerifierPool`.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite  # `math` in this namespace is our own submodule
from numbers import Real
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, str]
Completion: TypeAlias = str | Sequence[Message]
RewardFunction: TypeAlias = Callable[..., Sequence[float | None]]


def score(
    reward: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    columns: Mapping[str, Sequence[Any]],
) -> list[float | None]:
    """Rewards of a batch of completions, checked.

    Args:
        reward: called with keywords only: `prompts`, `completions` and every column.
        prompts: `[S]`, the prompt of each completion.
        completions: `[S]`.
        columns: by name, `[S]` each.

    Returns:
        `[S]` finite floats; None where the reward function says that it cannot score.

    Raises:
        ValueError: for a list whose length is not S, and for a reward that is no finite number.
    """
    wanted = len(completions)
    _check_length("prompts", prompts, wanted)
    for name, column in columns.items():
        _check_length(f"column {name!r}", column, wanted)
    rewards = reward(prompts=prompts, completions=completions, **columns)
    name = getattr(reward, "__name__", type(reward).__name__)
    _check_length(f"the result of reward function {name!r}", rewards, wanted)
    return [_checked(value, name, index) for index, value in enumerate(rewards)]


def completion_text(completion: Completion) -> str:
    """The text to verify: a plain completion itself, else what the last message says."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _check_length(what: str, values: Sequence[Any], wanted: int) -> None:
    if len(values) != wanted:
        raise ValueError(
            f"{what} must hold {wanted} entries, one per completion, got {len(values)}"
        )


def _checked(value: Any, name: str, index: int) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real) or not isfinite(value):
        raise ValueError(
            f"reward function {name!r} must return finite numbers or None, "
            f"got {value!r} for completion {index}"
        )
    return float(value)
