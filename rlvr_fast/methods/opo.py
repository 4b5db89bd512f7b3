"""Exactly on policy, with the length-weighted reward as baseline (OPO, 2505.23585).

Unlike GRPO: no ratio, no clip, no division by a standard deviation, and long completions count more
in the baseline. The advantages of a group, each times its tokens, add up to 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlvr_fast.advantages import less_length_weighted_mean
from rlvr_fast.methods.base import (
    Evidence,
    Method,
    Paper,
    group_offsets,
    net_rewards,
    with_advantages,
)
from rlvr_fast.methods.rollouts import Groups
from rlvr_fast.objectives import Objective, PolicyGradient


@dataclass(frozen=True, kw_only=True)
class OPO(Method):
    """`-A logp`, mean over all tokens; one update per batch."""

    paper: ClassVar[Paper] = Paper(
        source="2505.23585, section 3.2",
        formula="-A logp, A = R - sum(length R) / sum(length)",
        evidence=Evidence.CODE,
    )
    on_policy_only: ClassVar[bool] = True

    def advantages(self, groups: Groups) -> Groups:
        lengths = [rollout.scored_tokens for group in groups for rollout in group]
        rewards, offsets = net_rewards(groups), group_offsets(groups)
        return with_advantages(
            groups, less_length_weighted_mean(rewards, torch.tensor(lengths), offsets)
        )

    def objective(self) -> Objective:
        return PolicyGradient()
