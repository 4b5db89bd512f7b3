"""The group's mean divides instead of its std: rare successes count more (MaxRL, 2602.02710).

With outcomes 0 and 1 a group's gradient is the mean of `grad log pi` over its right completions,
less the mean over all of them, which is 0 on average: an estimate of the gradient of the logarithm
of the success rate, where others follow the rate itself. A group without a success has none.
"""

from dataclasses import dataclass
from typing import ClassVar

from rlvr_fast.advantages import divided_by_mean
from rlvr_fast.methods.base import (
    Evidence,
    Method,
    Paper,
    group_offsets,
    net_rewards,
    with_advantages,
)
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.objectives import ClippedSurrogate, Objective


@dataclass(frozen=True, kw_only=True)
class MaxRL(Method):
    """Clipped surrogate, mean over all tokens; advantage (R - mean R) / mean R of the group.

    Meant for rewards that are not negative. A penalty can bring a group's mean close to 0 and its
    advantages far away from it; one that is not above 0 gives none. The authors' code adds 1e-6 to
    the mean and gives a group of one its reward times 1e6: here it has no advantage.
    """

    paper: ClassVar[Paper] = Paper(
        source="2602.02710, algorithm 1",
        formula="A = (R - mean(R)) / mean(R), 0 where no completion is right",
        evidence=Evidence.CODE,
    )

    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""
    dual_clip: float | None = 3.0
    """For negative advantages the ratio counts up to this; none: no bound."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip: wanted > 1 or none, got {self.dual_clip}")

    def advantages(self, groups: Groups) -> Groups:
        return with_advantages(groups, divided_by_mean(net_rewards(groups), group_offsets(groups)))

    def objective(self) -> Objective:
        return ClippedSurrogate(
            clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip
        )
