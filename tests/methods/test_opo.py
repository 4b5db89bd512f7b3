import pytest
from rewarded import FIXTURE, LENGTHS, advantages, group

from rlvr_fast.methods import METHODS


def test_the_baseline_is_the_length_weighted_reward():
    """Source: the fixture of the published baselines; 4 of 20 tokens are in right answers."""
    found = advantages("opo", group(*FIXTURE, lengths=LENGTHS))

    assert found == pytest.approx([0.8, -0.2, -0.2, 0.8, -0.2])


def test_equal_lengths_give_the_advantage_of_dr_grpo():
    groups = group(*FIXTURE), group(1, 1, 0.5, index=1)

    assert advantages("opo", *groups) == pytest.approx(advantages("dr_grpo", *groups))


def test_it_trains_on_policy_only():
    assert METHODS["opo"].on_policy_only
