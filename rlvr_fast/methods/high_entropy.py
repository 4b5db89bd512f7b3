"""Trains the fifth of all tokens where the policy is least sure (80/20, 2506.01939)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rlvr_fast.methods.base import Evidence, Method, Paper
from rlvr_fast.methods.batch_tokens import (
    end_to_end,
    scored,
    token_advantages,
    with_token_advantages,
)
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.methods.scores import Scorer
from rlvr_fast.objectives import ClippedSurrogate, Objective


@dataclass(frozen=True, kw_only=True)
class HighEntropy(Method):
    """DAPO's surrogate on the tokens whose entropy is in the highest `share` of the batch.

    All other tokens lose their advantage and stay in the denominator of the mean. Their rows are
    never multiplied by the head's gradients. A KL penalty or entropy bonus of the config still
    reaches every token.

    The quantile is that of the whole batch, whatever its micro-batches and ranks, and the choice
    holds for all its updates: it takes one scoring forward of the batch in each step, on each rank.
    The public code takes the quantile anew in every micro-batch.
    """

    paper: ClassVar[Paper] = Paper(
        source="2506.01939",
        formula="1[H >= quantile(H, 1 - share)] max(-r A, -clip(r, 0.8, 1.28) A)",
        evidence=Evidence.CODE,
        reconstructed=("the entropies are those before the first update of a batch",),
    )

    share: float = 0.2
    """Of the batch's tokens that are trained, in (0, 1]; 1 scores nothing and trains all."""
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.28
    """The ratio counts up to 1 + clip_high."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high")
        if not 0 < self.share <= 1:
            raise ValueError(f"share: wanted a number in (0, 1], got {self.share}")

    def shape(self, groups: Groups, scorer: Scorer) -> Groups:
        counted = scored(groups)
        if self.share == 1 or not counted.any():
            return groups
        entropy = end_to_end(scorer.rollouts(groups), lambda scores: scores.entropy)
        # torch.quantile takes no more than 16 million.
        threshold = np.quantile(entropy[counted].numpy(), 1 - self.share)
        advantages = token_advantages(groups).masked_fill(entropy < float(threshold), 0.0)
        return with_token_advantages(groups, advantages)

    def objective(self) -> Objective:
        return ClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)
