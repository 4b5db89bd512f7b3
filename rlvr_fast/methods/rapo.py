"""Forward KL to a reference that low rewards flatten (RAPO, 2510.03865)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.methods.base import BatchShape, Evidence, Method, Paper
from rlvr_fast.methods.rollouts import Groups, Rollout
from rlvr_fast.methods.scores import Scorer, Scores
from rlvr_fast.objectives import MAX_LOG_RATIO, ClippedSurrogate, Objective, Tokens

POWER, LOG_NORMALISER = "power", "log_normaliser"
FLATTEST = 1e-9
"""A power that small makes any row uniform to fp32, and has a temperature."""


class Gradient(StrEnum):
    """What is differentiated of the estimate of the KL."""

    PATHWISE = "pathwise"
    EXACT = "exact"


class Normaliser(StrEnum):
    """What the flattened reference is divided by."""

    EXACT = "exact"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class FlattenedReferenceKL(Objective):
    """`coef (x log x - x + 1)`, x = q / pi, `log q = power ref_logp - log_normaliser`.

    On policy its mean is KL(q || pi) where q sums to 1, and it is never below 0. Its own gradient
    `-x log x dlogp` is another one's; with `exact` it is `-x dlogp`, whose mean is the KL's.
    """

    coef: float = 0.001
    exact: bool = False

    def token_loss(self, t: Tokens) -> Tensor:
        target = t.extras[POWER] * t.ref_logp - t.extras[LOG_NORMALISER]
        gap = (target - t.logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        x = torch.exp(gap)
        value = x * gap - x + 1
        if self.exact:
            value = value.detach() - x.detach() * (t.logp - t.logp.detach())
        return self.coef * value


@dataclass(frozen=True, kw_only=True)
class RAPO(Method):
    """GRPO plus `kl_weight` KL(q || pi) and an entropy bonus; q is the reference to a power.

    The power is `power_right` at a reward of 1 or more, `power_wrong` at 0 or less, linear in
    between: a right answer keeps the reference as it is, a wrong one flattens it, so that the
    policy is told to look elsewhere. Who could not be scored keeps it. The entropy bonus is the
    config's `entropy_coef`.

    The exact normaliser of q takes a forward of the reference for the rollouts of each power other
    than 1, before the first update, on each rank, besides the one for its log-probabilities.
    """

    paper: ClassVar[Paper] = Paper(
        source="2510.03865",
        formula="GRPO + a (x log x - x + 1) - b H, x = q / pi, q ~ ref^power(R)",
        evidence=Evidence.DIGEST,
        reconstructed=(
            "the powers 1 and 0.5, linear in the reward",
            "both coefficients, 0.001",
            "that the estimate is differentiated as it stands",
            "whether q is normalised: here exactly, or with normaliser = none not at all",
            "means over the tokens of a sequence, then over sequences, as GRPO",
        ),
    )
    needs_reference: ClassVar[bool] = True
    settings: ClassVar[Mapping[str, object]] = {"entropy_coef": 0.001}

    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high."""
    kl_weight: float = 0.001
    """Of the forward KL; 0: GRPO."""
    power_right: float = 1.0
    """Of the reference at a reward of 1, in [0, 1]; 1 keeps it."""
    power_wrong: float = 0.5
    """Of the reference at a reward of 0, in [0, 1]; 0 makes it uniform."""
    gradient: Gradient = Gradient.PATHWISE
    """Of the estimate as it stands; or exact: in the mean the KL's own."""
    normaliser: Normaliser = Normaliser.EXACT
    """q sums to 1; or none: the power of the reference as it is, without a further forward."""

    def __post_init__(self) -> None:
        self.check_not_negative("clip_low", "clip_high", "kl_weight")
        for name in ("power_right", "power_wrong"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: wanted a number in [0, 1], got {getattr(self, name)}")

    def shape(self, groups: Groups, scorer: Scorer) -> Groups:
        shaped = [[replace(r, extras=self._extras(r.reward)) for r in g] for g in groups]
        if self.normaliser is Normaliser.NONE or self.kl_weight == 0:
            return shaped
        for power in sorted({self.power(r.reward) for group in groups for r in group} - {1.0}):
            shaped = _normalised(shaped, power, scorer)
        return shaped

    def seq_weights(self, shape: BatchShape) -> Tensor:
        return aggregate.sequence_mean(shape.seq_lengths)

    def objective(self) -> Objective:
        surrogate = ClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)
        if self.kl_weight == 0:
            return surrogate
        exact = self.gradient is Gradient.EXACT
        return surrogate + FlattenedReferenceKL(coef=self.kl_weight, exact=exact)

    def power(self, reward: float | None) -> float:
        """Of the reference, for a rollout with that reward."""
        if reward is None:
            return 1.0
        share = min(max(reward, 0.0), 1.0)
        return self.power_wrong + share * (self.power_right - self.power_wrong)

    def _extras(self, reward: float | None) -> dict[str, float]:
        return {POWER: self.power(reward), LOG_NORMALISER: 0.0}


def _normalised(groups: Groups, power: float, scorer: Scorer) -> Groups:
    """The same groups; those of this power with `log sum_v ref(v)^power` of every token.

    That is `logsumexp(power z) - power logsumexp(z)`, and `power z` is z at a higher temperature.
    """
    chosen = [[r for r in group if r.extras[POWER] == power] for group in groups]
    temperature = scorer.temperature / max(power, FLATTEST)
    plain = _logsumexps(scorer.rollouts(chosen, reference=True))
    flat = _logsumexps(scorer.rollouts(chosen, reference=True, temperature=temperature))
    found = iter([after - power * before for before, after in zip(plain, flat, strict=True)])

    def changed(rollout: Rollout) -> Rollout:
        if rollout.extras[POWER] != power:
            return rollout
        return replace(rollout, extras={**rollout.extras, LOG_NORMALISER: next(found).tolist()})

    return [[changed(rollout) for rollout in group] for group in groups]


def _logsumexps(scores: Sequence[Sequence[Scores]]) -> list[Tensor]:
    return [each.logsumexp.double() for group in scores for each in group]
