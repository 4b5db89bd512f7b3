"""PPO's clipped objective with a dual clip, without a value network (1707.06347, 1912.09729).

There is no critic, so no generalised advantage estimate (GAE) either. What would be the value of
every token is the mean reward of the prompt's completions; with discount and lambda 1 the estimate
is then the reward minus that mean, which is whitened over the tokens of the batch, as PPO usually
does with its estimates. Against GRPO: no division within the group, mean over tokens, dual clip.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlvr_fast.advantages import whitened
from rlvr_fast.methods.base import Evidence, Method, Paper, net_rewards, with_advantages
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.methods.scores import Scorer
from rlvr_fast.objectives import ClippedSurrogate, Objective
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale


@dataclass(frozen=True, kw_only=True)
class PPO(Method):
    """Clipped surrogate, mean over all tokens; advantage whiten(reward - group mean)."""

    paper: ClassVar[Paper] = Paper(
        source="1707.06347, equation 7; 1912.09729, equation 5",
        formula="-min(r A, clip(r, 1 +- 0.2) A), at most -3 A where A < 0",
        evidence=Evidence.CODE,
        reconstructed=("the group's mean reward in place of a learned value",),
    )

    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""
    dual_clip: float | None = 3.0
    """For negative advantages the ratio counts up to this; none: no bound."""
    whiten: bool = True
    """Whiten the advantages over the tokens of the batch."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip: wanted > 1 or none, got {self.dual_clip}")

    def normalisation(self) -> GroupNormalisation:
        return GroupNormalisation(scale=Scale.NONE)

    def shape(self, groups: Groups, scorer: Scorer) -> Groups:
        if not self.whiten:
            return groups
        lengths = torch.tensor([rollout.scored_tokens for group in groups for rollout in group])
        flat = [rollout.advantage for group in groups for rollout in group]
        values = torch.tensor(flat, dtype=torch.float64)
        values[net_rewards(groups).isnan()] = float("nan")
        return with_advantages(groups, whitened(values, lengths))

    def objective(self) -> Objective:
        return ClippedSurrogate(
            clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip
        )
