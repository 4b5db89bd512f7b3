"""A smooth weight on the whole sequence's ratio instead of a clip (VESPO, 2602.10693)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlvr_fast.methods.base import Evidence, Method, Paper
from rlvr_fast.objectives import MAX_LOG_RATIO, Objective
from rlvr_fast.tracing.tokens import Tokens

LOG_FLOOR = math.log(1e-8)
"""No ratio of a sequence counts as less, as in the authors' code."""


@dataclass(frozen=True, kw_only=True)
class GammaWeightedGradient(Objective):
    """`-sg[W^k exp(lambda (1 - W))] A logp`, `W` the product of the sequence's ratios.

    The weight is 1 at `W = 1`, greatest at `k / lambda` and goes to 0 on both sides. It is computed
    in log space; `log W` counts from log 1e-8 to 20.
    """

    k_positive: float = 2.0
    """For advantages of at least 0, as is the next."""
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    """For negative advantages, as is the next."""
    lambda_negative: float = 2.0
    from_sampler: bool = False
    """`W` also has the factor `exp(old_logp - rollout_logp)` of every token."""

    def token_loss(self, t: Tokens) -> Tensor:
        gap = (t.logp - t.old_logp).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        if self.from_sampler:
            gap = gap + (t.old_logp - t.rollout_logp).clamp(LOG_FLOOR, MAX_LOG_RATIO)
        log_ratio = t.seq_sum(gap).clamp(LOG_FLOOR, MAX_LOG_RATIO)
        beyond = 1 - torch.exp(log_ratio)
        log_weight = torch.where(
            t.advantage >= 0,
            self.k_positive * log_ratio + self.lambda_positive * beyond,
            self.k_negative * log_ratio + self.lambda_negative * beyond,
        )
        return -torch.exp(log_weight.clamp(max=MAX_LOG_RATIO)) * t.advantage * t.logp


@dataclass(frozen=True, kw_only=True)
class VESPO(Method):
    """`-sg[W^k exp(lambda (1 - W))] A logp` with `W = exp(sum_t log r)`, mean over all tokens.

    The ratio is that of the whole sequence and not normalised by its length: long answers leave
    the region where the weight matters sooner. On policy the weight is 1 and the gradient that of
    REINFORCE. The advantage is GRPO's.
    """

    paper: ClassVar[Paper] = Paper(
        source="2602.10693; TRL, loss_type vespo",
        formula="-sg[W^k exp(lambda (1 - W))] A logp, W = exp(sum_t log r)",
        evidence=Evidence.CODE,
    )

    k_positive: float = 2.0
    """Power of W where the advantage is at least 0."""
    lambda_positive: float = 3.0
    """Decay with W where the advantage is at least 0; the weight is greatest at k / lambda."""
    k_negative: float = 3.0
    """Power of W where the advantage is negative."""
    lambda_negative: float = 2.0
    """Decay with W where the advantage is negative."""
    from_sampler: bool = False
    """W is measured from the sampler's own log-probabilities, which so corrects for what engine and
    trainer compute differently; leave mismatch_correction at none then."""

    def __post_init__(self) -> None:
        self.check_not_negative("k_positive", "lambda_positive", "k_negative", "lambda_negative")

    def objective(self) -> Objective:
        return GammaWeightedGradient(
            k_positive=self.k_positive,
            lambda_positive=self.lambda_positive,
            k_negative=self.k_negative,
            lambda_negative=self.lambda_negative,
            from_sampler=self.from_sampler,
        )
