"""REINFORCE (Williams, 1992) with a baseline from the group."""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from rlvr_fast.methods.base import Evidence, Method, Paper
from rlvr_fast.objectives import Objective, PolicyGradient
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale


class Baseline(StrEnum):
    """What is subtracted from a reward."""

    GROUP_MEAN = "group_mean"
    LEAVE_ONE_OUT = "leave_one_out"


@dataclass(frozen=True, kw_only=True)
class Reinforce(Method):
    """`-A logp` without ratio or clip, mean over all tokens; one update per batch.

    The advantage is the reward minus the mean of its group, or of the others in it
    (RLOO, 2402.14740): the second is G / (G - 1) times the first.
    """

    paper: ClassVar[Paper] = Paper(
        source="Williams, 1992; 2402.14740",
        formula="-A logp, A = R - mean of the others",
        evidence=Evidence.CODE,
    )

    on_policy_only: ClassVar[bool] = True

    baseline: Baseline = Baseline.LEAVE_ONE_OUT
    """Subtracted from each reward: the mean of the group, or of the others in it."""

    def normalisation(self) -> GroupNormalisation:
        leave_out = self.baseline is Baseline.LEAVE_ONE_OUT
        return GroupNormalisation(scale=Scale.LEAVE_ONE_OUT if leave_out else Scale.NONE)

    def objective(self) -> Objective:
        return PolicyGradient()
