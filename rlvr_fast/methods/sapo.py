"""A soft gate instead of a clip (SAPO, 2511.20347).

GRPO but for the surrogate; formula and defaults as in the code of TRL and verl.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlvr_fast import aggregate
from rlvr_fast.methods.base import BatchShape, Evidence, Method, Paper
from rlvr_fast.objectives import Objective, importance_ratio
from rlvr_fast.tracing.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class GatedSurrogate(Objective):
    """`-(4 / tau) sigmoid(tau (r - 1)) A`; its gradient is `-4 g (1 - g) r A`, g the sigmoid.

    At `r = 1` that is `-A`, whatever `tau`; far from 1 it fades out on both sides.
    """

    temperature_positive: float = 1.0
    """tau of tokens with a positive advantage."""
    temperature_negative: float = 1.05
    """tau of all others."""

    def token_loss(self, t: Tokens) -> Tensor:
        ones = torch.ones_like(t.advantage)
        tau = torch.where(
            t.advantage > 0, ones * self.temperature_positive, ones * self.temperature_negative
        )
        gate = torch.sigmoid(tau * (importance_ratio(t.logp, t.old_logp) - 1))
        return -4 / tau * gate * t.advantage


@dataclass(frozen=True, kw_only=True)
class SAPO(Method):
    """The weight of a token falls off smoothly as its ratio leaves 1, and never to zero at once.

    Negative advantages, which push up many tokens that nobody sampled, fade out sooner.
    """

    paper: ClassVar[Paper] = Paper(
        source="2511.20347",
        formula="-(4 / tau) sigmoid(tau (r - 1)) A",
        evidence=Evidence.CODE,
    )

    temperature_positive: float = 1.0
    """Sharpness of the gate for positive advantages."""
    temperature_negative: float = 1.05
    """Sharpness of the gate for negative advantages."""

    def __post_init__(self) -> None:
        for name in ("temperature_positive", "temperature_negative"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: wanted > 0 and finite, got {getattr(self, name)}")

    def seq_weights(self, shape: BatchShape) -> Tensor:
        return aggregate.sequence_mean(shape.seq_lengths)

    def objective(self) -> Objective:
        return GatedSurrogate(
            temperature_positive=self.temperature_positive,
            temperature_negative=self.temperature_negative,
        )
