"""Which methods other trainers are offered, and what their padded batches become."""

from dataclasses import dataclass, replace

import pytest
import torch

from rlvr_fast.integrations.outcome import ADVANTAGES, advantage_method, outcome_advantages
from rlvr_fast.integrations.padded import LOSSES, PaddedTokens, objective_of, padded_loss
from rlvr_fast.methods import METHODS
from rlvr_fast.methods.base import Method
from rlvr_fast.objectives import KL3, EntropyBonus, Objective

MASK = torch.arange(6) < torch.tensor([6, 4, 1])[:, None]


def tokens(*, scale: float = 1.0) -> PaddedTokens:
    """Three sequences, padded with NaN; ratios on both sides of every bound."""
    generator = torch.Generator().manual_seed(0)
    old = -2 * torch.rand(3, 6, generator=generator)
    logp = old + 0.7 * torch.randn(3, 6, generator=generator)
    advantage = scale * torch.randn(3, 6, generator=generator)
    logp, old, advantage = (x.masked_fill(~MASK, torch.nan) for x in (logp, old, advantage))
    return PaddedTokens(logp=logp, advantage=advantage, mask=MASK, old_logp=old)


def only_its_loss(name: str) -> bool:
    """A method's hooks, tried on tokens that have no more than any trainer gives."""
    kind = METHODS[name]
    hooks = ("select_prompts", "rollout", "verify", "prepare", "observe")
    if kind.needs_reference or any(getattr(kind, x) is not getattr(Method, x) for x in hooks):
        return False
    try:
        outcome_advantages(kind(), torch.tensor([0.0, 1.0, 1.0]), MASK, [0, 0, 0])
        padded_loss(kind().objective(), tokens())
    except (AttributeError, KeyError, ValueError):
        return False
    return True


def test_the_methods_offered_are_those_that_need_nothing_but_their_loss():
    assert [name for name in METHODS if only_its_loss(name)] == list(LOSSES)


def test_the_advantages_offered_are_those_that_remember_nothing():
    forgetful = [name for name in LOSSES if METHODS[name].state_dict is Method.state_dict]

    assert forgetful == list(ADVANTAGES)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_proportional_to_its_advantages(name):
    objective = objective_of(name, {})

    small = padded_loss(objective, tokens(scale=0.01)).token_loss

    torch.testing.assert_close(small, 0.01 * padded_loss(objective, tokens()).token_loss)
    assert small.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_reads_what_stands_in_the_padding(name, bad):
    gradients = []

    for padding in (0.0, bad):
        given = tokens()
        logp = given.logp.masked_fill(~MASK, padding).requires_grad_()
        found = padded_loss(objective_of(name, {}), replace(given, logp=logp))
        found.token_loss.sum().backward()
        gradients.append(logp.grad)

    assert torch.equal(*gradients)
    assert gradients[0].any()


@dataclass(frozen=True, kw_only=True)
class One(Objective):
    def token_loss(self, t):
        return torch.ones_like(t.logp)


def test_the_loss_of_the_padding_is_zero():
    assert torch.equal(padded_loss(One(), tokens()).token_loss, MASK.float())


@pytest.mark.parametrize("name", ["pacs", "high_entropy", "ssb"])
def test_other_methods_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"got {name}, whose other hooks"):
        objective_of(name, {})


@pytest.mark.parametrize(
    ("objective", "field"), [(EntropyBonus(coef=0.1), "entropy"), (KL3(coef=0.1), "ref_logp")]
)
def test_an_objective_that_reads_what_the_trainer_does_not_give_says_so(objective, field):
    with pytest.raises(ValueError, match=f"reads {field}"):
        padded_loss(objective, tokens())


def test_tensors_of_different_shapes_are_refused():
    with pytest.raises(
        ValueError, match=r"old_logp: wanted \[B, T\] like logp \[2, 3\], got \[3\]"
    ):
        PaddedTokens(
            logp=torch.zeros(2, 3),
            advantage=torch.zeros(2, 3),
            mask=torch.ones(2, 3),
            old_logp=torch.zeros(3),
        )


def test_advantages_fall_on_the_tokens_of_scattered_groups():
    rewards = torch.tensor([1.0, 5.0, 0.0])

    found = outcome_advantages(advantage_method("maxrl", {}), rewards, MASK, ["a", "b", "a"])

    wanted = torch.tensor([1.0, 0.0, -1.0])[:, None] * MASK
    assert torch.equal(found, wanted)


def test_a_reward_that_nobody_could_give_is_in_no_mean():
    rewards = torch.tensor([1.0, float("nan"), 0.0])

    found = outcome_advantages(advantage_method("dr_grpo", {}), rewards, MASK, ["a", "a", "a"])

    assert found[:, 0].tolist() == [0.5, 0.0, -0.5]
