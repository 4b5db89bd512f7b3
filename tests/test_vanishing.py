"""Whether a gradient vanishes with the advantage is found out, and never claimed wrongly."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlvr_fast import objectives as losses
from rlvr_fast.objectives import Objective, Tokens
from rlvr_fast.tracing.vanishing import vanishes


@dataclass(frozen=True, kw_only=True)
class FromExtra(Objective):
    """Its signal does not come from the advantage."""

    def token_loss(self, t: Tokens) -> Tensor:
        return -t.extras["signal"] * t.logp + t.advantage * t.logp


@dataclass(frozen=True, kw_only=True)
class InPlace(Objective):
    """Writes over a tensor of its own."""

    def token_loss(self, t: Tokens) -> Tensor:
        scaled = t.advantage * 2.0
        scaled.mul_(t.logp)
        return -scaled


@dataclass(frozen=True, kw_only=True)
class Shifted(Objective):
    """Zero advantage is not zero signal."""

    shift: float = 0.5

    def token_loss(self, t: Tokens) -> Tensor:
        return -(t.advantage + self.shift) * t.logp


@dataclass(frozen=True, kw_only=True)
class Branching(Objective):
    """Looks at values, so that no trace covers it."""

    def token_loss(self, t: Tokens) -> Tensor:
        return -t.advantage * t.logp if t.logp.sum() < 0 else -t.logp


@dataclass(frozen=True, kw_only=True)
class Divided(Objective):
    def token_loss(self, t: Tokens) -> Tensor:
        return -t.logp / t.advantage


@dataclass(frozen=True, kw_only=True)
class GroupCentred(Objective):
    def token_loss(self, t: Tokens) -> Tensor:
        return -t.group_mean(t.advantage) * t.seq_mean(t.logp)


VANISHING = [
    losses.PolicyGradient(),
    losses.ClippedSurrogate(dual_clip=3.0),
    losses.DynamicClipSurrogate(),
    losses.CappedWeight(),
    losses.SequenceClippedSurrogate(),
    losses.ClippedSurrogate() + losses.PolicyGradient(),
    InPlace(),
    GroupCentred(),
]
OTHERS = [
    losses.KL1(),
    losses.KL2(),
    losses.KL3(),
    losses.EntropyBonus(),
    losses.ClippedSurrogate() + losses.KL3(coef=1e-6),
    losses.CappedWeight() + losses.EntropyBonus(),
    FromExtra(),
    Shifted(),
    Branching(),
    Divided(),
]


@pytest.mark.parametrize("objective", VANISHING, ids=lambda o: type(o).__name__)
def test_policy_gradients_vanish_with_the_advantage(objective):
    assert vanishes(objective)


@pytest.mark.parametrize("objective", OTHERS, ids=lambda o: type(o).__name__)
def test_what_also_learns_without_an_advantage_does_not(objective):
    assert not vanishes(objective)


@pytest.mark.parametrize("objective", VANISHING[:4], ids=lambda o: type(o).__name__)
def test_the_gradient_really_is_zero_there(objective):
    from rlvr_fast.tracing.tokens import TokenFields

    logp = (torch.randn(64) * 5).requires_grad_()
    fields = TokenFields(
        weight=torch.ones(64),
        old_logp=torch.randn(64) * 30,
        advantage=torch.zeros(64),
        extras={},
    )
    loss = objective.token_loss(Tokens(logp, torch.rand(64), fields))
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert not gradient.any()
