"""The one batch type, and what `pack` lays down."""

import random
from dataclasses import replace

import pytest
import torch

from rlvr_fast.packed import SHORTEST_PREFIX, Sample, ScoredTokens, pack

GROUPS = [
    [
        Sample(prompt_ids=[1, 2, 3], completion_ids=[4, 5], token_weight=0.5, reward=1.0),
        Sample(prompt_ids=[1, 2, 3], completion_ids=[6], token_weight=0.25, reward=None),
    ],
    [Sample(prompt_ids=[7], completion_ids=[8, 9], token_weight=0.5, reward=0.0)],
]


def test_a_shared_prompt_is_laid_down_once_and_every_completion_continues_from_it():
    packed = pack(GROUPS)
    assert packed.input_ids.tolist() == [1, 2, 3, 4, 7, 8]  # no completion's last token
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 4, 6]
    assert packed.block_offsets.tolist() == [0, 1, 2]
    assert packed.seen.tolist() == [0, 0]
    assert packed.hidden_index.tolist() == [2, 3, 2, 4, 5]
    assert packed.scored.targets.tolist() == [4, 5, 6, 8, 9]
    assert packed.scored.weight.tolist() == [0.5, 0.5, 0.25, 0.5, 0.5]
    assert packed.scored.seq_offsets.tolist() == [0, 2, 3, 5]
    assert packed.scored.group_offsets.tolist() == [0, 2, 3]


def test_without_sharing_every_sample_carries_its_prompt():
    packed = pack(GROUPS, share_prompts=False)
    assert packed.input_ids.tolist() == [1, 2, 3, 4, 1, 2, 3, 7, 8]
    assert packed.block_offsets.tolist() == [0, 1, 2, 3]
    assert packed.hidden_index.tolist() == [2, 3, 6, 7, 8]
    assert torch.equal(packed.scored.targets, pack(GROUPS).scored.targets)


def test_samples_of_a_group_with_different_prompts_are_not_shared():
    group = [
        Sample(prompt_ids=[1, 2], completion_ids=[3]),
        Sample(prompt_ids=[1, 4], completion_ids=[5]),
    ]
    assert pack([group]).input_ids.tolist() == [1, 2, 1, 4]


def test_what_all_prompts_begin_with_is_laid_down_once_before_the_first_block():
    system = list(range(10, 10 + SHORTEST_PREFIX))
    first = Sample(prompt_ids=[*system, 1], completion_ids=[2, 3])
    other = replace(first, completion_ids=[7, 3])
    second = Sample(prompt_ids=[*system, 4, 5], completion_ids=[6])

    packed = pack([[first, other], [second]])

    assert packed.prefix_length == 8
    assert packed.input_ids.tolist() == [*system, 1, 2, 7, 4, 5]
    assert packed.position_ids.tolist() == [*range(8), 8, 9, 9, 8, 9]
    assert packed.cu_seqlens.tolist() == [0, 8, 10, 11, 13]
    assert packed.block_offsets.tolist() == [1, 3, 4]
    assert packed.seen.tolist() == [0, 0, 1, 0]
    assert packed.hidden_index.tolist() == [8, 9, 8, 10, 12]
    assert pack([[first, other], [second]], share_prompts=False).prefix_length == 0
    assert pack([[first, other]]).prefix_length == 0


def test_completions_branch_off_one_of_them_where_they_differ():
    written = [[6, 9], [4, 5, 9], [4, 5, 7, 7, 8], [6, 9], [4, 9], [9], [4, 8, 8]]
    group = [Sample(prompt_ids=[1, 2], completion_ids=ids) for ids in written]

    packed = pack([group])

    # The trunk, from which most branch off late, then 8 after the 4, and 6 after the prompt.
    assert packed.input_ids.tolist() == [1, 2, 4, 5, 7, 7, 8, 6]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3, 2]
    assert packed.cu_seqlens.tolist() == [0, 6, 7, 8]
    assert packed.block_offsets.tolist() == [0, 3]
    assert packed.seen.tolist() == [0, 3, 2]
    index = iter(packed.hidden_index.tolist())
    rows = [[next(index) for _ in ids] for ids in written]
    assert rows == [[1, 7], [1, 2, 3], [1, 2, 3, 4, 5], [1, 7], [1, 2], [1], [1, 2, 6]]
    assert packed.scored.targets.tolist() == [token for ids in written for token in ids]


def test_equal_tokens_after_equal_tokens_come_once_and_every_one_finds_its_own():
    draw = random.Random(0)
    for _ in range(200):
        written = [[draw.randrange(2) for _ in range(draw.randrange(6))] for _ in range(5)]
        packed = pack([[Sample(prompt_ids=[7, 8], completion_ids=ids) for ids in written]])

        index = iter(packed.hidden_index.tolist())
        for ids in written:
            rows = [next(index) for _ in ids]
            assert packed.input_ids[rows].tolist() == [8, *ids][: len(ids)]
            assert packed.position_ids[rows].tolist() == list(range(1, 1 + len(ids)))
        trunk = packed.cu_seqlens[1]
        assert sorted(packed.seen[1:].tolist(), reverse=True) == packed.seen[1:].tolist()
        assert all(2 <= seen < trunk for seen in packed.seen[1:].tolist())


def test_completions_of_different_prompts_are_never_laid_down_for_each_other():
    first, second = ([Sample(prompt_ids=[n], completion_ids=[4, 5])] for n in (1, 2))

    assert pack([first, second]).input_ids.tolist() == [1, 4, 2, 4]


@pytest.mark.parametrize("other", [[1] * 8, [1] * 7 + [2] * 3])
def test_every_prompt_keeps_a_token_of_its_own_and_short_beginnings_are_not_shared(other):
    long = Sample(prompt_ids=[1] * 20, completion_ids=[2])

    packed = pack([[long], [Sample(prompt_ids=other, completion_ids=[3])]])

    assert packed.prefix_length == 0


def test_an_unscorable_reward_becomes_nan_and_none_at_all_stays_none():
    assert pack(GROUPS).scored.rewards[1].isnan()
    unscored = [[replace(sample, reward=None) for sample in group] for group in GROUPS]
    assert pack(unscored).scored.rewards is None


def test_a_loss_mask_sets_weights_to_zero():
    sample = replace(GROUPS[0][0], loss_mask=[0, 1])
    assert pack([[sample]]).scored.weight.tolist() == [0.0, 0.5]


def test_an_advantage_may_be_one_number_or_one_per_token():
    one, many = (replace(GROUPS[0][0], advantage=a) for a in (2.0, [1.0, 3.0]))
    assert pack([[one, many]]).scored.advantage.tolist() == [2.0, 2.0, 1.0, 3.0]


def test_an_empty_completion_scores_nothing():
    packed = pack([[replace(GROUPS[0][0], completion_ids=[])]])
    assert packed.input_ids.tolist() == [1, 2, 3]
    assert packed.scored.num_tokens == 0
    assert packed.scored.seq_offsets.tolist() == [0, 0]


def test_nothing_packs_to_nothing():
    packed = pack([])
    assert packed.scored.num_tokens == packed.scored.num_sequences == 0


def test_expand_gives_every_token_the_value_of_its_sequence():
    values = pack(GROUPS).scored.expand(torch.tensor([1.0, 2.0, 3.0]))
    assert values.tolist() == [1.0, 1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (replace(GROUPS[0][0], prompt_ids=[]), "prompt_ids: wanted at least one token"),
        (replace(GROUPS[0][0], loss_mask=[1]), "loss_mask: wanted one value per completion token"),
        (replace(GROUPS[0][0], old_logp=[0.0] * 3), "old_logp: wanted one value per completion"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        pack([[sample]])


def test_a_field_on_some_samples_only_is_refused():
    group = [replace(GROUPS[0][0], old_logp=[0.0, 0.0]), GROUPS[0][1]]
    with pytest.raises(ValueError, match="old_logp: wanted it on every sample or on none"):
        pack([group])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": torch.zeros(3)}, r"targets: wanted int64 \[T\]"),
        ({"weight": torch.ones(2)}, r"weight: wanted floating point \[3\]"),
        ({"old_logp": torch.zeros(3, dtype=torch.int64)}, "old_logp: wanted floating point"),
        ({"extras": {"gate": torch.zeros(1)}}, r"extras\['gate'\]: wanted floating point \[3\]"),
        ({"seq_offsets": torch.tensor([0, 2])}, "seq_offsets: wanted ascending from 0 to 3"),
        ({"seq_offsets": torch.tensor([0, 3], dtype=torch.int32)}, "seq_offsets: wanted int64"),
        ({"group_offsets": torch.tensor([0, 1])}, "group_offsets: wanted seq_offsets beside it"),
        ({"rewards": torch.zeros(1)}, r"rewards: wanted \[0\] and seq_offsets"),
        ({"advantage": torch.zeros(2)}, r"advantage: wanted \[3\] or \[0\]"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused(fields, message):
    valid = {"targets": torch.zeros(3, dtype=torch.int64), "weight": torch.ones(3)}
    with pytest.raises(ValueError, match=message):
        ScoredTokens(**(valid | fields))


def test_tokens_that_moved_have_their_index_with_them(monkeypatch):
    offsets = torch.tensor([0, 2, 5])
    tokens = ScoredTokens(
        targets=torch.zeros(5, dtype=torch.int64),
        weight=torch.ones(5),
        seq_offsets=offsets,
        active=torch.tensor([True, False, True, True, False]),
    )
    moved = tokens.to("cpu")
    monkeypatch.setattr(ScoredTokens, "_indices", None)  # a copy in every op from here on
    assert moved.segments.seq_of_token is not None
    assert moved.segments.seq_of_token.tolist() == [0, 0, 1, 1, 1]
    assert moved.segments.active is not None
    assert moved.segments.active.tolist() == [0, 2, 3]
