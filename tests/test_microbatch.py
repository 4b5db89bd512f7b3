from itertools import chain

import pytest

from rlvr_fast.microbatch import microbatches, model_inputs
from rlvr_fast.packed import Sample


def group(prompt_length, *completion_lengths):
    return [
        Sample(prompt_ids=[1] * prompt_length, completion_ids=[2] * length)
        for length in completion_lengths
    ]


GROUPS = [group(5, 3, 9, 1), group(2, 40), group(7, 0, 4), [], group(3, *range(1, 12))]


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("budget", [1, 12, 30, 1000])
def test_nothing_is_lost_and_nothing_comes_twice(budget, share_prompts):
    found = microbatches(GROUPS, budget, share_prompts=share_prompts)

    before, after = list(chain(*GROUPS)), list(chain(*chain(*found)))
    assert sorted(map(id, after)) == sorted(map(id, before))


@pytest.mark.parametrize("share_prompts", [True, False])
def test_only_a_single_sample_may_exceed_the_budget(share_prompts):
    found = microbatches(GROUPS, 30, share_prompts=share_prompts)

    for pieces in found:
        size = sum(model_inputs(piece, share_prompts) for piece in pieces)
        assert size <= 30 or [len(piece) for piece in pieces] == [1]


def test_the_order_of_groups_does_not_matter_to_the_sizes():
    def sizes(groups):
        found = microbatches(groups, 30, share_prompts=True)
        return sorted(sorted(model_inputs(g, True) for g in pieces) for pieces in found)

    assert sizes(GROUPS) == sizes(GROUPS[::-1])


def test_a_group_that_must_stay_whole_is_not_split():
    found = microbatches(GROUPS, 30, share_prompts=True, split_groups=False)

    assert sorted(map(id, chain(*found))) == sorted(id(g) for g in GROUPS if g)


def test_a_large_group_is_split_evenly_into_few_pieces():
    (whole,) = [group(4, *[10] * 8)]

    found = microbatches([whole], 50, share_prompts=True)

    assert [[len(piece) for piece in pieces] for pieces in found] == [[4], [4]]


def test_a_prompt_that_the_group_does_not_share_counts_for_each_sample():
    mixed = [*group(5, 2), *group(6, 2)]

    assert model_inputs(mixed, True) == model_inputs(mixed, False) == 13


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^budget: wanted at least 1, got 0$"):
        microbatches(GROUPS, 0, share_prompts=True)
