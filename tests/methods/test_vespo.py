"""The weight of a sequence's ratio; what holds for all sequence losses is elsewhere."""

import math

import pytest
from known import OLD, TOKEN_MEAN, f1

from rlvr_fast.methods.vespo import GammaWeightedGradient


def test_the_gamma_weight_is_one_at_one_and_the_formula_elsewhere():
    """Source: W^k exp(lambda (1 - W)) in Python, and what TRL 1.16's `get_gamma_weights` gives."""
    found = f1(GammaWeightedGradient(), "reference", TOKEN_MEAN).dlogp.tolist()

    first, second = math.exp(0.3), math.exp(0.4)
    weights = [first**2 * math.exp(3 * (1 - first)), second**3 * math.exp(2 * (1 - second))]
    assert weights == pytest.approx([0.6379, 1.2415], abs=5e-5)
    assert found == pytest.approx([-weights[0] / 5] * 3 + [weights[1] / 5] * 2, rel=1e-6)


def test_the_gamma_weight_may_be_measured_from_the_sampler():
    """On policy, old log-probabilities 0.7 and -0.2 above the sampler's."""
    found = f1(
        GammaWeightedGradient(from_sampler=True), "reference", TOKEN_MEAN, logp=OLD, old=OLD
    ).dlogp.tolist()

    first, second = math.exp(0.7), math.exp(-0.2)
    weights = [first**2 * math.exp(3 * (1 - first)), second**3 * math.exp(2 * (1 - second))]
    assert found == pytest.approx([-weights[0] / 5] * 3 + [weights[1] / 5] * 2, rel=1e-6)
