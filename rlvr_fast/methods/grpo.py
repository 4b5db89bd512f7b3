"""Group relative policy optimisation (DeepSeekMath, 2402.03300, equation 3)."""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.methods.base import BatchShape, Evidence, Method, Paper
from rlvr_fast.objectives import ClippedSurrogate, Objective


class Aggregation(StrEnum):
    """Whether every sequence counts the same or every token."""

    SEQUENCE_MEAN = "sequence_mean"
    TOKEN_MEAN = "token_mean"


@dataclass(frozen=True, kw_only=True)
class GRPO(Method):
    """Clipped surrogate; advantage (reward - group mean) / (group std + 1e-6), std with n - 1.

    The paper averages over the tokens of each sequence, then over sequences. Its KL penalty is
    the config's `kl_coef` (the paper uses 0.04). Separate bounds and the token mean are later
    work (2503.14476), here as options.
    """

    paper: ClassVar[Paper] = Paper(
        source="2402.03300, equation 3",
        formula="-min(r A, clip(r, 1 +- 0.2) A), A = (R - mean) / std",
        evidence=Evidence.CODE,
    )

    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""
    dual_clip: float | None = None
    """For negative advantages the ratio counts up to this; none: no bound."""
    aggregation: Aggregation = Aggregation.SEQUENCE_MEAN
    """Mean over sequences of token means, or mean over all tokens."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high")

    def seq_weights(self, shape: BatchShape) -> Tensor:
        if self.aggregation is Aggregation.TOKEN_MEAN:
            return aggregate.token_mean(shape.seq_lengths)
        return aggregate.sequence_mean(shape.seq_lengths)

    def objective(self) -> Objective:
        return ClippedSurrogate(
            clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip
        )
