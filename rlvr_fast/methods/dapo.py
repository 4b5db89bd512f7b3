"""Higher clip, token mean, dynamic sampling and a soft length penalty (DAPO, 2503.14476).

Against GRPO: ratios count up to 1.28; every token counts the same; prompts whose completions are
all right or all wrong are replaced (`refill_rounds`, at most 10 rounds of sampling in all); the
reward falls by up to 1 over the last tokens before the limit (`overlong`, `overlong_buffer`). No
KL penalty.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from rlvr_fast.methods.base import Evidence, Method, Paper
from rlvr_fast.methods.rollouts import Group, Groups
from rlvr_fast.objectives import ClippedSurrogate, Objective


@dataclass(frozen=True, kw_only=True)
class DAPO(Method):
    """Clipped surrogate, mean over all tokens; advantage as in GRPO, of the penalised rewards.

    Groups with equal rewards before the penalty are replaced by those of other prompts: lengths
    alone give no signal.
    """

    paper: ClassVar[Paper] = Paper(
        source="2503.14476, equations 8 to 13",
        formula="-min(r A, clip(r, 0.8, 1.28) A), token mean, groups with 0 < right < G",
        evidence=Evidence.CODE,
    )
    settings: ClassVar[Mapping[str, object]] = {"refill_rounds": 9, "overlong": "penalty"}

    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.28
    """The ratio counts up to 1 + clip_high."""
    dual_clip: float | None = 10.0
    """For negative advantages the ratio counts up to this (the released recipes); none: no bound.
    """

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip: wanted > 1 or none, got {self.dual_clip}")

    def advantages(self, groups: Groups) -> Groups:
        found = super().advantages(groups)
        return [group if _mixed(group) else _without_signal(group) for group in found]

    def objective(self) -> Objective:
        return ClippedSurrogate(
            clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip
        )


def _mixed(group: Group) -> bool:
    return len({rollout.reward for rollout in group if rollout.reward is not None}) > 1


def _without_signal(group: Group) -> Group:
    return [replace(rollout, advantage=0.0) for rollout in group]
