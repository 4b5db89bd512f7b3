"""pass@k, majority votes and intervals, against cases that can be counted or worked out."""

import math
import random
from itertools import combinations

import pytest

from rlvr_fast.estimates import bootstrap, majority, mean_interval, pass_at_k, wilson


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 1), (5, 2, 1), (8, 3, 4), (8, 1, 8), (10, 9, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n, c, k):
    subsets = list(combinations([True] * c + [False] * (n - c), k))

    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_neither_overflows_nor_cancels():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match=r"^pass@k: wanted 0 <= correct <= samples"):
        pass_at_k(n, c, k)


def test_the_bootstrap_interval_of_four_values_is_that_of_a_binomial():
    """The mean of a resample of 0, 0, 0, 4 is binomial (4, 1/4): P(0) = 0.316, P(> 3) = 0.004,
    P(> 2) = 0.051. So 2.5 % of the means lie at 0 or below, and 97.5 % at 3 or below.
    """
    found = bootstrap([0, 0, 0, 4])

    assert (found.low, found.high, found.kind) == (0.0, 3.0, "bootstrap")


def test_the_bootstrap_interval_of_many_values_is_that_of_the_normal_distribution():
    draw = random.Random(0)
    values = [draw.gauss(5, 2) for _ in range(2000)]
    mean = math.fsum(values) / 2000
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values)) / 2000

    found = bootstrap(values)

    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert found == bootstrap(values)


def test_the_bootstrap_interval_of_equal_values_is_a_point():
    assert (bootstrap([0.0] * 7).low, bootstrap([0.0] * 7).high) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # Brown, Cai and DasGupta (2001) and R's prop.test give the same
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson_intervals_are_those_of_the_literature(successes, trials, low, high):
    found = wilson(successes, trials)

    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(1, 0), (3, 2), (-1, 2), (0, 0)])
def test_impossible_shares_are_refused(successes, trials):
    with pytest.raises(ValueError, match=r"^successes: wanted 0 to"):
        wilson(successes, trials)


def test_a_mean_of_zeros_and_ones_has_wilsons_interval_and_any_other_the_bootstrap():
    assert mean_interval([1.0, 0.0, 1.0, 1.0]) == wilson(3, 4)
    assert mean_interval([1.0, 0.0, 0.5, 1.0]) == bootstrap([1.0, 0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("keys", "winner"),
    [
        (["a", "b", "b"], 1),
        (["a", "b", "b", "a"], 0),
        ([None, None, "c"], 2),
        (["a", None, None, "b", "b", None], 3),
        ([None, None], None),
        ([], None),
    ],
)
def test_most_votes_win_then_the_first(keys, winner):
    assert majority(keys) == winner
