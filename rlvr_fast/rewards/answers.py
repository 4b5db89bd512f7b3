"""Rewards for answers that compare as text or as a number, in the trainer's own process.

Nothing here evaluates text, and every function is linear in the completion, whatever it holds.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from rlvr_fast.rewards import Completion, completion_text

_BOXED = "\\boxed{"
_MOST_CHARACTERS = 100  # of a number that is worth converting
# Read from the right: a fraction, digits in threes or without commas, a sign that is no hyphen.
_REVERSED_NUMBER = re.compile(
    r"(?:[0-9]+\.)?"
    r"(?:(?:[0-9]{3},){1,40}[0-9]{1,3}(?![0-9,])|[0-9]+)"
    r"(?:[-\u2212](?![0-9A-Za-z)]))?"
)


def exact_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    answer: Sequence[Any],
    **columns: Any,
) -> list[float]:
    """1.0 where the final answer is `answer`, letter by letter but for white space; `[S]`."""
    return [
        float(collapsed(final_answer(completion_text(completion))) == collapsed(str(wanted)))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def number_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    answer: Sequence[Any],
    **columns: Any,
) -> list[float | None]:
    """1.0 where the last number of the final answer equals the last one of `answer`; `[S]`.

    72, 72.0 and $72 are equal, so are 1,234 and 1234. None where `answer` holds no number.
    """
    rewards: list[float | None] = []
    for completion, wanted in zip(completions, answer, strict=True):
        number = last_number(str(wanted))
        found = last_number(final_answer(completion_text(completion)))
        rewards.append(None if number is None else float(found == number))
    return rewards


def contains_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    *,
    answer: Sequence[Any],
    **columns: Any,
) -> list[float]:
    """1.0 where `answer` occurs anywhere as whole words, in upper or lower case; `[S]`.

    It pays to list guesses: `exact_reward` is harder to fool.
    """
    return [
        float(_occurs(_comparable(str(wanted)), _comparable(completion_text(completion))))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def answer_key(text: str) -> str | None:
    """What the text answers, where no task knows better; None where it answers nothing.

    The inside of the last <answer> tags, else of the last \\boxed{}, else the last number, else all
    of the text. Case and white space do not count, nor does how a number is written.
    """
    tagged = final_answer(text)
    if tagged == text.strip():
        boxed = last_boxed(text)
        number = last_number(text)
        tagged = boxed if boxed is not None else text if number is None else str(number)
    return text_key(tagged)


def text_key(text: str) -> str | None:
    """The final answer, without regard to case and white space; a number in its shortest form."""
    key = _comparable(final_answer(text))
    match = _REVERSED_NUMBER.fullmatch(key[::-1]) if len(key) <= _MOST_CHARACTERS else None
    return number_key(key) if match else key or None


def number_key(text: str) -> str | None:
    """The last number of the final answer in its shortest form."""
    number = last_number(final_answer(text))
    if number is None:
        return None
    whole, point, fraction = f"{number:f}".partition(".")
    return (whole + point + fraction.rstrip("0")).rstrip(".")


def final_answer(completion: str) -> str:
    """What stands inside the last `<answer>...</answer>`, else everything; stripped."""
    before, closed, _ = completion.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    return (inside if closed and opened else completion).strip()


def last_boxed(text: str) -> str | None:
    """The inside of the last \\boxed{}; None if there is none or it does not end."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    start += len(_BOXED)
    depth = 1
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start : start + brace.start()].strip()
    return None


def last_number(text: str) -> Decimal | None:
    """The last decimal number; None if there is none, or one that is absurdly long."""
    match = _REVERSED_NUMBER.search(text[::-1])
    if match is None or len(match.group()) > _MOST_CHARACTERS:
        return None
    return Decimal(match.group()[::-1].replace(",", "").replace("\u2212", "-"))


def collapsed(text: str) -> str:
    """Without white space at the ends, and one space for any inside."""
    return " ".join(text.split())


def _comparable(text: str) -> str:
    return collapsed(text).casefold()


def _occurs(wanted: str, text: str) -> bool:
    """Whether `wanted` stands in the text with no letter or digit right before or after it."""
    start = text.find(wanted) if wanted else -1
    while start >= 0:
        end = start + len(wanted)
        before, after = text[start - 1 : start], text[end : end + 1]
        if not before.isalnum() and not after.isalnum():
            return True
        start = text.find(wanted, start + 1)
    return False
