"""GRPO without its two normalisations (Dr. GRPO, 2503.20783)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.methods.base import BatchShape, Evidence, Method, Paper
from rlvr_fast.objectives import ClippedSurrogate, Objective
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale


@dataclass(frozen=True, kw_only=True)
class DrGRPO(Method):
    """Clipped surrogate; advantage reward - group mean, not divided by the group's std.

    Token losses are summed and divided by a constant length, then averaged over sequences: a long
    wrong answer is punished for every token, and an easy prompt weighs no more than a hard one.
    """

    paper: ClassVar[Paper] = Paper(
        source="2503.20783",
        formula="A = R - mean(R); tokens / a constant length",
        evidence=Evidence.CODE,
    )

    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""
    length: int | None = None
    """The constant; none: max_completion_tokens."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high")

    def normalisation(self) -> GroupNormalisation:
        return GroupNormalisation(scale=Scale.NONE)

    def seq_weights(self, shape: BatchShape) -> Tensor:
        length = shape.max_completion_tokens if self.length is None else self.length
        return aggregate.constant_length(shape.seq_lengths, length=length)

    def objective(self) -> Objective:
        return ClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)
