"""DPPO-TV: the mask on probabilities."""

import math

import pytest
import torch
from known import ADVANTAGE, BACKENDS, LOGP, ROLLOUT, TOKEN_MEAN, assert_known, f1

from rlvr_fast.methods import method
from rlvr_fast.methods.dppo_tv import Behaviour, TrustedWeight
from rlvr_fast.objectives import CappedWeight


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient_are_the_published_ones(backend):
    """Source: `known_values.py`, F1, DPPO-TV .15, where every token is kept."""
    gradient = [-0.244281, -0.134064, -0.329744, 0.180967, 0.329744]

    found = f1(method("dppo_tv", {}).objective(), backend, TOKEN_MEAN)

    assert_known(found, 0.507490, gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_have_moved_too_far_the_way_they_are_pushed_lose_their_gradient(backend):
    """On F1 the probabilities have moved by .081, -.200, .088, -.071 and .195: the second and the
    last the other way."""
    objective = method("dppo_tv", {"increase": 0.085, "decrease": 0.08}).objective()
    narrow = method("dppo_tv", {"increase": 0.08, "decrease": 0.07}).objective()

    found, strict = (f1(each, backend, TOKEN_MEAN) for each in (objective, narrow))

    kept = [-0.244281, -0.134064, 0, 0.180967, 0.329744]
    torch.testing.assert_close(found.dlogp.double(), torch.tensor(kept).double(), rtol=0, atol=3e-6)
    assert (strict.dlogp != 0).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_room_for_any_move_it_is_the_capped_weight(backend):
    everywhere = TrustedWeight(increase=1.0, decrease=1.0, cap=1.3)

    found = f1(everywhere, backend, TOKEN_MEAN)

    wanted = f1(CappedWeight(cap=1.3), backend, TOKEN_MEAN)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert torch.equal(found.dlogp, wanted.dlogp)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_likely_token_is_held_where_a_ratio_sees_no_move_and_an_unlikely_one_is_not(backend):
    """From .9 to .72 the ratio is .8; from .0001 to .001 it is 10."""
    old = [math.log(p) for p in (0.9, 0.0001, 0.5, 0.5, 0.5)]
    logp = [math.log(p) for p in (0.72, 0.001, 0.5, 0.5, 0.5)]

    found = f1(TrustedWeight(), backend, TOKEN_MEAN, advantage=[-1, 1, 0, 0, 0], logp=logp, old=old)

    assert (found.dlogp != 0).tolist() == [False, True, False, False, False]
    assert found.dlogp[1] == pytest.approx(-2.0, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sampler_may_be_what_is_compared_with(backend):
    """Oracle: the formula in Python on the sampler's log-probabilities of F1."""
    objective = method("dppo_tv", {"behaviour": "rollout", "increase": 0.1}).objective()
    assert objective.behaviour is Behaviour.ROLLOUT

    found = f1(objective, backend, TOKEN_MEAN)

    wanted = []
    for logp, sampler, advantage in zip(LOGP, ROLLOUT, ADVANTAGE, strict=True):
        moved = math.exp(logp) - math.exp(sampler)
        kept = moved <= 0.1 if advantage > 0 else moved >= -0.15
        wanted.append(-advantage * math.exp(logp - sampler) * kept / 5)
    assert 0 in wanted
    torch.testing.assert_close(
        found.dlogp.double(), torch.tensor(wanted).double(), rtol=0, atol=1e-6
    )


def test_a_bound_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"^decrease: wanted >= 0, got -0.1$"):
        method("dppo_tv", {"decrease": -0.1})
