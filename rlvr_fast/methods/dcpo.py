"""Dynamic clipping, advantages smoothed over a prompt's visits (DCPO, 2509.02333).

Three things differ from GRPO: the clip bounds of a token depend on how likely it was, the
advantage looks back at all earlier groups of the prompt, and responses are summed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.methods.base import (
    BatchShape,
    Evidence,
    Method,
    Paper,
    net_rewards,
    with_advantages,
)
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.objectives import DynamicClipSurrogate, Objective
from rlvr_fast.ops.group_advantages import GroupNormalisation


class Seen(NamedTuple):
    """The rewards of a prompt so far; unscored responses are not among them."""

    mean: float
    variance: float
    responses: int
    visits: int


@dataclass(frozen=True, kw_only=True)
class DCPO(Method):
    """`|r - 1| r q` is bounded instead of `|r - 1|`, `q` the old probability of the token.

    On visit `i` of a prompt `A_n = (R - mean_n) / std_n` uses this group's statistics and
    `A_T = (R - mean_T) / std_T` those of all its groups up to now, each 0 where its std is. Of
    `((i - 1) A_n + A_T) / i` and `(A_n + (i - 1) A_T) / i` the smaller one counts, per response.
    So a group whose rewards are all equal teaches something from the second visit on.

    The statistics are merged from visit to visit, weighed by responses: for groups of one size
    this is the paper's recursion, and with ddof 0 they are those of all responses together,
    whatever the sizes. With ddof 1, as in the authors' code, the recursion takes in unbiased
    variances and its result is not the variance of all responses.

    Rewards in the paper: 1 for correct, 0 for wrong, -1 for a bad format. What is remembered is
    part of every checkpoint.
    """

    paper: ClassVar[Paper] = Paper(
        source="2509.02333, equations 4 to 8",
        formula="-min(r A, clip(r, low(q), high(q)) A), A smoothed over visits; sum of means",
        evidence=Evidence.CODE,
        reconstructed=("groups of unequal size are merged by responses instead of by visits",),
    )

    clip_low: float = 0.16
    """The ratio r counts while r (1 - r) q <= clip_low; below q = 4 clip_low: down to 1/2."""
    clip_high: float = 0.20
    """The ratio r counts while r (r - 1) q <= clip_high."""
    max_ratio: float = 10.0
    """The upper bound is never above it; also the dual clip of negative advantages."""
    smoothing: bool = True
    """Advantages look back at earlier visits; false: at the group only, and nothing is remembered
    (as the authors' script runs)."""
    ddof: int = 0
    """Of the standard deviations: 0 divides by n, as in the paper, 1 by n - 1, as in the code."""
    scale: float = 1.0
    """Of the sum over responses of their token means. 1 is the paper's; the code's loss, with one
    response in a micro-batch, is 1 / responses of an update. AdamW hardly notices a constant, but
    max_grad_norm does."""

    _seen: dict[str, Seen] = field(default_factory=dict, init=False, repr=False, compare=False)
    """By the prompt's index."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high")
        if not self.max_ratio >= 1:
            raise ValueError(f"max_ratio: wanted >= 1, got {self.max_ratio}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale: wanted > 0 and finite, got {self.scale}")
        self.normalisation()

    def advantages(self, groups: Groups) -> Groups:
        if not self.smoothing:
            return super().advantages(groups)
        rewards = iter(net_rewards(groups).tolist())
        values: list[float] = []
        for group in groups:
            key = str(group[0].prompt.index)
            values += self._smoothed(key, [next(rewards) for _ in group])
        return with_advantages(groups, torch.tensor(values, dtype=torch.float64))

    def normalisation(self) -> GroupNormalisation:
        return GroupNormalisation(ddof=self.ddof, eps=0.0)

    def seq_weights(self, shape: BatchShape) -> Tensor:
        return aggregate.mean_per_sequence(shape.seq_lengths, scale=self.scale)

    def objective(self) -> Objective:
        return DynamicClipSurrogate(
            clip_low=self.clip_low, clip_high=self.clip_high, max_ratio=self.max_ratio
        )

    def state_dict(self) -> dict[str, Any]:
        return {"seen": {key: list(seen) for key, seen in self._seen.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen.clear()
        self._seen.update({key: Seen(*values) for key, values in state["seen"].items()})

    def _smoothed(self, key: str, rewards: Sequence[float]) -> list[float]:
        """The group's advantages, NaN rewards left out; remembers it."""
        scored = [reward for reward in rewards if not math.isnan(reward)]
        if not scored:
            return [0.0] * len(rewards)
        now = observed(scored, self.ddof)
        total = merged(self._seen[key], now) if key in self._seen else now
        self._seen[key] = total
        return [0.0 if math.isnan(reward) else smoothed(reward, now, total) for reward in rewards]


def observed(rewards: Sequence[float], ddof: int) -> Seen:
    """One visit; equal rewards have a variance of exactly 0."""
    n = len(rewards)
    if max(rewards) == min(rewards):
        return Seen(rewards[0], 0.0, n, 1)
    mean = math.fsum(rewards) / n
    squares = math.fsum((reward - mean) ** 2 for reward in rewards)
    return Seen(mean, squares / max(n - ddof, 1), n, 1)


def merged(before: Seen, now: Seen) -> Seen:
    """Both together: the mean and variance of a union, if theirs divide by n."""
    responses = before.responses + now.responses
    share, gap = now.responses / responses, now.mean - before.mean
    within = before.variance + share * (now.variance - before.variance)
    return Seen(
        before.mean + share * gap,
        within + share * (1 - share) * gap**2,
        responses,
        before.visits + now.visits,
    )


def smoothed(reward: float, now: Seen, total: Seen) -> float:
    """The smaller of the two mixtures of the advantages over this visit and over all."""
    new, whole = (
        (reward - seen.mean) / math.sqrt(seen.variance) if seen.variance > 0 else 0.0
        for seen in (now, total)
    )
    share = 1 / total.visits
    towards_new = (1 - share) * new + share * whole
    towards_whole = share * new + (1 - share) * whole
    return towards_new if abs(towards_new) < abs(towards_whole) else towards_whole
