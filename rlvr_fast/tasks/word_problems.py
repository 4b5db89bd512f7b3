"""Word problems of grade school, made up on the spot: "Tom has 7 apples. He buys 5 more. ..."

Short enough for a model of 135M parameters; the answer is the last integer of a completion.
"""

import operator
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlvr_fast import options as settings
from rlvr_fast.tasks import Example, Task, user_message
from rlvr_fast.tasks.addition import integer_key, sum_reward

_NAMES = {"He": ("Tom", "Ben", "Sam", "Max", "Leo"), "She": ("Ann", "Mia", "Eva", "Zoe", "Lea")}
_THINGS = ("apples", "books", "coins", "marbles", "stamps", "shells", "cards", "pencils")
_STORIES = {
    "add": (
        "{He} buys {n} more.",
        "{He} finds {n} more.",
        "A friend gives {him} {n} more.",
        "{He} wins {n} more.",
    ),
    "subtract": (
        "{He} gives away {n}.",
        "{He} loses {n}.",
        "{He} sells {n}.",
        "A friend takes {n}.",
    ),
    "multiply": (
        "{He} trades each of them for {n} new ones.",
        "A wizard turns each of them into {n}.",
    ),
    "divide": (
        "{He} makes {n} equal heaps and keeps only one.",
        "{He} splits them among {n} equal boxes and keeps one box.",
    ),
}
_OBJECT = {"He": "him", "She": "her"}
_APPLY: Mapping[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "divide": operator.floordiv,
}
_FACTORS = range(2, 6)
_ATTEMPTS = 1000  # in a row at a problem that was not there yet


@dataclass(frozen=True, kw_only=True)
class WordProblemOptions:
    """Which problems are made up."""

    steps: int = 2
    """Things that happen before the question: the difficulty."""
    operations: str = "add,subtract"
    """What may happen, separated by commas: add, subtract, multiply, divide."""
    most: int = 20
    """Largest number in a problem; factors are at most 5, and no product is beyond 50 times it."""
    chat: bool = True
    """Ask in a user message; else the prompt is a plain string."""
    size: int = 2000
    """Problems to train on."""
    holdout: int = 64
    """Others to evaluate on, with other numbers or steps; 0 evaluates on the training problems."""
    seed: int = 0
    """Of all of them."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("most", 5), ("size", 1), ("holdout", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: wanted >= {least}, got {getattr(self, name)}")
        for operation in self.chosen_operations:
            settings.check_known("operation of word_problems", operation, _STORIES)

    @property
    def chosen_operations(self) -> list[str]:
        return self.operations.split(",")


class _Sum(NamedTuple):
    """A problem without its words."""

    start: int
    steps: tuple[tuple[str, int], ...]
    """Operation and number."""
    result: int


def load(options: Mapping[str, Any]) -> Task:
    """The task `word_problems` with `options` of `WordProblemOptions`.

    No problem comes twice, and none to train on has the numbers and steps of one held out.

    Raises:
        ValueError: for an unknown option or a value that makes no task, such as a `size` beyond
            what there is.
    """
    chosen = settings.build("option of task word_problems", WordProblemOptions, options)
    draw = random.Random(chosen.seed)
    held_out = _problems(draw, chosen, chosen.holdout, frozenset())
    train = _problems(draw, chosen, chosen.size, frozenset(held_out.values()))
    examples, evaluation = (
        [_example(text, problem.result, chosen) for text, problem in problems.items()]
        for problems in (train, held_out)
    )
    return Task("word_problems", examples, evaluation or examples, sum_reward, integer_key)


def _problems(
    draw: random.Random, options: WordProblemOptions, count: int, avoided: Collection[_Sum]
) -> dict[str, _Sum]:
    """`count` of them by text."""
    found: dict[str, _Sum] = {}
    failures = 0
    while len(found) < count:
        problem = _drawn(draw, options)
        text = "" if problem is None or problem in avoided else _told(draw, problem)
        failures = 0 if text and text not in found else failures + 1
        if failures > _ATTEMPTS:
            raise ValueError(
                f"size and holdout: wanted no more problems than there are with {options.steps} "
                f"steps of {options.operations}, about {len(found)}, got {count}"
            )
        if problem is not None and failures == 0:
            found[text] = problem
    return found


def _drawn(draw: random.Random, options: WordProblemOptions) -> _Sum | None:
    """None where no operation was possible any more."""
    start = value = draw.randint(2, options.most)
    steps = []
    for _ in range(options.steps):
        numbers = {
            "add": range(1, options.most + 1),
            "subtract": range(1, min(value, options.most + 1)),
            "multiply": [n for n in _FACTORS if value * n <= 50 * options.most],
            "divide": [n for n in _FACTORS if value % n == 0],
        }
        possible = [name for name in options.chosen_operations if numbers[name]]
        if not possible:
            return None
        operation = draw.choice(possible)
        number = draw.choice(numbers[operation])
        steps.append((operation, number))
        value = _APPLY[operation](value, number)
    return _Sum(start, tuple(steps), value)


def _told(draw: random.Random, problem: _Sum) -> str:
    pronoun = draw.choice(list(_NAMES))
    name, things = draw.choice(_NAMES[pronoun]), draw.choice(_THINGS)
    sentences = [f"{name} has {problem.start} {things}."]
    for operation, number in problem.steps:
        sentence = draw.choice(_STORIES[operation])
        for word, by in (("{He}", pronoun), ("{him}", _OBJECT[pronoun]), ("{n}", str(number))):
            sentence = sentence.replace(word, by)
        sentences.append(sentence)
    return " ".join([*sentences, f"How many {things} does {name} have now?"])


def _example(text: str, result: int, options: WordProblemOptions) -> Example:
    columns = {"answer": result}
    if options.chat:
        return Example(user_message(f"{text} Reply with the number only."), columns)
    return Example(f"{text} Answer:", columns)
