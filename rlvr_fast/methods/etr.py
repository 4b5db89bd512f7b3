"""Clip bounds that grow with the advantage and the group's variance (ETR, 2601.03723).

GRPO but for the bounds. Only the abstract was read, which gives no formula: this one is ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.methods.base import BatchShape, Evidence, Method, Paper
from rlvr_fast.methods.grpo import Aggregation
from rlvr_fast.methods.rollouts import Group, Groups
from rlvr_fast.objectives import Objective, clipped, importance_ratio
from rlvr_fast.tracing.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class ElasticClipSurrogate(Objective):
    """The clipped surrogate between `t.extras["ratio_low"]` and `t.extras["ratio_high"]`."""

    def token_loss(self, t: Tokens) -> Tensor:
        ratio = importance_ratio(t.logp, t.old_logp)
        return clipped(ratio, t.advantage, t.extras["ratio_low"], t.extras["ratio_high"])


@dataclass(frozen=True, kw_only=True)
class ETR(Method):
    """Each sequence has bounds `1 -+ eps (1 + a tanh|A|) (1 + v z)` of its own.

    `A` is GRPO's advantage. `z` in [0, 1] says how much a group has to teach: the variance of its
    rewards over the largest that values between its least and its greatest could have. For two
    kinds of rewards, a share p of one of them, that is 4 p (1 - p). With both gains 0 it is GRPO.
    """

    paper: ClassVar[Paper] = Paper(
        source="2601.03723, abstract",
        formula="-min(r A, clip(r, 1 -+ eps_i) A), eps_i = eps (1 + a tanh|A|) (1 + 4 v p (1-p))",
        evidence=Evidence.ABSTRACT,
        reconstructed=(
            "the form of eps_i and both gains",
            "the largest eps_i",
            "the measure of a group whose rewards are not binary",
        ),
    )

    clip_low: float = 0.2
    """eps of the lower bound."""
    clip_high: float = 0.2
    """eps of the upper bound."""
    advantage_gain: float = 0.5
    """How much wider the bounds get for a large advantage; our default."""
    variance_gain: float = 0.5
    """How much wider they get for a group that is right half of the time; our default."""
    cap: float = 0.9
    """The largest eps of a sequence; our default."""
    aggregation: Aggregation = Aggregation.SEQUENCE_MEAN
    """Mean over sequences of token means, or mean over all tokens."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high", "advantage_gain", "variance_gain")
        if not max(self.clip_low, self.clip_high) <= self.cap <= 1:
            least = max(self.clip_low, self.clip_high)
            raise ValueError(f"cap: wanted at most 1 and at least {least}, got {self.cap}")

    def advantages(self, groups: Groups) -> Groups:
        return [self._bounded(group) for group in super().advantages(groups)]

    def seq_weights(self, shape: BatchShape) -> Tensor:
        if self.aggregation is Aggregation.TOKEN_MEAN:
            return aggregate.token_mean(shape.seq_lengths)
        return aggregate.sequence_mean(shape.seq_lengths)

    def objective(self) -> Objective:
        return ElasticClipSurrogate()

    def width(self, eps: float, *, advantage: float, variance: float) -> float:
        """How far a sequence's ratio counts from 1 on one side."""
        by_advantage = 1 + self.advantage_gain * math.tanh(abs(advantage))
        return min(eps * by_advantage * (1 + self.variance_gain * variance), self.cap)

    def _bounded(self, group: Group) -> Group:
        variance = relative_variance([r.reward - r.penalty for r in group if r.reward is not None])
        found = []
        for rollout in group:
            assert isinstance(rollout.advantage, float)
            low, high = (
                self.width(eps, advantage=rollout.advantage, variance=variance)
                for eps in (self.clip_low, self.clip_high)
            )
            bounds = {"ratio_low": 1 - low, "ratio_high": 1 + high}
            found.append(replace(rollout, extras={**rollout.extras, **bounds}))
        return found


def relative_variance(rewards: Sequence[float]) -> float:
    """Over the largest possible between the least and the greatest; 0 where all are equal."""
    if not rewards or max(rewards) == min(rewards):
        return 0.0
    mean = math.fsum(rewards) / len(rewards)
    variance = math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards)
    return 4 * variance / (max(rewards) - min(rewards)) ** 2
