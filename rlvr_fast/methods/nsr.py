"""Learning from wrong or from right answers alone (NSR, PSR, W-REINFORCE; 2506.01347).

Unlike GRPO there is no baseline: a right answer has the advantage 1, a wrong one -1, whatever the
rest of its group. What is left out has no token in the mean either.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

from rlvr_fast.methods.base import Evidence, Method, Paper
from rlvr_fast.methods.rollouts import Groups, Rollout
from rlvr_fast.objectives import ClippedSurrogate, Objective


class Keep(StrEnum):
    """Which completions are trained."""

    NEGATIVE = "negative"
    POSITIVE = "positive"
    WEIGHTED = "weighted"


@dataclass(frozen=True, kw_only=True)
class NSR(Method):
    """Clipped surrogate, mean over the tokens of the completions that are kept.

    Right and wrong are read from the reward alone; a penalty for length changes neither. With a
    prompt that is always solved `negative` has nothing to do, with one that never is `positive`.
    """

    paper: ClassVar[Paper] = Paper(
        source="2506.01347, sections 2 and 5",
        formula="A = -1 if wrong (NSR), 1 if right (PSR), or -1 and lambda (W-REINFORCE)",
        evidence=Evidence.CODE,
        reconstructed=("the threshold that makes an outcome of a reward",),
    )
    settings: ClassVar[Mapping[str, object]] = {"entropy_coef": 1e-4}

    keep: Keep = Keep.NEGATIVE
    """negative (NSR) and positive (PSR) drop the others; weighted (W-REINFORCE) keeps all."""
    positive_weight: float = 0.1
    """With keep = weighted, the advantage of a right answer: the paper's lambda."""
    right_above: float = 0.5
    """A reward above this is a right answer, any other a wrong one; the number is ours."""
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""

    def __post_init__(self) -> None:
        self.check_not_negative("positive_weight", "clip_low", "clip_high")

    def advantages(self, groups: Groups) -> Groups:
        return [[self._judged(rollout) for rollout in group] for group in groups]

    def objective(self) -> Objective:
        return ClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)

    def _judged(self, rollout: Rollout) -> Rollout:
        right = rollout.reward is not None and rollout.reward > self.right_above
        other = Keep.NEGATIVE if right else Keep.POSITIVE
        if rollout.reward is None or self.keep is other:
            # Zero advantages would still count in the mean.
            return replace(rollout, advantage=0.0, loss_mask=[0] * len(rollout.completion_ids))
        weight = self.positive_weight if self.keep is Keep.WEIGHTED else 1.0
        return replace(rollout, advantage=weight if right else -1.0)
