"""GRPO with the mean over tokens (loss_type bnpo of TRL 1.16).

TRL takes that mean over the tokens of one device's micro-batch and averages those means, so there a
token's weight depends on its neighbours; here it is over the whole optimiser batch, as in TRL with
one device and no accumulation. Not the Beta normalisation that 2505.18086 gives the same name.
"""

from dataclasses import dataclass
from typing import ClassVar

from rlvr_fast.methods.base import Evidence, Method, Paper
from rlvr_fast.objectives import ClippedSurrogate, Objective


@dataclass(frozen=True, kw_only=True)
class BNPO(Method):
    """Clipped surrogate, mean over all tokens; advantage as in GRPO."""

    paper: ClassVar[Paper] = Paper(
        source="TRL 1.16, loss_type bnpo",
        formula="-min(r A, clip(r, 1 +- 0.2) A), mean over all tokens",
        evidence=Evidence.CODE,
        reconstructed=("the mean is over the whole batch instead of each micro-batch",),
    )

    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high")

    def objective(self) -> Objective:
        return ClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)
