"""DAPO with all its parts, and BNPO, which is its loss with GRPO's clip."""

from dataclasses import replace

import pytest
from rewarded import FIXTURE, advantages, group

from rlvr_fast import config as configs
from rlvr_fast.collect import has_signal
from rlvr_fast.methods import method
from rlvr_fast.objectives import ClippedSurrogate

PLAIN = {"model": "tiny", "task": "addition", "method": "dapo", "run_folder": "unused"}


def penalised(groups, *penalties):
    return [replace(r, penalty=p) for r, p in zip(groups, penalties, strict=True)]


@pytest.mark.parametrize("name", ["dapo", "bnpo"])
def test_the_advantage_is_grpos(name):
    """Source: the fixture of the published baselines."""
    found = advantages(name, group(*FIXTURE))

    assert found[:2] == pytest.approx([1.095443, -0.730295], abs=2e-6)


def test_a_group_that_differs_in_length_alone_has_no_signal():
    """Source: 2503.14476, equation 11; the penalty alone would give GRPO a signal."""
    right = penalised(group(1, 1, 1), 0.0, 0.5, 1.0)

    (ours,) = method("dapo", {}).advantages([right])
    (grpos,) = method("grpo", {}).advantages([right])

    assert has_signal(grpos)
    assert not has_signal(ours)


def test_in_a_mixed_group_the_penalty_counts():
    mixed = penalised(group(1, 1, 0, 0), 0.0, 0.5, 0.0, 1.0)

    assert advantages("dapo", mixed) == advantages("grpo", mixed)
    assert advantages("dapo", mixed)[0] > advantages("dapo", mixed)[1]


def test_sampling_and_length_penalty_belong_to_the_method_and_can_be_replaced():
    found = configs.from_values(PLAIN)
    replaced = configs.from_values(
        {**PLAIN, "overlong_buffer": 51, "refill_rounds": 0, "overlong": "mask"}
    )

    assert (found.refill_rounds, found.overlong, found.overlong_buffer) == (9, "penalty", None)
    assert (replaced.refill_rounds, replaced.overlong, replaced.overlong_buffer) == (0, "mask", 51)


def test_the_objectives_are_clipped_as_published():
    """Source: `known_values.py`, whose values `test_clipped` holds these objectives to."""
    assert method("dapo", {}).objective() == ClippedSurrogate(clip_high=0.28, dual_clip=10.0)
    assert method("bnpo", {}).objective() == ClippedSurrogate()


def test_bnpo_is_grpo_with_a_mean_over_tokens():
    other = method("grpo", {"aggregation": "token_mean"})

    assert method("bnpo", {}).objective() == other.objective()
