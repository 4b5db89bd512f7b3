"""REINFORCE++ and PPO without a critic: both whiten over the tokens of the batch."""

import pytest
import torch
from rewarded import FIXTURE, LENGTHS, advantages, group, shaped

from rlvr_fast.methods import method
from rlvr_fast.objectives import ClippedSurrogate

BATCH = group(*FIXTURE, lengths=LENGTHS), group(1, 1, 0, lengths=[3, 1, 6], index=1)
TOKENS = torch.tensor([*LENGTHS, 3, 1, 6])
REWARDS = torch.tensor([*FIXTURE, 1, 1, 0], dtype=torch.float64)
MEANS = torch.tensor([0.4] * 5 + [2 / 3] * 3, dtype=torch.float64)


def over_tokens(values):
    tokens = values.repeat_interleave(TOKENS)
    return ((values - tokens.mean()) / tokens.std()).tolist()


@pytest.mark.parametrize(
    ("name", "options", "values"),
    [
        ("reinforce_pp", {}, REWARDS),
        ("reinforce_pp", {"baseline": "group_mean"}, REWARDS - MEANS),
        ("ppo", {}, REWARDS - MEANS),
    ],
)
def test_advantages_are_whitened_over_the_tokens_of_the_batch(name, options, values):
    """Source: 2501.03262; torch's own mean and standard deviation of one number per token."""
    assert shaped(name, *BATCH, **options) == pytest.approx(over_tokens(values), abs=2e-7)


def test_without_whitening_the_advantage_is_that_of_dr_grpo():
    assert shaped("ppo", *BATCH, whiten=False) == advantages("dr_grpo", *BATCH)


@pytest.mark.parametrize("name", ["reinforce_pp", "ppo"])
def test_what_nobody_could_score_is_left_out(name):
    found = shaped(name, group(1.0, None, 0.0, lengths=[2, 90, 2]))

    assert found == pytest.approx([0.75**0.5, 0, -(0.75**0.5)], abs=1e-6)


def test_one_completion_a_prompt_is_enough_without_a_baseline():
    found = shaped(
        "reinforce_pp", *(group(r, lengths=[1], index=i) for i, r in enumerate((1, 0, 0)))
    )

    assert found == pytest.approx([2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5])


def test_a_refill_sees_that_a_group_has_no_signal():
    """Whitening would move it off zero by the mean of the batch."""
    options = {"baseline": "group_mean"}
    groups = group(1, 0, 0), group(1, 1, index=1)

    assert advantages("reinforce_pp", *groups, **options)[3:] == [0, 0]
    assert advantages("ppo", *groups)[3:] == [0, 0]


def test_ppo_has_a_dual_clip():
    assert method("ppo", {}).objective() == ClippedSurrogate(dual_clip=3.0)
    assert method("ppo", {"dual_clip": "none"}).objective() == ClippedSurrogate()
