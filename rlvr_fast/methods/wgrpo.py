"""Two prompts, one rarely solved and one rarely failed, and weighted outcomes (W-GRPO, 2602.03452).

In the first step candidates are probed: so many completions each, scored by the verifier. q+ is
the one that is solved most rarely, but not never, q- the one that is failed most rarely, but not
never. From then on every batch is made of these two in turn.

A right answer is worth 1, a wrong one -negative_weight, before the group is normalised. Any two
values standardise to the same numbers, `sqrt((1 - p) / p)` and `-sqrt(p / (1 - p))` at success
rate p: with norm = std negative_weight changes nothing, except through the 1e-6 added to the std.
It counts with norm = mean. The amplification of rare outcomes is the standardisation's own.

The paper takes q+ with a success rate in [1/G, c/G] and q- with one in [1 - c/G, 1 - 1/G]. Its c is
not published; if any candidate is in such a band, the rarest is, whatever c. Ours: one pool of
candidates, the next prompts of the task's order, where the paper has a pool of easy and one of hard
prompts; their number; what happens where fewer than two candidates are neither always nor never
solved: the step trains on ordinary prompts, and the next one probes again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.methods.base import (
    BatchShape,
    Context,
    Evidence,
    Method,
    Paper,
    group_offsets,
    with_advantages,
)
from rlvr_fast.methods.rollouts import Group, Groups, Rollout
from rlvr_fast.objectives import ClippedSurrogate, Objective
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale, group_advantages
from rlvr_fast.prompts import Prompt


class Norm(StrEnum):
    """What a group's centred values are divided by: their standard deviation (n), or nothing."""

    STD = "std"
    MEAN = "mean"


@dataclass(frozen=True, kw_only=True)
class WGRPO(Method):
    """Clipped surrogate, mean over sequences of token means; trained on one pair of prompts.

    The first step also samples from `probe_prompts` candidates to find that pair. With norm = std
    negative_weight changes nothing: any two values standardise to the same numbers.
    """

    paper: ClassVar[Paper] = Paper(
        source="2602.03452",
        formula="v = 1 if right else -negative_weight; A = (v - mean(v)) / std(v)",
        evidence=Evidence.DIGEST,
        reconstructed=(
            "negative_weight and probe_prompts: values are not published",
            "q+ chosen as the mirror image of q-",
            "weights of the pair, applied after the normalisation",
            "the rarest of one pool instead of bands in two",
        ),
    )

    negative_weight: float = 1.0
    """A wrong answer is worth minus this; see above for when that matters."""
    norm: Norm = Norm.STD
    """Divide by the group's standard deviation (population), or only subtract its mean."""
    hard_weight: float = 1.0
    """Multiplies the advantages of q+; without a pair, of groups of which at most half is right."""
    easy_weight: float = 1.0
    """Multiplies the advantages of q-; without a pair, of all other groups."""
    pair: bool = True
    """Train on one pair of prompts; false: on all, with weighted outcomes."""
    probe_prompts: int = 64
    """Candidates for the pair."""
    probe_samples: int | None = None
    """Completions of each candidate; none: samples_per_prompt."""
    right_above: float = 0.5
    """A reward above this is a right answer; the number is ours."""
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""
    _chosen: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.check_not_negative(
            "negative_weight", "hard_weight", "easy_weight", "clip_low", "clip_high"
        )
        for name, least in (("probe_prompts", 2), ("probe_samples", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: wanted >= {least}, got {value}")

    def select_prompts(self, context: Context) -> list[Prompt]:
        if self.pair and not self._chosen:
            self._chosen.update(self._probed(context))
        if not self._chosen:
            return super().select_prompts(context)
        pair = [context.prompts[self._chosen[name]] for name in ("hard", "easy")]
        return [pair[(context.position + i) % 2] for i in range(context.prompts_per_step)]

    def advantages(self, groups: Groups) -> Groups:
        values = [self._value(rollout) for group in groups for rollout in group]
        normalisation = GroupNormalisation(
            scale=Scale.STD if self.norm is Norm.STD else Scale.NONE, ddof=0
        )
        found = group_advantages(
            torch.tensor(values, dtype=torch.float64),
            group_offsets(groups),
            normalisation=normalisation,
        )
        weights = [self._weight(group) for group in groups for _ in group]
        return with_advantages(groups, found * torch.tensor(weights, dtype=torch.float64))

    def seq_weights(self, shape: BatchShape) -> Tensor:
        return aggregate.sequence_mean(shape.seq_lengths)

    def objective(self) -> Objective:
        return ClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._chosen)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._chosen.clear()
        self._chosen.update(state)

    def _probed(self, context: Context) -> dict[str, int]:
        """The indices of the pair, or nothing."""
        count = min(self.probe_prompts, len(context.prompts))
        candidates = {p.index: p for p in context.prompts.take(context.position, count)}
        # All ranks probe with the same seed, so that they find the same pair.
        sampling = replace(
            context.sampling, n=self.probe_samples or context.sampling.n, seed=context.step
        )
        prompts = [
            replace(prompt, example=replace(prompt.example, samples=None))
            for prompt in candidates.values()
        ]
        probing = replace(context, sampling=sampling)
        groups = self.verify(probing, self.rollout(probing, prompts))
        rates = {group[0].prompt.index: self._rate(group) for group in groups}
        return pair_of(rates)

    def _right(self, rollout: Rollout) -> bool:
        return rollout.reward is not None and rollout.reward > self.right_above

    def _rate(self, group: Group) -> float:
        scored = [rollout for rollout in group if rollout.reward is not None]
        return sum(map(self._right, scored)) / len(scored) if scored else 0.0

    def _value(self, rollout: Rollout) -> float:
        if rollout.reward is None:
            return math.nan
        return (1.0 if self._right(rollout) else -self.negative_weight) - rollout.penalty

    def _weight(self, group: Group) -> float:
        if self._chosen:
            hard = group[0].prompt.index == self._chosen["hard"]
        else:
            hard = self._rate(group) <= 0.5
        return self.hard_weight if hard else self.easy_weight


def pair_of(rates: Mapping[int, float]) -> dict[str, int]:
    """Under `hard` and `easy` the prompts that are solved and failed most rarely, but not never.

    Args:
        rates: of success, by the prompt's index.

    Returns:
        Two different prompts; empty if fewer than two are sometimes solved and sometimes failed.
    """
    mixed = sorted((rate, index) for index, rate in rates.items() if 0 < rate < 1)
    return {"hard": mixed[0][1], "easy": mixed[-1][1]} if len(mixed) > 1 else {}
