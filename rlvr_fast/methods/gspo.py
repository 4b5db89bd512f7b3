"""Group sequence policy optimisation (GSPO, 2507.18071, equations 5 to 7)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.methods.base import BatchShape, Evidence, Method, Paper
from rlvr_fast.objectives import Objective, SequenceClippedSurrogate


@dataclass(frozen=True, kw_only=True)
class GSPO(Method):
    """GRPO with one ratio per sequence, `s = exp(mean_t log r_t)`, clipped as a whole.

    Mean over sequences; advantage as in GRPO. The bounds are far smaller than a token's, since
    the mean of many log-ratios is.
    """

    paper: ClassVar[Paper] = Paper(
        source="2507.18071, equations 5 to 7",
        formula="-min(s A, clip(s) A), s = exp(mean_t log r)",
        evidence=Evidence.CODE,
    )

    clip_low: float = 3e-4
    """The sequence's ratio counts down to 1 - clip_low."""
    clip_high: float = 4e-4
    """The sequence's ratio counts up to 1 + clip_high."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high")

    def seq_weights(self, shape: BatchShape) -> Tensor:
        return aggregate.sequence_mean(shape.seq_lengths)

    def objective(self) -> Objective:
        return SequenceClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)
