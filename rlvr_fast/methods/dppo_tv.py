"""A trust region in probabilities instead of ratios (DPPO-TV, 2602.04879).

The form is that of verl's code. prime-rl has another, with a penalty on squared log-ratios and a
sum over tokens, which is not here.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from rlvr_fast.methods.base import Evidence, Method, Paper
from rlvr_fast.objectives import Objective, importance_ratio
from rlvr_fast.tracing.tokens import Tokens


class Behaviour(StrEnum):
    """Whose probabilities the policy's are compared with."""

    OLD = "old"
    ROLLOUT = "rollout"


@dataclass(frozen=True, kw_only=True)
class TrustedWeight(Objective):
    """`-sg[min(r, cap)] A logp` where the probability has not moved too far already, else 0.

    `p - b` may be at most `increase` where `A > 0` and at least `-decrease` elsewhere, `b` the
    token's probability under the behaviour policy and `r = p / b`.
    """

    increase: float = 0.15
    decrease: float = 0.15
    cap: float = 20.0
    """Upper bound of the weight."""
    behaviour: Behaviour = Behaviour.OLD

    def token_loss(self, t: Tokens) -> Tensor:
        behaviour = t.old_logp if self.behaviour is Behaviour.OLD else t.rollout_logp
        moved = torch.exp(t.logp.detach()) - torch.exp(behaviour)
        excess = torch.where(t.advantage > 0, moved - self.increase, -moved - self.decrease)
        weight = importance_ratio(t.logp, behaviour).detach().clamp(max=self.cap)
        weight = torch.where(excess <= 0, weight, torch.zeros_like(weight))
        return -weight * t.advantage * t.logp


@dataclass(frozen=True, kw_only=True)
class DPPO(Method):
    """Leaves out tokens whose probability has already moved too far the way they are pushed.

    The difference of a token's probabilities bounds the total variation of the two distributions
    from below. A ratio is a poor stand-in: it is large for an unlikely token that has hardly
    moved, and near 1 for a likely one that has lost 0.15. Mean over all tokens, GRPO's advantage.
    """

    paper: ClassVar[Paper] = Paper(
        source="2602.04879",
        formula="-sg[min(r, 20)] A logp where sign(A) (p - p_old) <= delta",
        evidence=Evidence.CODE,
    )

    increase: float = 0.15
    """By how much a probability may rise where the advantage is positive (verl's script; prime-rl
    has 0.2)."""
    decrease: float = 0.15
    """By how much it may fall where the advantage is negative."""
    cap: float = 20.0
    """Upper bound of the importance weight."""
    behaviour: Behaviour = Behaviour.OLD
    """Compare with the policy at the start of the update, or with what the sampler reported: then
    the weight corrects for the sampler too, and mismatch_correction stays none."""

    def __post_init__(self) -> None:
        self.check_not_negative("increase", "decrease", "cap")

    def objective(self) -> Objective:
        return TrustedWeight(
            increase=self.increase,
            decrease=self.decrease,
            cap=self.cap,
            behaviour=self.behaviour,
        )
