"""Sums of two small numbers: the smallest task on which a small model visibly learns."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from rlvr_fast.rewards import Completion, completion_text
from rlvr_fast.tasks import Example, Task, check_options, user_message

_REVERSED_INTEGER = re.compile("[0-9]+-?")
_MOST_CHARACTERS = 100  # of an integer that is worth converting; int() is quadratic in them


@dataclass(frozen=True, kw_only=True)
class AdditionOptions:
    """Which sums there are and how they are asked."""

    low: int = 1
    high: int = 20
    """Both numbers run from `low` to `high`, inclusive; every pair is one example."""
    chat: bool = True
    """Ask in a user message; else the prompt is a plain string."""
    template: str = ""
    """Must hold {a} and {b}; empty means "What is {a} + {b}?" in a chat and "{a}+{b}=" outside."""
    holdout: int = 64
    """Number of pairs held out for evaluation; 0 evaluates on the training pairs."""
    seed: int = 0
    """Of the split."""

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low must be at most high, got {self.low} and {self.high}")
        pairs = (self.high - self.low + 1) ** 2
        if not 0 <= self.holdout < pairs:
            raise ValueError(
                f"holdout must be in [0, {pairs}) of {pairs} pairs, got {self.holdout}"
            )
        if self.template and not ("{a}" in self.template and "{b}" in self.template):
            raise ValueError(f"template must hold {{a}} and {{b}}, got {self.template!r}")


def load(options: Mapping[str, Any]) -> Task:
    """The task `addition` with `options` of `AdditionOptions`.

    Raises:
        ValueError: for an unknown option or a value that makes no task.
    """
    check_options("addition", options, [field.name for field in fields(AdditionOptions)])
    chosen = AdditionOptions(**options)
    numbers = range(chosen.low, chosen.high + 1)
    examples = [_example(a, b, chosen) for a, b in product(numbers, numbers)]
    random.Random(chosen.seed).shuffle(examples)
    train = examples[chosen.holdout :]
    held_out = examples[: chosen.holdout] or train
    return Task("addition", train, held_out, sum_reward, integer_key)


def sum_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    answer: Sequence[int],
    **columns: Any,
) -> list[float]:
    """1.0 where the last integer of a completion is `answer`, else 0.0; `[S]`."""
    return [
        float(last_integer(completion_text(completion)) == wanted)
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def last_integer(text: str) -> int | None:
    """The last run of digits, with a minus sign right before it; None if absent or absurdly long.

    Cost: linear in the text, whatever it holds. (The same pattern without reversal is quadratic.)
    """
    match = _REVERSED_INTEGER.search(text[::-1])
    if match is None or len(match.group()) > _MOST_CHARACTERS:
        return None
    return int(match.group()[::-1])


def integer_key(text: str) -> str | None:
    """The last integer as text: what a majority vote counts."""
    integer = last_integer(text)
    return None if integer is None else str(integer)


def _example(a: int, b: int, options: AdditionOptions) -> Example:
    template = options.template or ("What is {a} + {b}?" if options.chat else "{a}+{b}=")
    text = template.replace("{a}", str(a)).replace("{b}", str(b))
    return Example(user_message(text) if options.chat else text, {"answer": a + b})
