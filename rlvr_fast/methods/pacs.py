"""Outcome prediction: cross-entropy on what the policy's ratios say (PACS, 2509.02522)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlvr_fast import aggregate
from rlvr_fast.methods.base import BatchShape, Evidence, Method, Paper
from rlvr_fast.methods.rollouts import Group, Groups
from rlvr_fast.objectives import Objective
from rlvr_fast.ops.group_advantages import GroupNormalisation, Scale
from rlvr_fast.tracing.tokens import Tokens

LABEL, CLASS_WEIGHT = "label", "class_weight"
"""The extras: 1 for a correct completion, else 0; and what its loss is multiplied by."""


class Proxy(StrEnum):
    """What the policy is taken to predict of a completion."""

    SUMMED_RATIO = "summed_ratio"
    MEAN_LOGP = "mean_logp"


class Centring(StrEnum):
    """What a proxy is compared with to become a score."""

    RLOO = "rloo"
    GRPO = "grpo"
    NONE = "none"


class Balance(StrEnum):
    """How much a completion counts by its label."""

    QUESTION = "question"
    ONLY_POSITIVE = "only_positive"
    ONLY_NEGATIVE = "only_negative"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class OutcomeCrossEntropy(Objective):
    """`class_weight (softplus(s) - label s)` of the sequence's score `s`, on each of its tokens.

    The proxy of a sequence is `beta` times the sum of its log-ratios, or the mean of its
    log-probabilities. Its score is the proxy less the mean of the group's others (rloo), or
    standardised in the group (grpo: n - 1, eps 1e-6), or the proxy itself: a gradient flows to all
    sequences of the group. A group of one is compared with 0 (rloo), or with itself (grpo), which
    leaves no gradient. Aggregate with `sequence_mean`. A sequence of which all tokens are masked is
    not of its group.
    """

    beta: float = 1.0
    proxy: Proxy = Proxy.SUMMED_RATIO
    centring: Centring = Centring.RLOO

    def token_loss(self, t: Tokens) -> Tensor:
        score = self.score(t)
        return t.extras[CLASS_WEIGHT] * (softplus(score) - t.extras[LABEL] * score)

    def score(self, t: Tokens) -> Tensor:
        """`[T]`, the same for all tokens of a sequence; the logit of being correct."""
        if self.proxy is Proxy.SUMMED_RATIO:
            proxy = self.beta * t.seq_sum(t.logp - t.old_logp)
        else:
            proxy = self.beta * t.seq_mean(t.logp)
        if self.centring is Centring.NONE:
            return proxy
        length = t.seq_sum(torch.ones_like(proxy)).clamp(min=1)
        size, total = t.group_sum(1 / length), t.group_sum(proxy / length)
        others = (size - 1).clamp(min=1)
        if self.centring is Centring.RLOO:
            return proxy - (total - proxy) / others
        centred = proxy - total / size.clamp(min=1)
        variance = t.group_sum(centred**2 / length) / others
        # The derivative of a root at 0 is infinite; on policy all proxies are equal.
        positive = variance > 0
        std = torch.where(positive, variance, torch.ones_like(variance)).sqrt() * positive
        return centred / (std + 1e-6)


@dataclass(frozen=True, kw_only=True)
class PACS(Method):
    """Cross-entropy between outcomes and the policy's log-ratios, in place of a surrogate.

    The score of a completion is its summed log-ratio less the mean of the others in its group, and
    the label is whether it is correct. On policy and without class weights the gradient is RLOO's;
    later a completion that is predicted right is let go. No clip, no KL. Rewards count through the
    label only, penalties not at all. Every micro-batch holds whole groups. Centred as in GRPO the
    first update of a batch divides by a std of 0 + 1e-6: `max_grad_norm` then sets its size.
    """

    paper: ClassVar[Paper] = Paper(
        source="2509.02522; github.com/ritzz-ai/PACS, pacs_core_algos.py",
        formula="w BCE(psi - mean of the others' psi, correct), psi = beta sum_t log r",
        evidence=Evidence.CODE,
        reconstructed=("a completion that nobody could score is left out", "a group of one"),
    )

    beta: float = 1.0
    """What the log-ratios are multiplied by."""
    proxy: Proxy = Proxy.SUMMED_RATIO
    """The sum of a completion's log-ratios, or the mean of its log-probabilities."""
    centring: Centring = Centring.RLOO
    """Scores are compared with the group's others (rloo), standardised in it (grpo) or neither."""
    balance: Balance = Balance.QUESTION
    """In groups with both labels each counts half (question), or only one label counts, or none."""
    correct: float = 1.0
    """A completion with at least this reward counts as correct."""

    def __post_init__(self) -> None:
        self.check_not_negative("beta")

    def normalisation(self) -> GroupNormalisation:
        """Read by nothing but what asks whether a group has a signal on policy."""
        return GroupNormalisation(scale=Scale.LEAVE_ONE_OUT)

    def advantages(self, groups: Groups) -> Groups:
        return [self._labelled(group) for group in super().advantages(groups)]

    def _labelled(self, group: Group) -> Group:
        group = [
            rollout
            if rollout.reward is not None
            else replace(rollout, loss_mask=[0] * len(rollout.completion_ids))
            for rollout in group
        ]
        labels = [float((rollout.reward or 0.0) >= self.correct) for rollout in group]
        trained = [
            label for label, rollout in zip(labels, group, strict=True) if rollout.scored_tokens
        ]
        return [
            replace(
                rollout,
                extras={
                    **rollout.extras,
                    LABEL: label,
                    CLASS_WEIGHT: class_weight(label, trained, self.balance),
                },
            )
            for rollout, label in zip(group, labels, strict=True)
        ]

    def seq_weights(self, shape: BatchShape) -> Tensor:
        return aggregate.sequence_mean(shape.seq_lengths)

    def objective(self) -> Objective:
        return OutcomeCrossEntropy(beta=self.beta, proxy=self.proxy, centring=self.centring)


def class_weight(label: float, labels: Sequence[float], balance: Balance) -> float:
    """Of a completion with this label in a group with these."""
    match balance:
        case Balance.NONE:
            return 1.0
        case Balance.ONLY_POSITIVE:
            return label
        case Balance.ONLY_NEGATIVE:
            return 1 - label
        case Balance.QUESTION:
            same = sum(other == label for other in labels)
            return len(labels) / (2 * same) if 0 < same < len(labels) else 1.0
