"""DCPO's dynamic bounds, on every backend; `test_objectives` has the table's edges above 1."""

import math

import pytest
import torch
from known import BACKENDS, SEQUENCE_SUM, f1

from rlvr_fast.objectives import DynamicClipSurrogate


def counted(backend, old, **given):
    """Which of five tokens of this old log-probability have a gradient."""
    found = f1(DynamicClipSurrogate(), backend, SEQUENCE_SUM, old=[old] * 5, **given)
    return (found.dlogp != 0).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("old_probability", "high"),
    [
        (0.8, 1.2071),
        (0.64, 1.25),
        (0.5, 1.3062),
        (0.1, 2.0),
        (0.01, 5.0),
        (0.0023, 9.838),
        (0.0022, 10.0),
        (1e-30, 10.0),
    ],
)
def test_a_ratio_counts_up_to_the_upper_bound_of_the_paper(old_probability, high, backend):
    """Source: 2509.02333, equations 4 to 6 at 0.16/0.20; the table of the method's notes."""
    old = math.log(old_probability)
    below, above = (old + math.log(high * edge) for edge in (0.999, 1.001))

    found = counted(backend, old, advantage=[1, 1, -1, -1, 0], logp=[below, above, below, old, old])

    assert found == [True, False, True, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("old_probability", "low"),
    [
        (0.999999, 0.8),
        (0.9, 0.7687),
        (0.8, 0.7236),
        (0.64, 0.5),
        (0.5, 0.5),
        (0.1, 0.5),
        (0.0022, 0.5),
        (1e-30, 0.5),
    ],
)
def test_a_ratio_counts_down_to_the_lower_bound_of_the_paper(old_probability, low, backend):
    """Source: as above; 0.8 is the bound at a probability of 1."""
    old = math.log(old_probability)
    above, below = (old + math.log(low * edge) for edge in (1.001, 0.999))

    found = counted(
        backend, old, advantage=[-1, -1, 1, 1, 0], logp=[above, below, below, above, old]
    )

    assert found == [True, False, True, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ratio_of_a_negative_advantage_counts_up_to_ten(backend):
    """Source: 2509.02333, r_max as dual clip."""
    logp = [-5.0 + math.log(20), -0.5, -0.5, -0.5, -0.5]

    found = f1(
        DynamicClipSurrogate(),
        backend,
        torch.tensor([1.0, 1.0]),
        advantage=[-3.0, 0.0, 0.0, 0.0, 0.0],
        logp=logp,
        old=[-5.0, -0.5, -0.5, -0.5, -0.5],
    )

    assert found.loss == pytest.approx(30.0, rel=1e-6)
    assert found.dlogp[0] == 0
