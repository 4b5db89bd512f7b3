"""ETR: bounds of each sequence's own."""

import pytest
import torch
from known import BACKENDS, SEQUENCE_MEAN, f1
from rewarded import group

from rlvr_fast.methods import etr, method
from rlvr_fast.methods.etr import ElasticClipSurrogate
from rlvr_fast.objectives import ClippedSurrogate


def bounded(rewards, **options):
    (found,) = method("etr", options).advantages([group(*rewards)])
    return found


def widths(rewards, **options):
    return [rollout.extras["ratio_high"] - 1 for rollout in bounded(rewards, **options)]


def test_the_width_of_the_bounds_has_known_values():
    """Source: the method's notes: eps .2, gains .5; (p, |A|) = (.5, 1) and (.125, 2.65)."""
    chosen = method("etr", {})
    half = [1.0, 0.0] * 4
    eighth = [1.0] + [0.0] * 7

    assert etr.relative_variance(half) == 1.0
    assert etr.relative_variance(eighth) == pytest.approx(4 / 8 * 7 / 8)
    assert chosen.width(0.2, advantage=-1.0, variance=1.0) == pytest.approx(0.41424, abs=5e-6)
    variance = etr.relative_variance(eighth)
    assert chosen.width(0.2, advantage=2.65, variance=variance) == pytest.approx(0.36441, abs=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gains_it_is_grpo_bit_for_bit(backend):
    options = {"clip_low": 0.17, "clip_high": 0.28, "advantage_gain": 0, "variance_gain": 0}
    one, other = bounded([1.0, 0.0], **options)
    extras = {name: [one.extras[name]] * 3 + [other.extras[name]] * 2 for name in one.extras}

    found = f1(ElasticClipSurrogate(), backend, SEQUENCE_MEAN, extras=extras)

    wanted = f1(ClippedSurrogate(clip_low=0.17, clip_high=0.28), backend, SEQUENCE_MEAN)
    assert found.loss == wanted.loss
    assert torch.equal(found.dlogp, wanted.dlogp)
    assert torch.equal(found.dlogits, wanted.dlogits)
    (plain,) = method("grpo", {}).advantages([group(1.0, 0.0)])
    assert [one.advantage, other.advantage] == [rollout.advantage for rollout in plain]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wider_bound_lets_a_token_count_that_grpo_clips(backend):
    """The first sequence has ratios 1.22, 0.67 and 1.65 and a positive advantage."""
    extras = {"ratio_low": [0.6] * 5, "ratio_high": [1.4, 1.4, 1.4, 1.2, 1.2]}

    found = f1(ElasticClipSurrogate(), backend, SEQUENCE_MEAN, extras=extras)

    plain = f1(ClippedSurrogate(), backend, SEQUENCE_MEAN)
    assert (plain.dlogp != 0).tolist() == [False, True, False, True, True]
    assert (found.dlogp != 0).tolist() == [True, True, False, True, True]


def test_bounds_grow_with_the_advantage_and_with_the_variance_of_the_group():
    rare, common = widths([1.0] + [0.0] * 7, variance_gain=0.0)[:2]
    assert rare > common > 0.2
    by_group = [widths(x, advantage_gain=0.0)[0] for x in ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1])]
    assert by_group == pytest.approx([0.2 * 1.375, 0.3, 0.2])


def test_bounds_stop_at_the_cap():
    (right, wrong) = bounded([1.0, 0.0], advantage_gain=50.0, cap=0.5)

    assert right.extras == wrong.extras == {"ratio_low": 0.5, "ratio_high": 1.5}


def test_the_variance_is_that_of_the_range_of_a_group_and_leaves_out_what_nobody_scored():
    assert etr.relative_variance([3.0, -1.0, -1.0]) == pytest.approx(4 / 3 * 2 / 3)
    assert etr.relative_variance([0.0, 0.5, 1.0]) == pytest.approx(2 / 3)
    assert etr.relative_variance([]) == 0.0
    assert widths([1, None, 0], advantage_gain=0.0) == pytest.approx([0.3] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": 0.1}, "cap: wanted at most 1 and at least 0.2, got 0.1"),
        ({"advantage_gain": -0.5}, "advantage_gain: wanted >= 0, got -0.5"),
    ],
)
def test_an_option_that_cannot_be_names_wanted_and_got(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        method("etr", options)
