"""Each half of a group is compared with the other half and with itself (CANON, 2509.23962).

A group is halved by a metric of its completions, their mean token entropy or their length. GRPO
compares a reward with the mean of the group; here it is compared with the mean of the other half,
with weight `mu`, and with that of its own half, with weight `1 - mu`. The entropies are those of
the policy at the start of the step and cost a forward pass; lengths cost nothing.

Reconstructed: which half has the odd completion (the upper), and which of equals is the lower one
(that of the lower token ids); that `mu` is what a cosine schedules,
between 0 and `peak`; that the accuracy is the whole batch's. The default schedule is ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import fmean
from typing import ClassVar

from rlvr_fast.methods.base import Evidence, Paper
from rlvr_fast.methods.dr_grpo import DrGRPO
from rlvr_fast.methods.rollouts import Group, Groups, Rollout
from rlvr_fast.methods.scores import Scorer


class Metric(StrEnum):
    """What a group is halved by."""

    ENTROPY = "entropy"
    LENGTH = "length"


class Schedule(StrEnum):
    """Of `mu`; see the options of `CANON`."""

    CONSTANT = "constant"
    ACCURACY = "accuracy"
    COSINE = "cosine"
    REVERSED_COSINE = "reversed_cosine"


@dataclass(frozen=True, kw_only=True)
class CANON(DrGRPO):
    """Dr. GRPO, but for the advantage: with mu = 0.5, alpha = 1 and equal halves it is that."""

    paper: ClassVar[Paper] = Paper(
        source="2509.23962 and github.com/biuboomc/CANON",
        formula="A = mu (R - mean of other half) + (1 - mu) (R - mean of own half)",
        evidence=Evidence.CODE,
        reconstructed=(
            "which half has the odd completion, which of equals is lower",
            "what the cosine schedules",
            "accuracy of the whole batch",
            "default schedule",
        ),
    )

    clip_high: float = 0.28
    """The ratio counts up to 1 + clip_high."""
    metric: Metric = Metric.ENTROPY
    """Of a completion: mean token entropy under the policy that starts the step, or length."""
    schedule: Schedule = Schedule.ACCURACY
    """Of the weight of the other half: constant mu; the batch's mean reward (kept in 0 to 1); or a
    cosine from `peak` down to 0, or reversed from 0 up to it, with restarts."""
    mu: float = 0.5
    """Weight of the comparison with the other half, under schedule = constant; 0.5 is no
    preference, 1 compares between the halves only, 0 within them only."""
    alpha: float = 1.0
    """Below 1 it favours the half of high entropy, or of short completions: CANON-Eff uses 0.5 to
    0.96."""
    beta: float = 0.0
    """Added, times mu, in the half of the higher metric and taken off in the other."""
    peak: float = 0.6
    """Of the cosine schedules."""
    cycles: int = 3
    """Of the cosine schedules, each of equal length."""
    warmup: float = 0.2
    """Part of the run before the first cycle, in which mu rises linearly (30 of 150 steps)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_not_negative("alpha")
        for name, within in (("mu", 0 <= self.mu <= 1), ("peak", 0 <= self.peak <= 1)):
            if not within:
                raise ValueError(f"{name}: wanted a number in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: wanted a number in [0, 1), got {self.warmup}")
        if self.cycles < 1:
            raise ValueError(f"cycles: wanted >= 1, got {self.cycles}")
        if not math.isfinite(self.beta):
            raise ValueError(f"beta: wanted a finite number, got {self.beta}")

    def advantages(self, groups: Groups) -> Groups:
        """Dr. GRPO's where entropies or the step are wanted, which `shape` knows."""
        if self._waits:
            return super().advantages(groups)
        return self._conditional(groups, _lengths(groups), self._mu(groups, 0.0))

    def shape(self, groups: Groups, scorer: Scorer) -> Groups:
        if not self._waits:
            return groups
        mu = self._mu(groups, (scorer.step - 1) / scorer.steps)
        if self.metric is Metric.LENGTH:
            return self._conditional(groups, _lengths(groups), mu)
        scores = scorer.rollouts(groups)
        entropies = [
            [_mean(rollout, found.entropy.tolist()) for rollout, found in zip(*both, strict=True)]
            for both in zip(groups, scores, strict=True)
        ]
        return self._conditional(groups, entropies, mu)

    @property
    def _waits(self) -> bool:
        cosine = self.schedule in (Schedule.COSINE, Schedule.REVERSED_COSINE)
        return cosine or self.metric is Metric.ENTROPY

    def _conditional(self, groups: Groups, metrics: list[list[float]], mu: float) -> Groups:
        return [self._of(group, each, mu) for group, each in zip(groups, metrics, strict=True)]

    def _of(self, group: Group, metric: Sequence[float], mu: float) -> Group:
        # Entropies of one distribution differ in their last digits from pass to pass. Those of all
        # completions of one token are equal; whoever came first must not matter.
        metric = [round(each, 5) for each in metric]
        order = sorted(range(len(group)), key=lambda i: (metric[i], list(group[i].completion_ids)))
        scored = [i for i in order if group[i].reward is not None]
        found = conditional_advantages(
            [_net(group[i]) for i in scored],
            [metric[i] for i in scored],
            mu=mu,
            gain_high=self.alpha if self.metric is Metric.LENGTH else 1.0,
            gain_low=self.alpha if self.metric is Metric.ENTROPY else 1.0,
            beta=self.beta,
        )
        by_index = dict(zip(scored, found, strict=True))
        return [replace(each, advantage=by_index.get(i, 0.0)) for i, each in enumerate(group)]

    def _mu(self, groups: Groups, progress: float) -> float:
        """Of a step before which `progress` of the run is done, in [0, 1)."""
        match self.schedule:
            case Schedule.CONSTANT:
                return self.mu
            case Schedule.ACCURACY:
                flat = (rollout.reward for group in groups for rollout in group)
                rewards = [reward for reward in flat if reward is not None]
                return min(max(fmean(rewards), 0.0), 1.0) if rewards else self.mu
        falls = self.schedule is Schedule.COSINE
        if progress < self.warmup:
            return self.peak * progress / self.warmup if falls else 0.0
        within = (progress - self.warmup) / (1 - self.warmup) * self.cycles % 1
        wave = 0.5 * math.cos(math.pi * within)
        return self.peak * (0.5 + (wave if falls else -wave))


def conditional_advantages(
    rewards: Sequence[float],
    metric: Sequence[float],
    *,
    mu: float,
    gain_high: float = 1.0,
    gain_low: float = 1.0,
    beta: float = 0.0,
) -> list[float]:
    """Of one group, halved by the order of `metric`; equal ones stay in the order given.

    Args:
        rewards, metric: one each per completion.
        mu: weight of the other half.
        gain_high, gain_low: multiply the rewards of that half wherever the halves are compared.
        beta: plus in the upper half and minus in the lower one, times mu.

    Returns:
        One number per completion; zeros for fewer than two.
    """
    count = len(rewards)
    if count < 2:
        return [0.0] * count
    order = sorted(range(count), key=lambda i: metric[i])
    low, high = order[: count // 2], order[count // 2 :]
    mean_low, mean_high = (fmean(rewards[i] for i in half) for half in (low, high))
    found = [0.0] * count
    for i in high:
        between = gain_high * rewards[i] - gain_low * mean_low + beta
        found[i] = mu * between + (1 - mu) * (rewards[i] - mean_high)
    for i in low:
        between = gain_low * rewards[i] - gain_high * mean_high - beta
        found[i] = mu * between + (1 - mu) * (rewards[i] - mean_low)
    return found


def _net(rollout: Rollout) -> float:
    return (rollout.reward or 0.0) - rollout.penalty


def _lengths(groups: Groups) -> list[list[float]]:
    return [[float(len(rollout.completion_ids)) for rollout in group] for group in groups]


def _mean(rollout: Rollout, values: Sequence[float]) -> float:
    """Over the tokens that the policy wrote; 0 for none."""
    mask = rollout.loss_mask
    kept = [x for i, x in enumerate(values) if mask is None or mask[i]]
    return fmean(kept) if kept else 0.0
