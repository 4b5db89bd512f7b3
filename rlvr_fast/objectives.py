"""The objectives that come with the package: plain torch, one dataclass each.

`r = exp(logp - old_logp)` is the importance ratio, `A` the advantage. Log-ratios are clamped to
+-20 before the exponential. Compose them: `ClippedSurrogate() + KL3(coef=0.04)`.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rlvr_fast.ops.divergence import Divergence
from rlvr_fast.tracing.objective import Objective, SumOf
from rlvr_fast.tracing.tokens import Tokens

__all__ = [
    "KL1",
    "KL2",
    "KL3",
    "CappedWeight",
    "ClippedSurrogate",
    "Distillation",
    "Divergence",
    "DynamicClipSurrogate",
    "EntropyBonus",
    "Objective",
    "PolicyGradient",
    "SequenceClippedSurrogate",
    "SumOf",
    "Tokens",
]

Bound = TypeVar("Bound", Tensor, float)

MAX_LOG_RATIO = 20.0
"""exp(20) = 4.9e8 keeps a product with any advantage finite in fp32."""


def importance_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """`exp(logp - old_logp)`, the exponent clamped to +-20."""
    return torch.exp((logp - old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def sequence_ratio(t: Tokens) -> Tensor:
    """`exp(mean_t log r)`, with the gradient of each token's own log-probability."""
    gap = t.seq_mean((t.logp - t.old_logp).detach())
    return importance_ratio(gap, torch.zeros(())) * torch.exp(t.logp - t.logp.detach())


def clipped(ratio: Tensor, advantage: Tensor, low: Bound, high: Bound) -> Tensor:
    """`-min(r A, clip(r, low, high) A)`: PPO (1707.06347), equation 7."""
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def dual_clipped(loss: Tensor, advantage: Tensor, cap: float) -> Tensor:
    """For `A < 0` the loss is at most `-cap A`: dual-clip PPO (1912.09729), equation 5."""
    return torch.where(advantage < 0, torch.minimum(loss, -cap * advantage), loss)


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Objective):
    """`-A logp`: REINFORCE. No ratio, so meant for on-policy batches."""

    def token_loss(self, t: Tokens) -> Tensor:
        return -t.advantage * t.logp


@dataclass(frozen=True, kw_only=True)
class ClippedSurrogate(Objective):
    """PPO's clipped surrogate with separate bounds (DAPO, 2503.14476, equation 8)."""

    clip_low: float = 0.2
    """The ratio counts down to `1 - clip_low`."""
    clip_high: float = 0.2
    """The ratio counts up to `1 + clip_high`; DAPO uses 0.28."""
    dual_clip: float | None = None
    """For negative advantages the ratio counts up to this (3 or 10 are common); None: no bound."""

    def token_loss(self, t: Tokens) -> Tensor:
        ratio = importance_ratio(t.logp, t.old_logp)
        loss = clipped(ratio, t.advantage, 1 - self.clip_low, 1 + self.clip_high)
        return loss if self.dual_clip is None else dual_clipped(loss, t.advantage, self.dual_clip)


@dataclass(frozen=True, kw_only=True)
class DynamicClipSurrogate(Objective):
    """Bounds that widen for tokens that were unlikely (DCPO, 2509.02333, equations 4-6).

    Ordinary clipping bounds `|r - 1|`; this bounds `|r - 1| r q` with `q = exp(old_logp)`, hence
    `low = (1 + sqrt(max(1 - 4 clip_low / q, 0))) / 2` and
    `high = min((1 + sqrt(1 + 4 clip_high / q)) / 2, max_ratio)`. `max_ratio` is also the dual clip
    for negative advantages.
    """

    clip_low: float = 0.16
    """epsilon_low of the paper."""
    clip_high: float = 0.20
    """epsilon_high of the paper."""
    max_ratio: float = 10.0
    """r_max of the paper; reached at q = 0.0022 with the defaults."""

    def token_loss(self, t: Tokens) -> Tensor:
        # exp(20) / 4 already gives bounds far beyond max_ratio, and keeps inf * 0 away.
        inverse = torch.exp((-t.old_logp).clamp(max=MAX_LOG_RATIO))
        low = 0.5 + 0.5 * torch.sqrt((1 - 4 * self.clip_low * inverse).clamp(min=0))
        high = 0.5 + 0.5 * torch.sqrt(1 + 4 * self.clip_high * inverse)
        high = high.clamp(max=self.max_ratio)
        ratio = importance_ratio(t.logp, t.old_logp)
        return dual_clipped(clipped(ratio, t.advantage, low, high), t.advantage, self.max_ratio)


@dataclass(frozen=True, kw_only=True)
class CappedWeight(Objective):
    """`-sg[min(r, cap)] A logp`: every token keeps a gradient (CISPO, 2506.13585, equation 4)."""

    cap: float = 5.0
    """The weight's upper bound itself, not an offset from 1 (ScaleRL uses 5; 1.28 is common)."""

    def token_loss(self, t: Tokens) -> Tensor:
        ratio = importance_ratio(t.logp, t.old_logp).detach()
        return -ratio.clamp(max=self.cap) * t.advantage * t.logp


@dataclass(frozen=True, kw_only=True)
class SequenceClippedSurrogate(Objective):
    """Clips the length-normalised ratio of the sequence (GSPO, 2507.18071, equations 5-7).

    Written per token as in its equation 14, `s_t = sg[s] r_t / sg[r_t]` with
    `s = exp(mean_t log r_t)`: the same value and gradient as the sequence form when the advantage
    is constant in a sequence. Aggregate with `sequence_mean`.
    """

    clip_low: float = 3e-4
    """The sequence ratio counts down to `1 - clip_low`."""
    clip_high: float = 4e-4
    """The sequence ratio counts up to `1 + clip_high`."""

    def token_loss(self, t: Tokens) -> Tensor:
        return clipped(sequence_ratio(t), t.advantage, 1 - self.clip_low, 1 + self.clip_high)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """`scale` times the divergence from a teacher over the whole vocabulary; see `linear_kl`.

    No `Objective`: it reads two distributions, not the log-probability of a token.
    """

    kind: Divergence = Divergence.FORWARD
    temperature: float = 1.0
    """Divides both models' logits, instead of the one that is sampled at."""
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class KL1(Objective):
    """`coef (logp - ref_logp)`: unbiased as a value; as a loss its mean gradient is 0."""

    coef: float = 0.001

    def token_loss(self, t: Tokens) -> Tensor:
        return self.coef * (t.logp - t.ref_logp)


@dataclass(frozen=True, kw_only=True)
class KL2(Objective):
    """`coef (logp - ref_logp)^2 / 2`: its gradient is the reverse KL's when on policy."""

    coef: float = 0.001

    def token_loss(self, t: Tokens) -> Tensor:
        return self.coef * 0.5 * (t.logp - t.ref_logp) ** 2


@dataclass(frozen=True, kw_only=True)
class KL3(Objective):
    """`coef (exp(d) - d - 1)`, `d = ref_logp - logp`: GRPO (2402.03300), equation 4; never < 0."""

    coef: float = 0.001

    def token_loss(self, t: Tokens) -> Tensor:
        d = (t.ref_logp - t.logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return self.coef * (torch.exp(d) - d - 1)


@dataclass(frozen=True, kw_only=True)
class EntropyBonus(Objective):
    """`-coef H`: rewards spread-out distributions; differentiated through the whole row."""

    coef: float = 0.001

    def token_loss(self, t: Tokens) -> Tensor:
        return -self.coef * t.entropy
