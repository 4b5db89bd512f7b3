"""Wrong answers count more the surer the policy became of them (ACE, 2602.21420)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlvr_fast.methods.base import Evidence, Paper
from rlvr_fast.methods.grpo import GRPO
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.objectives import ClippedSurrogate, Objective
from rlvr_fast.tracing.tokens import Tokens

WRONG = "wrong"
"""The extra that is 1 for completions to be scaled, else 0."""


@dataclass(frozen=True, kw_only=True)
class ConfidenceScaledSurrogate(Objective):
    """A surrogate times `1 + alpha softplus(c)` where `t.extras["wrong"]` is not 0.

    `c` is the mean over the sequence of `logp - ref_logp`, without a gradient. A surrogate is
    homogeneous in its advantage, so this scales the advantage.
    """

    surrogate: ClippedSurrogate
    alpha: float = 1.0

    def token_loss(self, t: Tokens) -> Tensor:
        confidence = t.seq_mean((t.logp - t.ref_logp).detach())
        factor = 1 + self.alpha * softplus(confidence)
        wrong = t.extras[WRONG] != 0
        return torch.where(wrong, factor, torch.ones_like(factor)) * self.surrogate.token_loss(t)


@dataclass(frozen=True, kw_only=True)
class ACE(GRPO):
    """GRPO; the advantage of a wrong answer times `1 + alpha softplus(mean_t log(pi / pi_ref))`.

    An error that the policy finds likelier than the initial model did is pushed down harder. A
    group's advantages then no longer sum to zero, and at `pi = pi_ref` the factor is already
    `1 + alpha ln 2`. With separate bounds and the token mean the base is DAPO's loss. The factor
    follows the policy from update to update; no gradient flows through it.
    """

    paper: ClassVar[Paper] = Paper(
        source="2602.21420, equations 4 to 14",
        formula="A' = A (1 + alpha softplus(mean_t(logp - ref_logp))) if R = 0 else A",
        evidence=Evidence.DIGEST,
        reconstructed=("alpha", "the mean over tokens: the abstract has the sum"),
    )
    needs_reference: ClassVar[bool] = True

    alpha: float = 1.0
    """How much the confidence in a wrong answer adds; 0 is GRPO."""
    correct: float = 1.0
    """A completion with at least this reward counts as correct."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("alpha")

    def advantages(self, groups: Groups) -> Groups:
        return [
            [
                replace(
                    rollout,
                    extras={
                        **rollout.extras,
                        WRONG: float(rollout.reward is not None and rollout.reward < self.correct),
                    },
                )
                for rollout in group
            ]
            for group in super().advantages(groups)
        ]

    def objective(self) -> Objective:
        surrogate = super().objective()
        assert isinstance(surrogate, ClippedSurrogate)
        return ConfidenceScaledSurrogate(surrogate=surrogate, alpha=self.alpha)
