"""The geometric mean of a sequence's ratios in place of their mean (GMPO, 2507.20673)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.methods.base import BatchShape, Evidence, Method, Paper
from rlvr_fast.objectives import MAX_LOG_RATIO, Objective
from rlvr_fast.tracing.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class GeometricSurrogate(Objective):
    """`-A exp(mean_t d)`, `d` the token's log-ratio, bounded where it would gain by going further.

    Every token of a sequence carries the sequence's loss: aggregate with `sequence_mean`. A
    bounded token has no gradient of its own, and still counts in the mean.
    """

    clip_low: float = 0.4
    """Nats: for negative advantages the log-ratio counts down to `-clip_low`."""
    clip_high: float = 0.4
    """Nats: for positive advantages the log-ratio counts up to `clip_high`."""

    def token_loss(self, t: Tokens) -> Tensor:
        gap = (t.logp - t.old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        low, high = gap.clamp(min=-self.clip_low), gap.clamp(max=self.clip_high)
        bounded = torch.where(t.advantage < 0, low, high)
        return -t.advantage * torch.exp(t.seq_mean(bounded))


@dataclass(frozen=True, kw_only=True)
class GMPO(Method):
    """GRPO with one weight per sequence: the geometric mean of its clipped ratios.

    One token with an extreme ratio moves a geometric mean less than an arithmetic one, so the
    bounds may be wider than GRPO's: exp(-0.4) to exp(0.4). Unlike GSPO, which clips the mean, this
    clips each token before the mean. Mean over sequences; the advantage is GRPO's.
    """

    paper: ClassVar[Paper] = Paper(
        source="2507.20673; TRL, experimental.gmpo",
        formula="-A exp(mean_t d), d = min(log r, 0.4) if A > 0 else max(log r, -0.4)",
        evidence=Evidence.CODE,
    )

    clip_low: float = 0.4
    """Nats: the log-ratio of a token counts down to -clip_low if its advantage is negative."""
    clip_high: float = 0.4
    """Nats: the log-ratio of a token counts up to clip_high if its advantage is positive."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high")

    def seq_weights(self, shape: BatchShape) -> Tensor:
        return aggregate.sequence_mean(shape.seq_lengths)

    def objective(self) -> Objective:
        return GeometricSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)
