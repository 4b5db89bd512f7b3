import pytest
import torch

from rlvr_fast.advantages import divided_by_mean, less_length_weighted_mean, whitened

NAN = float("nan")
REWARDS = torch.tensor([1.0, 0, 0, 1, 0])
LENGTHS = torch.tensor([2, 4, 4, 2, 8])
ONE_GROUP = torch.tensor([0, 5])


def random_batch():
    """Ten groups of one to nine sequences, some without a reward."""
    sizes = torch.randint(1, 10, (10,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    rewards = torch.rand(int(offsets[-1]), dtype=torch.float64)
    rewards[torch.rand_like(rewards) < 0.2] = NAN
    return rewards, torch.randint(1, 30, rewards.shape), offsets


def test_dividing_by_the_mean_has_known_values():
    """Source: 2602.02710, algorithm 1, by hand: the mean is 0.4."""
    found = divided_by_mean(REWARDS, ONE_GROUP)

    torch.testing.assert_close(found, torch.tensor([1.5, -1, -1, 1.5, -1], dtype=torch.float64))


def test_the_length_weighted_baseline_has_the_known_value():
    """Source: the fixture of the published baselines; the baseline is 4 / 20."""
    found = less_length_weighted_mean(REWARDS, LENGTHS, ONE_GROUP)

    wanted = torch.tensor([0.8, -0.2, -0.2, 0.8, -0.2], dtype=torch.float64)
    torch.testing.assert_close(found, wanted)


def test_advantages_less_a_length_weighted_mean_add_up_to_zero_over_the_tokens_of_a_group():
    rewards, lengths, offsets = random_batch()

    found = less_length_weighted_mean(rewards, lengths, offsets)

    group = torch.arange(10).repeat_interleave(offsets.diff())
    sums = torch.zeros(10, dtype=torch.float64).index_add(0, group, found * lengths)
    torch.testing.assert_close(sums, torch.zeros_like(sums))
    assert found.count_nonzero() > 20


def test_dividing_by_the_mean_averages_over_the_right_samples():
    """With a control variate of mean zero: the mean over all samples."""
    scores = torch.randn(5, 3, dtype=torch.float64)

    found = divided_by_mean(REWARDS, ONE_GROUP)

    wanted = scores[REWARDS == 1].mean(0) - scores.mean(0)
    torch.testing.assert_close(found @ scores / 5, wanted)


@pytest.mark.parametrize(
    "rewards", [[0.0, 0, 0], [1, 1, 1], [0.1, 0.1, 0.1], [NAN, 1, NAN], [-1.0, 0.5, 0.5 - 1e-9]]
)
def test_groups_without_a_success_or_a_difference_have_no_advantage(rewards):
    found = divided_by_mean(torch.tensor(rewards), torch.tensor([0, 3]))

    assert not found.any()


@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [NAN, 1, NAN], [NAN, NAN, NAN]])
def test_groups_without_a_difference_have_no_advantage_over_a_length_weighted_mean(rewards):
    lengths = torch.tensor([3, 7, 9])

    found = less_length_weighted_mean(torch.tensor(rewards), lengths, torch.tensor([0, 3]))

    assert not found.any()


@pytest.mark.parametrize(
    "centre",
    [
        divided_by_mean,
        lambda rewards, offsets: less_length_weighted_mean(
            rewards, torch.tensor([5, 1, 3, 4, 2, 6]), offsets
        ),
    ],
)
def test_what_nobody_could_score_changes_nobody_elses_advantage(centre):
    offsets = torch.tensor([0, 4, 6])
    rewards = torch.tensor([1.0, 0, NAN, 0.5, 1, 0])

    found = centre(rewards, offsets)
    unlike = centre(torch.tensor([1.0, 0, 0.9, 0.5, 1, 0]), offsets)

    assert found[2] == 0
    assert found.isfinite().all()
    assert found[0] != unlike[0]
    assert torch.equal(found[4:], unlike[4:])


def test_whitening_gives_mean_zero_and_variance_one_over_tokens():
    values = torch.randn(20, dtype=torch.float64)
    lengths = torch.randint(0, 9, (20,))

    tokens = whitened(values, lengths, eps=0.0).repeat_interleave(lengths)

    assert abs(tokens.mean()) < 1e-12
    assert abs(tokens.var() - 1) < 1e-12


def test_whitening_leaves_out_what_nobody_could_score():
    values, lengths = torch.tensor([1.0, NAN, 0.0, 0.25]), torch.tensor([3, 50, 2, 4])

    found = whitened(values, lengths)
    without = whitened(values[[0, 2, 3]], lengths[[0, 2, 3]])

    assert found[1] == 0
    assert torch.equal(found[[0, 2, 3]], without)


@pytest.mark.parametrize("values", [[0.1, 0.1, 0.1], [NAN, 0.1, NAN], [NAN, NAN, NAN]])
def test_whitening_equal_values_gives_exactly_zero(values):
    assert not whitened(torch.tensor(values), torch.tensor([3, 1, 7])).any()


def test_a_value_without_a_token_does_not_count():
    found = whitened(torch.tensor([1.0, 0.0, 9.0]), torch.tensor([1, 1, 0]), eps=0.0)

    torch.testing.assert_close(found, torch.tensor([0.5**0.5, -(0.5**0.5), 0], dtype=torch.float64))


@pytest.mark.parametrize("lengths", [torch.ones(5), torch.ones(4, dtype=torch.int64)])
def test_lengths_of_another_shape_or_dtype_are_named(lengths):
    with pytest.raises(ValueError, match=r"^lengths: wanted int64 \[5\], got torch"):
        whitened(REWARDS, lengths)
