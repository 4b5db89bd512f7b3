"""Reward for mathematics: does the completion's final answer equal the known one?"""

import logging

from rlvr_fast.rewards._sandbox import Limits
from rlvr_fast.rewards.workers import VerifierPool

_ENVIRONMENTS = ("\\boxed", "$", "\\(", "\\[")


def math_reward(limits: Limits | None = None, *, workers: int | None = None) -> VerifierPool:
    """A reward function over the column `answer`: 1.0, 0.0, or None where `answer` is unreadable.

    Args:
        limits: of one completion.
        workers: completions verified at the same time.

    Raises:
        ImportError: without the package math-verify.
    """
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        raise ImportError("math_reward needs math-verify: pip install math-verify") from error
    return VerifierPool(
        verify_answer,
        limits,
        workers=workers,
        warm_up=(r"$x = 1$, so \boxed{2^3}", {"answer": "8"}),
    )


def verify_answer(completion: str, answer: str) -> float | None:
    """Whether math-verify finds `answer`, LaTeX or plain, to be what the completion ends with.

    Several boxed answers count as the set of them, so listing guesses does not pay. No protection
    of its own: parsing evaluates text, without a time limit.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the missing time limit
    is_latex = any(mark in answer for mark in _ENVIRONMENTS)
    gold = parse(answer if is_latex else f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not gold:
        return None
    boxed_first = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    found = parse(completion, boxed_first, parsing_timeout=None)
    return float(verify(gold, found, timeout_seconds=None))
