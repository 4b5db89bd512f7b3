"""Leave-one-out baseline and one clipped ratio per completion (RLOO, 2402.14740).

Unlike GRPO the advantage is not divided by a standard deviation, and a completion is one action:
its ratio is the product of its tokens'. That is TRL's form; the paper itself trains on policy,
where it is plain REINFORCE (the method `reinforce`, but with the sum over a completion's tokens).
verl takes the same advantages to a ratio per token.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.methods.base import BatchShape, Evidence, Method, Paper
from rlvr_fast.objectives import ClippedSurrogate, Objective, clipped, importance_ratio
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale
from rlvr_fast.tracing.tokens import Tokens


class Ratio(StrEnum):
    """Of what the importance ratio is."""

    SEQUENCE = "sequence"
    TOKEN = "token"


@dataclass(frozen=True, kw_only=True)
class ProductClippedSurrogate(Objective):
    """Clips `prod_t r_t` of the whole sequence; every token carries the sequence's loss.

    With weights that average over a sequence's tokens, the loss is the sequence's and its gradient
    `-A prod_t r_t` at each token.
    """

    clip_low: float = 0.2
    """The product counts down to `1 - clip_low`."""
    clip_high: float = 0.2
    """The product counts up to `1 + clip_high`."""

    def token_loss(self, t: Tokens) -> Tensor:
        ratio = importance_ratio(t.seq_sum(t.logp - t.old_logp), torch.zeros(()))
        return clipped(ratio, t.advantage, 1 - self.clip_low, 1 + self.clip_high)


@dataclass(frozen=True, kw_only=True)
class RLOO(Method):
    """Clipped surrogate; the advantage is the reward minus the mean of the others in its group.

    ratio = sequence is a mean over completions, token a mean over all tokens. The paper's KL
    penalty in the reward is not here; the config's `kl_coef` adds one to the loss.
    """

    paper: ClassVar[Paper] = Paper(
        source="2402.14740, section 3.2",
        formula="-min(s A, clip(s) A), s = prod_t r, A = R - mean of the others",
        evidence=Evidence.CODE,
        reconstructed=("a KL penalty in the loss instead of the reward",),
    )

    ratio: Ratio = Ratio.SEQUENCE
    """One for the sequence (TRL), or one for every token (verl)."""
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high")

    def normalisation(self) -> GroupNormalisation:
        return GroupNormalisation(scale=Scale.LEAVE_ONE_OUT)

    def seq_weights(self, shape: BatchShape) -> Tensor:
        if self.ratio is Ratio.TOKEN:
            return aggregate.token_mean(shape.seq_lengths)
        return aggregate.sequence_mean(shape.seq_lengths)

    def objective(self) -> Objective:
        if self.ratio is Ratio.TOKEN:
            return ClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)
        return ProductClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)
