"""Advantages whitened over the whole batch instead of the group (REINFORCE++, 2501.03262).

Unlike GRPO nothing is divided within a group: one mean and one standard deviation are taken over
the tokens of the optimiser's batch. The variant for reasoning subtracts each group's mean first.

Reconstructed: the paper takes a k1 penalty off the reward of every token, before the whitening.
Here the KL penalty is the config's `kl_coef`, by default with the estimate k2: a loss of each token
for itself, which does not look at later ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from rlvr_fast.advantages import centred, whitened
from rlvr_fast.methods.base import (
    Evidence,
    Method,
    Paper,
    group_offsets,
    net_rewards,
    with_advantages,
)
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.methods.scores import Scorer
from rlvr_fast.objectives import ClippedSurrogate, Objective


class Baseline(StrEnum):
    """What is subtracted from a reward before whitening."""

    NONE = "none"
    GROUP_MEAN = "group_mean"


@dataclass(frozen=True, kw_only=True)
class ReinforcePP(Method):
    """Clipped surrogate, mean over all tokens; advantage (x - mean) / std over the batch's tokens.

    `x` is the reward, or the reward minus its group's mean. Works with one completion per prompt
    only without that baseline. `refill_rounds` replaces groups with equal rewards only with it.
    """

    paper: ClassVar[Paper] = Paper(
        source="2501.03262",
        formula="A = whiten(R) or whiten(R - group mean), over the tokens of the batch",
        evidence=Evidence.CODE,
        reconstructed=("KL penalty as k2 in the loss instead of k1 in the reward",),
    )
    settings: ClassVar[Mapping[str, object]] = {"kl_estimate": "k2"}

    baseline: Baseline = Baseline.NONE
    """none: REINFORCE++; group_mean: its variant with a baseline."""
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high")

    def advantages(self, groups: Groups) -> Groups:
        # Those of `shape` take their place; a refill asks these whether a group has a signal.
        if self.baseline is Baseline.NONE:
            return self._whitened(groups)
        return with_advantages(groups, self._plain(groups).nan_to_num(0.0))

    def shape(self, groups: Groups, scorer: Scorer) -> Groups:
        return self._whitened(groups)

    def objective(self) -> Objective:
        return ClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)

    def _plain(self, groups: Groups) -> Tensor:
        rewards = net_rewards(groups)
        if self.baseline is Baseline.NONE:
            return rewards
        return torch.where(
            rewards.isnan(), rewards.double(), centred(rewards, group_offsets(groups))
        )

    def _whitened(self, groups: Groups) -> Groups:
        lengths = [rollout.scored_tokens for group in groups for rollout in group]
        return with_advantages(groups, whitened(self._plain(groups), torch.tensor(lengths)))
