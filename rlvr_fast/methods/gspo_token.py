"""GSPO with advantages that may vary by token (GSPO-token, 2507.18071, equations 13 and 14)."""

from dataclasses import dataclass
from typing import ClassVar

from rlvr_fast.methods.base import Evidence, Paper
from rlvr_fast.methods.gspo import GSPO


@dataclass(frozen=True, kw_only=True)
class GSPOToken(GSPO):
    """Each token has the sequence's ratio as its value and its own log-probability as gradient.

    `s_t = sg[s] r_t / sg[r_t]` is clipped against the token's own advantage. The objective of
    `gspo` is written in this form already, so the two are the same method as long as all tokens of
    a completion share one advantage, which is what this one gives by itself (GRPO's). They part
    where a subclass, or a method's `shape`, puts a list into `Rollout.advantage`: then a token is
    clipped by the sign of its own advantage, where the sequence form would have one sign for all.
    """

    paper: ClassVar[Paper] = Paper(
        source="2507.18071, equations 13 and 14",
        formula="-min(s_t A_t, clip(s_t) A_t), s_t = sg[s] r_t / sg[r_t], s = exp(mean_t log r)",
        evidence=Evidence.CODE,
    )
