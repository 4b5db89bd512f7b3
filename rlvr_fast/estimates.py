"""What a sample of completions says about a model: pass@k, majority votes, intervals of means.

Every interval here is for a mean over prompts and covers 95 %: other prompts of the same kind and,
with it, other completions of them. It says nothing about another training run.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 10_000
_SEED = 0
_CHUNK = 2**20  # random numbers at once


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Of a mean, at `LEVEL`."""

    low: float
    high: float
    kind: str
    """wilson or bootstrap."""


def mean_interval(values: Sequence[float]) -> Interval:
    """Of the mean of independent `values` `[P]`, P >= 1.

    Wilson's where every value is 0 or 1: unlike the bootstrap it has a width where all are equal.
    """
    if all(value in (0.0, 1.0) for value in values):
        return wilson(round(math.fsum(values)), len(values))
    return bootstrap(values)


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a share (1927), without continuity correction.

    Raises:
        ValueError: unless `0 <= successes <= trials` and `trials >= 1`.
    """
    if not (0 <= successes <= trials and trials >= 1):
        raise ValueError(f"successes: wanted 0 to {trials} of at least 1, got {successes}")
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = successes / trials
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    scale = 1 + z * z / trials
    return Interval(
        low=max(0.0, (middle - half) / scale) if successes else 0.0,
        high=min(1.0, (middle + half) / scale) if successes < trials else 1.0,
        kind="wilson",
    )


def bootstrap(values: Sequence[float]) -> Interval:
    """Percentile bootstrap: the middle `LEVEL` of the means of `RESAMPLES` draws of as many values.

    The draws are the same for every call with as many values. With few values it is too narrow.
    """
    drawn = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(_SEED)
    means: list[NDArray[np.float64]] = []
    rows = max(1, _CHUNK // len(drawn))
    for start in range(0, RESAMPLES, rows):
        shape = (min(rows, RESAMPLES - start), len(drawn))
        means.append(drawn[generator.integers(len(drawn), size=shape)].mean(axis=1))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(low=float(low), high=float(high), kind="bootstrap")


def majority(keys: Sequence[str | None]) -> int | None:
    """Where the answer that most give stands first; None if nobody answers.

    Args:
        keys: one per completion, equal for equal answers; None does not vote. Of answers with as
            many votes the one that comes first wins.
    """
    votes = Counter(key for key in keys if key is not None)
    if not votes:
        return None
    most = max(votes.values())
    return next(i for i, key in enumerate(keys) if key is not None and votes[key] == most)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k is correct) from `correct` of `samples`.

    `1 - C(n - c, k) / C(n, k)` as the product of equation 1 and figure 3 of Chen et al.
    (2107.03374), which neither overflows nor cancels.

    Raises:
        ValueError: unless `0 <= correct <= samples` and `1 <= k <= samples`.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(
            f"pass@k: wanted 0 <= correct <= samples and 1 <= k <= samples, "
            f"got {correct} of {samples} and k {k}"
        )
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))
