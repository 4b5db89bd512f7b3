"""Holds back the few tokens that lower the entropy most (KL-Cov, 2505.22617)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlvr_fast.methods.base import Evidence, Method, Paper
from rlvr_fast.methods.batch_tokens import covariances, end_to_end, scored, with_token_extras
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.methods.scores import Scorer
from rlvr_fast.objectives import Objective, Tokens, importance_ratio

HELD = "held"


@dataclass(frozen=True, kw_only=True)
class HeldSurrogate(Objective):
    """`-r A`, and where the extra `held` is not 0 `coef |logp - old_logp|` on top."""

    coef: float = 1.0

    def token_loss(self, t: Tokens) -> Tensor:
        moved = torch.abs(t.logp - t.old_logp)
        return (
            self.coef * t.extras[HELD] * moved - importance_ratio(t.logp, t.old_logp) * t.advantage
        )


@dataclass(frozen=True, kw_only=True)
class KLCov(Method):
    """Surrogate without a clip; the tokens with the highest covariance pay for moving.

    The covariance of a token is `(A - mean A) (logp - mean logp)` over the batch; the highest
    `share` of all tokens, and at least one, is held to the log-probability it had. Advantages are
    GRPO's.

    With `updates_per_batch` 1 nothing has moved yet, the penalty has no gradient, and the method
    is the surrogate alone. The choice is over the whole batch, whatever its micro-batches and
    ranks, and holds for all its updates: with more than one it takes one scoring forward of the
    batch in each step, on each rank. The public code chooses in every micro-batch.
    """

    paper: ClassVar[Paper] = Paper(
        source="2505.22617",
        formula="-r A + coef |logp - old| for the top share of (A - mean A) (logp - mean logp)",
        evidence=Evidence.CODE,
        reconstructed=("covariances are those before the first update of a batch",),
    )

    share: float = 2e-4
    """Of the batch's tokens that are held, in [0, 1]; 0 scores and holds none."""
    coef: float = 1.0
    """Of the penalty; public recipes have 0.1 to 1."""

    def __post_init__(self) -> None:
        self.check_not_negative("coef")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: wanted a number in [0, 1], got {self.share}")

    def shape(self, groups: Groups, scorer: Scorer) -> Groups:
        counted = scored(groups)
        held = torch.zeros(len(counted))
        if self.share > 0 and scorer.updates > 1 and counted.any():
            logp = end_to_end(scorer.rollouts(groups), lambda scores: scores.logp)
            wanted = max(int(self.share * int(counted.sum())), 1)
            order = covariances(groups, logp).argsort(descending=True, stable=True)
            held[order[:wanted]] = 1.0
        return with_token_extras(groups, HELD, held)

    def objective(self) -> Objective:
        return HeldSurrogate(coef=self.coef)
