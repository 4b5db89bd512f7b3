"""Reward functions by name: those that come along, and the user's own."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rlvr_fast.rewards import RewardFunction, answers

Key = Callable[[str], str | None]


@dataclass(frozen=True)
class Named:
    """A reward function and what goes with it."""

    reward: RewardFunction
    answer_key: Key = answers.answer_key
    """Of a completion, for a majority vote."""
    needs: str = ""
    """What the column `answer` must hold: text, a number, or anything where this is empty."""


_PLAIN: Mapping[str, Named] = {
    "exact": Named(answers.exact_reward, answers.text_key, "text"),
    "number": Named(answers.number_reward, answers.number_key, "a number"),
    "contains": Named(answers.contains_reward, answers.answer_key, "text"),
}


def load_reward(name: str) -> Named:
    """The reward function of that name.

    Args:
        name: `exact`, `number` or `contains` (see `answers`), `math` (math-verify in confined
            workers), or the user's own as `module:function` or `path/to/file.py:function`. That one
            has TRL's signature and runs in the trainer's process: a verifier that parses what a
            model wrote belongs in a `VerifierPool`, which may be named here as well.

    Raises:
        ValueError: for an unknown name, and for what is no reward function.
        ImportError: where the package behind it is missing, or its module.
        FileNotFoundError: where its file is missing.
    """
    if name in _PLAIN:
        return _PLAIN[name]
    if name == "math":
        from rlvr_fast.rewards.math import math_reward

        return Named(math_reward(), answers.answer_key, "text")
    place, colon, attribute = name.rpartition(":")
    if not (colon and place and attribute):
        known = ", ".join([*_PLAIN, "math"])
        raise ValueError(f"reward: wanted one of {known} or module:function, got {name!r}")
    found = getattr(_module(place), attribute, None)
    if not callable(found) or inspect.iscoroutinefunction(found):
        raise ValueError(f"reward: wanted a plain function {attribute} in {place}, got {found!r}")
    return Named(found)


def check_takes(reward: RewardFunction, columns: Iterable[str]) -> None:
    """Raises a ValueError unless the function can be called with these columns."""
    signature = inspect.signature(reward)
    given: dict[str, Any] = dict.fromkeys(["prompts", "completions", *columns])
    try:
        signature.bind(**given)
    except TypeError as error:
        name = getattr(reward, "__name__", type(reward).__name__)
        raise ValueError(
            f"reward: wanted a function of {', '.join(given)}, got {name} of "
            f"{', '.join(map(str, signature.parameters))}: {error}"
        ) from None


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        try:
            return import_module(place)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"reward: wanted a module that can be imported or a path/to/file.py, "
                f"got {place}: {error}"
            ) from error
    path = Path(place).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"reward: wanted a Python file, got {place}")
    if str(path.parent) not in sys.path:
        # Last, so that it hides nothing; the worker of a `VerifierPool` looks there, too.
        sys.path.append(str(path.parent))
    module = import_module(path.stem)
    if Path(getattr(module, "__file__", None) or "").resolve() != path:
        raise ValueError(f"reward: wanted a file named unlike any other module, got {place}")
    return module
