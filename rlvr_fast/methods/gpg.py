"""Plain policy gradient, scaled up for groups that taught nothing (GPG, 2504.02546).

Unlike GRPO: no ratio, no clip, no division by a standard deviation. Completions of groups with
equal rewards have no gradient and would only shrink the mean, so the others count `B / (B - M)`
times, M such among B. verl counts rewards other than 0 instead of B - M.

The paper also waits for more samples where too few have a gradient: here that is the config's
`refill_rounds`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from rlvr_fast.methods.base import Evidence, Method, Paper
from rlvr_fast.methods.rollouts import Groups, Rollout
from rlvr_fast.methods.scores import Scorer
from rlvr_fast.objectives import Objective, PolicyGradient
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale


@dataclass(frozen=True, kw_only=True)
class GPG(Method):
    """`-A logp`, mean over all tokens; one update per batch."""

    paper: ClassVar[Paper] = Paper(
        source="2504.02546",
        formula="-A logp, A = B / (B - M) (R - mean(R)), M of B without a gradient",
        evidence=Evidence.CODE,
        reconstructed=("M counts sequences of groups whose rewards are equal",),
    )
    on_policy_only: ClassVar[bool] = True

    def normalisation(self) -> GroupNormalisation:
        return GroupNormalisation(scale=Scale.NONE)

    def shape(self, groups: Groups, scorer: Scorer) -> Groups:
        informative = [
            rollout
            for group in groups
            if not all(rollout.zero_advantage for rollout in group)
            for rollout in group
        ]
        scale = sum(map(len, groups)) / max(len(informative), 1)
        return [[_scaled(rollout, scale) for rollout in group] for group in groups]

    def objective(self) -> Objective:
        return PolicyGradient()


def _scaled(rollout: Rollout, scale: float) -> Rollout:
    assert isinstance(rollout.advantage, float)
    return replace(rollout, advantage=scale * rollout.advantage)
