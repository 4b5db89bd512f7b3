"""Rewards of a verifier that errs at known rates, corrected (2510.00915).

The verifier accepts a wrong answer with probability rho0 and rejects a right one with probability
rho1. GRPO's division by the group's standard deviation undoes every correction that is affine in
the reward, so the default only subtracts the group's mean.

Reconstructed: the placement, and the objective around it. The paper also estimates rho1 while it
trains, with a judge that looks at some rejected answers again. A judge cannot be named in a config,
so no option does that; `false_negative_rate` is the estimate for who has one.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch

from rlvr_fast.methods.base import Evidence, Method, Paper, group_offsets, with_advantages
from rlvr_fast.methods.rollouts import Groups, Rollout
from rlvr_fast.objectives import ClippedSurrogate, Objective
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale, group_advantages


class Correction(StrEnum):
    """Of an observed outcome, 0 or 1."""

    BACKWARD = "backward"
    FORWARD = "forward"


class Where(StrEnum):
    """Whether the corrected outcome is a reward, still to be compared within its group."""

    REWARD = "reward"
    ADVANTAGE = "advantage"


class Norm(StrEnum):
    """How a group's rewards become advantages."""

    MEAN = "mean"
    STD = "std"


@dataclass(frozen=True, kw_only=True)
class NoisyVerifier(Method):
    """Clipped surrogate, mean over all tokens; the advantage is made of corrected outcomes.

    backward: `(R - rho0) / (1 - rho0 - rho1)`, whose mean is the true outcome. forward:
    `rho1` for an accepted and `rho1 - 1` for a rejected answer, whose mean gradient is
    `1 - rho0 - rho1` times the true one; needs no rho0.
    """

    paper: ClassVar[Paper] = Paper(
        source="2510.00915",
        formula="A = (R - rho0) / (1 - rho0 - rho1) - mean, or rho1 if accepted else rho1 - 1",
        evidence=Evidence.DIGEST,
        reconstructed=(
            "where the correction is applied",
            "mean over tokens, clip at 0.2",
            "the threshold that makes an outcome of a reward",
            "smoothing and sampled share of the appeal estimate, which no option runs",
        ),
    )

    correction: Correction = Correction.BACKWARD
    """backward needs both rates; forward only the second."""
    false_positive_rate: float = 0.0
    """rho0: how often a wrong answer is accepted. Measure it; 0 is no correction."""
    false_negative_rate: float = 0.0
    """rho1: how often a right answer is rejected. Measure it; 0 is no correction."""
    where: Where | None = None
    """reward (then less the group's mean) or advantage (as it is); none: reward for backward,
    advantage for forward."""
    norm: Norm = Norm.MEAN
    """With where = reward: subtract the group's mean, or also divide by its std, which undoes the
    correction."""
    accepted_above: float = 0.5
    """A reward above this is an accepted answer; the number is ours."""
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""

    def __post_init__(self) -> None:
        self.check_not_negative(
            "false_positive_rate", "false_negative_rate", "clip_low", "clip_high"
        )
        rates = self.false_positive_rate + self.false_negative_rate
        if not rates < 1:
            raise ValueError(
                "false_positive_rate: wanted below 1 together with false_negative_rate, "
                f"got {rates}"
            )
        if self.correction is Correction.FORWARD and self.where is Where.REWARD:
            raise ValueError(
                "where: wanted advantage with correction = forward, which a group's mean would "
                "undo, got reward"
            )

    def advantages(self, groups: Groups) -> Groups:
        values = torch.tensor(
            [self._corrected(rollout) for group in groups for rollout in group],
            dtype=torch.float64,
        )
        if self.correction is Correction.FORWARD or self.where is Where.ADVANTAGE:
            return with_advantages(groups, values.nan_to_num(0.0))
        normalisation = GroupNormalisation(scale=Scale.STD if self.norm is Norm.STD else Scale.NONE)
        found = group_advantages(values, group_offsets(groups), normalisation=normalisation)
        return with_advantages(groups, found)

    def objective(self) -> Objective:
        return ClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)

    def _corrected(self, rollout: Rollout) -> float:
        if rollout.reward is None:
            return float("nan")
        rho0, rho1 = self.false_positive_rate, self.false_negative_rate
        outcome = float(rollout.reward > self.accepted_above)
        if self.correction is Correction.FORWARD:
            return outcome - (1 - rho1) - rollout.penalty
        return (outcome - rho0) / (1 - rho0 - rho1) - rollout.penalty


def false_negative_rate(
    accepted: int, recovered: int, share: float, *, before: float | None = None, decay: float = 0.9
) -> float:
    """An estimate of rho1 from appeals: `r / (a + r)` with `r = recovered / share`.

    Args:
        accepted: answers that the verifier accepted.
        recovered: rejected answers of the sampled share that a judge found right.
        share: of the rejected answers that the judge saw, sampled evenly, in (0, 1].
        before: the estimate so far; none: this is the first.
        decay: its weight in the new one; ours, as the paper's is not known.

    Raises:
        ValueError: for a share outside of (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: wanted in (0, 1], got {share}")
    right = recovered / share
    now = right / (accepted + right) if right else 0.0
    return now if before is None else decay * before + (1 - decay) * now
