"""Token and sequence ratios mixed, each clipped by its own bounds (DHPO, 2601.05607)."""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.methods.base import BatchShape, Evidence, Method, Paper
from rlvr_fast.objectives import Objective, importance_ratio, sequence_ratio
from rlvr_fast.tracing.tokens import Tokens


class Mixing(StrEnum):
    """What decides how much of a token's ratio is its own."""

    AVERAGED = "averaged"
    ENTROPY = "entropy"


@dataclass(frozen=True, kw_only=True)
class MixedSurrogate(Objective):
    """`-min(m A, b A)`: `m = w r + (1 - w) s`, `b` the same of the two ratios once clipped.

    `r` is the token's ratio and `s` the sequence's, `exp(mean_t log r)` in value, with the gradient
    of the token's own log-probability. No gradient flows through `w`. Aggregate with
    `sequence_mean`.
    """

    clip_low: float = 0.2
    """The token's ratio counts down to `1 - clip_low`."""
    clip_high: float = 0.2
    """The token's ratio counts up to `1 + clip_high`."""
    seq_clip_low: float = 3e-4
    """The sequence's ratio counts down to `1 - seq_clip_low`."""
    seq_clip_high: float = 4e-4
    """The sequence's ratio counts up to `1 + seq_clip_high`."""
    mixing: Mixing = Mixing.AVERAGED
    token_share: float = 0.5
    """`w` where it is averaged; by entropy `w` is 0.5 where all entropies are equal."""
    flip: bool = False
    """By entropy, the surest token of a sequence gets `w = 1`, not the least sure."""

    def token_loss(self, t: Tokens) -> Tensor:
        token = importance_ratio(t.logp, t.old_logp)
        seq = sequence_ratio(t)
        share = self.share(t)
        mixed = share * token + (1 - share) * seq
        token = token.clamp(1 - self.clip_low, 1 + self.clip_high)
        seq = seq.clamp(1 - self.seq_clip_low, 1 + self.seq_clip_high)
        bounded = share * token + (1 - share) * seq
        return -torch.minimum(mixed * t.advantage, bounded * t.advantage)

    def share(self, t: Tokens) -> Tensor:
        """`w` in [0, 1], `[T]`."""
        if self.mixing is Mixing.AVERAGED:
            return torch.full_like(t.logp, self.token_share)
        entropy = t.entropy.detach()
        least = t.seq_min(entropy)
        spread = t.seq_max(entropy) - least
        share = torch.where(spread > 0, (entropy - least) / spread, torch.full_like(spread, 0.5))
        return 1 - share if self.flip else share


@dataclass(frozen=True, kw_only=True)
class DHPO(Method):
    """GRPO's and GSPO's ratios mixed token by token; each is clipped first, then they are mixed.

    The share of the token's own ratio is 1/2 (averaged), or its entropy's place between the least
    and the greatest of its sequence, so that uncertain tokens move by themselves and sure ones with
    the sequence. Mean over sequences of token means; the advantage is GRPO's.
    """

    paper: ClassVar[Paper] = Paper(
        source="2601.05607, equations 8 to 11",
        formula="-min(m A, b A), m = w r + (1 - w) s, b = w clip(r) + (1 - w) clip(s)",
        evidence=Evidence.DIGEST,
        reconstructed=(
            "the minimum of the mixed and the clipped-then-mixed ratio",
            "high entropy goes to the token's ratio (flip turns it round)",
            "w = 1/2 where a sequence's entropies are all equal",
            "the values of all four bounds",
            "averaged as the default of the two",
        ),
    )

    clip_low: float = 0.2
    """The token's ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The token's ratio counts up to 1 + clip_high."""
    seq_clip_low: float = 3e-4
    """The sequence's ratio counts down to 1 - seq_clip_low."""
    seq_clip_high: float = 4e-4
    """The sequence's ratio counts up to 1 + seq_clip_high."""
    mixing: Mixing = Mixing.AVERAGED
    """Whether the share of the token's ratio is constant or follows its entropy."""
    token_share: float = 0.5
    """The constant share, in [0, 1]: 1 is GRPO, 0 is GSPO."""
    flip: bool = False
    """By entropy, the surest token of a sequence goes by its own ratio, not the least sure."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high", "seq_clip_low", "seq_clip_high")
        if not 0 <= self.token_share <= 1:
            raise ValueError(f"token_share: wanted a number in [0, 1], got {self.token_share}")

    def seq_weights(self, shape: BatchShape) -> Tensor:
        return aggregate.sequence_mean(shape.seq_lengths)

    def objective(self) -> Objective:
        return MixedSurrogate(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            seq_clip_low=self.seq_clip_low,
            seq_clip_high=self.seq_clip_high,
            mixing=self.mixing,
            token_share=self.token_share,
            flip=self.flip,
        )
