"""Leaves out a few of the tokens that lower the entropy most (Clip-Cov, 2505.22617)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from rlvr_fast.methods.base import Evidence, Method, Paper
from rlvr_fast.methods.batch_tokens import (
    covariances,
    end_to_end,
    scored,
    token_advantages,
    with_token_advantages,
)
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.methods.scores import Scorer
from rlvr_fast.objectives import ClippedSurrogate, Objective


@dataclass(frozen=True, kw_only=True)
class ClipCov(Method):
    """Clipped surrogate; a random few of the tokens with a high covariance lose their gradient.

    The covariance of a token is `(A - mean A) (logp - mean logp)` over the batch. Tokens between
    the bounds are candidates; at most `share` of all tokens, and at least one, is drawn of them.
    The drawn ones stay in the denominator of the mean. Advantages are GRPO's.

    The means and the draw are over the whole batch, whatever its micro-batches and ranks, and the
    draw holds for all its updates: it takes one scoring forward of the batch in each step, on each
    rank. It is a function of the step and the batch. The public code draws in every micro-batch
    and passes over tokens that the surrogate clips already; before the first update it clips none.
    """

    paper: ClassVar[Paper] = Paper(
        source="2505.22617",
        formula="0 for a random few with lower < (A - mean A) (logp - mean logp) < upper",
        evidence=Evidence.CODE,
        reconstructed=("covariances are those before the first update of a batch",),
    )

    share: float = 2e-4
    """Of the batch's tokens that are left out at most, in [0, 1]; 0 scores and leaves out none."""
    cov_low: float = 1.0
    """Candidates have a greater covariance."""
    cov_high: float = 5.0
    """Candidates have a smaller covariance."""
    clip_low: float = 1.0
    """The ratio counts down to 1 - clip_low; 1, as in a public recipe: to 0."""
    clip_high: float = 1.0
    """The ratio counts up to 1 + clip_high; 1 as in that recipe."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: wanted a number in [0, 1], got {self.share}")
        if not self.cov_low < self.cov_high:
            raise ValueError(
                f"cov_high: wanted more than cov_low, {self.cov_low}, got {self.cov_high}"
            )

    def shape(self, groups: Groups, scorer: Scorer) -> Groups:
        counted = scored(groups)
        if self.share == 0 or not counted.any():
            return groups
        logp = end_to_end(scorer.rollouts(groups), lambda scores: scores.logp)
        cov = covariances(groups, logp)
        order = cov.argsort(stable=True)  # So that the order of the rollouts changes no draw.
        candidates = order[(cov[order] > self.cov_low) & (cov[order] < self.cov_high)]
        wanted = max(int(self.share * int(counted.sum())), 1)
        draw = np.random.default_rng(scorer.step).permutation(len(candidates))[:wanted]
        advantages = token_advantages(groups)
        advantages[candidates[torch.from_numpy(draw)]] = 0.0
        return with_token_advantages(groups, advantages)

    def objective(self) -> Objective:
        return ClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)
