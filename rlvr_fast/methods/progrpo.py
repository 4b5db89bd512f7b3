"""GRPO that lifts answers the policy was unsure of (ProGRPO, 2602.05281).

The confidence in a text is the exponential of the mean log-probability of its least likely fifth
of tokens. To GRPO's advantage comes `alpha` times the confidence in the prompt less that in the
answer: of two equally good answers the less confident one is learnt more.

Read through others' quotations of the equations only. Ours: `alpha`, that the fifth is rounded up,
and that a prompt of one token counts as certain.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

from torch import Tensor

from rlvr_fast.methods.base import Evidence, Paper
from rlvr_fast.methods.grpo import GRPO, Aggregation
from rlvr_fast.methods.rollouts import Group, Groups, Rollout
from rlvr_fast.methods.scores import Scorer


class Applies(StrEnum):
    """Which groups are changed."""

    UNEQUAL = "unequal"
    SOME_CORRECT = "some_correct"


@dataclass(frozen=True, kw_only=True)
class ProGRPO(GRPO):
    """GRPO's advantage plus `alpha (confidence in the prompt - confidence in the answer)`."""

    paper: ClassVar[Paper] = Paper(
        source="2602.05281",
        formula="A = (R - mean) / std + alpha (c(q) - c(o)), c = exp(mean of the lowest logp)",
        evidence=Evidence.DIGEST,
        reconstructed=("alpha", "which groups are left alone", "rounding of the fifth"),
    )

    clip_high: float = 0.28
    """The ratio counts up to 1 + clip_high."""
    aggregation: Aggregation = Aggregation.TOKEN_MEAN
    """Mean over sequences of token means, or mean over all tokens."""
    alpha: float = 0.2
    """Of the difference in confidence; the default is ours."""
    fraction: float = 0.2
    """Of a text's tokens, the least likely: what its confidence is measured on."""
    applies_to: Applies = Applies.UNEQUAL
    """Groups whose rewards differ, or groups with a reward above 0, so all correct ones too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("alpha")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: wanted a number in (0, 1], got {self.fraction}")

    def shape(self, groups: Groups, scorer: Scorer) -> Groups:
        chosen = [i for i, group in enumerate(groups) if self.alpha and self._changes(group)]
        if not chosen:
            return groups
        # Those of a group may differ, by a hint say.
        prompts = list({tuple(r.train_prompt_ids) for i in chosen for r in groups[i]})
        asked = dict(zip(prompts, scorer.prompts(prompts), strict=True))
        confidence = {ids: self._confidence(logp) for ids, logp in asked.items()}
        shaped = list(groups)
        for i, scores in zip(chosen, scorer.rollouts([groups[i] for i in chosen]), strict=True):
            shaped[i] = [
                self._lifted(rollout, confidence[tuple(rollout.train_prompt_ids)], found.logp)
                for rollout, found in zip(groups[i], scores, strict=True)
            ]
        return shaped

    def _changes(self, group: Group) -> bool:
        rewards = [r.reward - r.penalty for r in group if r.reward is not None]
        match self.applies_to:
            case Applies.UNEQUAL:
                return len(set(rewards)) > 1
            case Applies.SOME_CORRECT:
                return any(reward > 0 for reward in rewards)

    def _lifted(self, rollout: Rollout, prompt_confidence: float, logp: Tensor) -> Rollout:
        if rollout.reward is None or not rollout.scored_tokens:
            return rollout
        own = logp if rollout.loss_mask is None else logp[logp.new_tensor(rollout.loss_mask) != 0]
        assert isinstance(rollout.advantage, float)
        lift = self.alpha * (prompt_confidence - self._confidence(own))
        return replace(rollout, advantage=rollout.advantage + lift)

    def _confidence(self, logp: Tensor) -> float:
        return low_quantile_confidence(logp, self.fraction)


def low_quantile_confidence(logp: Tensor, fraction: float) -> float:
    """`exp(mean)` of the lowest `fraction` of `[t]` log-probabilities, at least one; 1 of none."""
    if not len(logp):
        return 1.0
    # 0.2 * 15 is a little more than 3 in floats.
    count = max(math.ceil(fraction * len(logp) - 1e-9), 1)
    return float(logp.double().topk(count, largest=False).values.mean().exp())
