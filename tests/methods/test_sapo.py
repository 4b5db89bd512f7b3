"""SAPO: the soft gate."""

import math

import pytest
import torch
from known import BACKENDS, LOGP, OLD, SEQUENCE_MEAN, SEQUENCE_SUM, assert_known, f1

from rlvr_fast.methods import method
from rlvr_fast.methods.sapo import GatedSurrogate


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient_are_the_published_ones(backend):
    """Source: `known_values.py`, F1, SAPO 1.0/1.05."""
    gradient = [-0.201093, -0.108738, -0.247790, 0.225646, 0.367838]

    found = f1(method("sapo", {}).objective(), backend, SEQUENCE_MEAN)

    assert_known(found, -0.001980, gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 8.0])
def test_on_policy_the_gradient_is_the_advantage_whatever_the_temperature(temperature, backend):
    objective = GatedSurrogate(temperature_positive=temperature, temperature_negative=temperature)

    found = f1(objective, backend, SEQUENCE_SUM, logp=OLD)

    wanted = torch.tensor([-0.5, -0.5, -0.5, 0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(found.dlogp.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_the_derivative_of_the_gate_times_the_ratio(backend):
    """Oracle: `4 g (1 - g) r`, with each sign's temperature, from Python's own exponential."""
    found = f1(method("sapo", {"temperature_negative": 2.0}).objective(), backend, SEQUENCE_SUM)

    wanted = []
    for logp, old, advantage in zip(LOGP, OLD, [1, 1, 1, -1, -1], strict=True):
        ratio = math.exp(logp - old)
        gate = 1 / (1 + math.exp(-(1.0 if advantage > 0 else 2.0) * (ratio - 1)))
        wanted.append(-0.5 * advantage * 4 * gate * (1 - gate) * ratio)
    found_here = found.dlogp.double()
    torch.testing.assert_close(found_here, torch.tensor(wanted).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_from_the_old_policy_nothing_is_left_and_nothing_overflows(backend):
    found = f1(
        method("sapo", {}).objective(),
        backend,
        SEQUENCE_SUM,
        logp=[-0.1, -0.1, -60.0, -0.1, -60.0],
        old=[-60.1, -5.1, -0.1, -60.1, -0.1],
    )

    assert math.isfinite(found.loss)
    assert found.dlogp.abs().max() < 1e-6


@pytest.mark.parametrize("name", ["temperature_positive", "temperature_negative"])
def test_a_temperature_that_cannot_be_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: wanted > 0 and finite, got 0.0$"):
        method("sapo", {name: 0.0})
