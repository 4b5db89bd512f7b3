"""TRL's loss types as objectives and token weights, as `GRPOTrainer._compute_loss` 1.16 has them.

They are stated again, and not taken from `objectives` and `methods`, where TRL deviates: one ratio
per sequence is differentiated through all of its tokens, so that advantages may differ within a
sequence; `delta` bounds ratios of positive advantages too; the floors and caps are TRL's.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.objectives import KL3, Objective, Tokens, clipped, importance_ratio

FACTOR, ENTROPY, SAMPLER = "factor", "entropy_weight", "sampler_log_ratio"
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
MAX_LOG, LOG_FLOOR = 20.0, math.log(1e-8)


def ratio(t: Tokens, by_sequence: bool) -> Tensor:
    """`exp(logp - old_logp)`, or `exp` of its mean over the sequence (2507.18071, equation 7)."""
    if not by_sequence:
        return importance_ratio(t.logp, t.old_logp)
    return torch.exp(t.seq_mean(t.logp - t.old_logp).clamp(-MAX_LOG, MAX_LOG))


@dataclass(frozen=True, kw_only=True)
class Clipped(Objective):
    """`-min(min(r, delta) A, clip(r, 1 - clip_low, 1 + clip_high) A)`."""

    clip_low: float
    clip_high: float
    delta: float | None
    by_sequence: bool

    def token_loss(self, t: Tokens) -> Tensor:
        r, low, high = ratio(t, self.by_sequence), 1 - self.clip_low, 1 + self.clip_high
        if self.delta is None:
            return clipped(r, t.advantage, low, high)
        bounded = r.clamp(max=self.delta) * t.advantage
        return -torch.minimum(bounded, r.clamp(low, high) * t.advantage)


@dataclass(frozen=True, kw_only=True)
class Capped(Objective):
    """`-sg[min(r, cap)] A logp` (CISPO, 2506.13585, equation 4)."""

    cap: float
    by_sequence: bool

    def token_loss(self, t: Tokens) -> Tensor:
        return -ratio(t, self.by_sequence).detach().clamp(max=self.cap) * t.advantage * t.logp


@dataclass(frozen=True, kw_only=True)
class Gated(Objective):
    """`-(4 / tau) sigmoid(tau (r - 1)) A` (SAPO, 2511.20347)."""

    tau_positive: float
    tau_negative: float
    by_sequence: bool

    def token_loss(self, t: Tokens) -> Tensor:
        ones = torch.ones_like(t.advantage)
        tau = torch.where(t.advantage > 0, ones * self.tau_positive, ones * self.tau_negative)
        gate = torch.sigmoid(tau * (ratio(t, self.by_sequence) - 1))
        return -4 / tau * gate * t.advantage


@dataclass(frozen=True, kw_only=True)
class GammaWeighted(Objective):
    """`-sg[W^k exp(lambda (1 - W))] A logp`, `W` the product of the ratios (VESPO, 2602.10693)."""

    k_positive: float
    lambda_positive: float
    k_negative: float
    lambda_negative: float
    from_sampler: bool
    """`W` also counts `extras["sampler_log_ratio"]`."""

    def token_loss(self, t: Tokens) -> Tensor:
        gap = (t.logp - t.old_logp).detach().clamp(-MAX_LOG, MAX_LOG)
        if self.from_sampler:
            gap = gap + t.extras[SAMPLER]
        log_ratio = t.seq_sum(gap).clamp(LOG_FLOOR, MAX_LOG)
        beyond = 1 - torch.exp(log_ratio)
        log_weight = torch.where(
            t.advantage >= 0,
            self.k_positive * log_ratio + max(self.lambda_positive, 1e-4) * beyond,
            self.k_negative * log_ratio + max(self.lambda_negative, 1e-4) * beyond,
        )
        return -torch.exp(log_weight) * t.advantage * t.logp


@dataclass(frozen=True, kw_only=True)
class CloseEnough(Objective):
    """0 for sequences with a negative advantage that have left the sampler (2512.02556).

    They have where the mean over a sequence of `rollout_logp - logp` is above `threshold`, nats;
    a `rollout_logp` that is not a number counts as no difference.
    """

    objective: Objective
    threshold: float

    def token_loss(self, t: Tokens) -> Tensor:
        gap = t.rollout_logp - t.logp.detach()
        gap = t.seq_mean(torch.where(gap == gap, gap, torch.zeros_like(gap)))
        loss = self.objective.token_loss(t)
        kept = (t.advantage >= 0) | (gap <= self.threshold)
        return torch.where(kept, loss, torch.zeros_like(loss))


@dataclass(frozen=True, kw_only=True)
class Scaled(Objective):
    """`extras["factor"]` times another objective."""

    objective: Objective

    def token_loss(self, t: Tokens) -> Tensor:
        return t.extras[FACTOR] * self.objective.token_loss(t)


@dataclass(frozen=True, kw_only=True)
class RatioKL3(Objective):
    """`r` times `KL3`: unbiased off policy, also as a gradient (2512.02556)."""

    coef: float
    by_sequence: bool

    def token_loss(self, t: Tokens) -> Tensor:
        return ratio(t, self.by_sequence) * KL3(coef=self.coef).token_loss(t)


@dataclass(frozen=True, kw_only=True)
class WeightedEntropy(Objective):
    """`-extras["entropy_weight"] H`."""

    def token_loss(self, t: Tokens) -> Tensor:
        return -t.extras[ENTROPY] * t.entropy


def surrogate(trainer: Any, *, from_sampler: bool) -> Objective:
    """What the trainer's loss type makes of ratios and advantages."""
    args, by_sequence = trainer.args, trainer.importance_sampling_level == "sequence"
    if trainer.loss_type == "cispo":
        return Capped(cap=trainer.epsilon_high, by_sequence=by_sequence)
    if trainer.loss_type == "sapo":
        return Gated(
            tau_positive=args.sapo_temperature_pos,
            tau_negative=args.sapo_temperature_neg,
            by_sequence=by_sequence,
        )
    if trainer.loss_type == "vespo":
        return GammaWeighted(
            k_positive=args.vespo_k_pos,
            lambda_positive=args.vespo_lambda_pos,
            k_negative=args.vespo_k_neg,
            lambda_negative=args.vespo_lambda_neg,
            from_sampler=from_sampler,
        )
    return Clipped(
        clip_low=trainer.epsilon_low,
        clip_high=trainer.epsilon_high,
        delta=args.delta,
        by_sequence=by_sequence,
    )


def penalty(trainer: Any) -> Objective:
    """The KL penalty; for `beta` other than 0."""
    if not trainer.args.use_bias_correction_kl:
        return KL3(coef=trainer.beta)
    return RatioKL3(coef=trainer.beta, by_sequence=trainer.importance_sampling_level == "sequence")


def seq_weights(
    loss_type: str, lengths: Tensor, *, length: int, items: float, accumulation: float
) -> Tensor:
    """`[B]` fp32: the weight of each token of a sequence of a micro-batch.

    Args:
        loss_type: whose normaliser.
        lengths: `[B]` int64, scored tokens.
        length: the greatest number of tokens of a completion.
        items: scored tokens that one optimiser step counts on this process, on average.
        accumulation: micro-batches of an optimiser step.
    """
    if loss_type in ("cispo", "dapo", "vespo"):
        return torch.full(lengths.shape, 1 / items)
    constants = {"dr_grpo": length, "luspo": 1}
    if loss_type in constants:
        found = aggregate.constant_length(lengths, length=constants[loss_type])
    elif loss_type == "bnpo":
        found = aggregate.token_mean(lengths)
    else:
        found = aggregate.sequence_mean(lengths)
    return found / accumulation
