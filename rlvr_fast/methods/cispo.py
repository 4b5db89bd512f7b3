"""Clipped importance weights instead of clipped updates (CISPO, 2506.13585, equation 4)."""

from dataclasses import dataclass
from typing import ClassVar

from rlvr_fast.methods.base import Evidence, Method, Paper
from rlvr_fast.objectives import CappedWeight, Objective


@dataclass(frozen=True, kw_only=True)
class CISPO(Method):
    """`-sg[min(r, cap)] A logp`, mean over all tokens: no token ever loses its gradient.

    The advantage is GRPO's. It differs from GRPO only off policy, so with `updates_per_batch`
    above 1. The paper tunes the bound and does not state it.
    """

    paper: ClassVar[Paper] = Paper(
        source="2506.13585, equation 4",
        formula="-sg[min(r, cap)] A logp",
        evidence=Evidence.CODE,
    )

    cap: float = 5.0
    """Upper bound of the importance weight itself (ScaleRL's 5), not an offset from 1."""

    def __post_init__(self) -> None:
        self.check_not_negative("cap")

    def objective(self) -> Objective:
        return CappedWeight(cap=self.cap)
