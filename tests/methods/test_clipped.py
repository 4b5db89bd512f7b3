"""Clipped surrogates: the published values of GRPO, DAPO, Dr. GRPO and the dual clip."""

import pytest
from known import BACKENDS, SEQUENCE_MEAN, SEQUENCE_SUM, TOKEN_MEAN, assert_known, f1

from rlvr_fast.objectives import ClippedSurrogate

KNOWN = {
    "PPO": (
        ClippedSurrogate(), TOKEN_MEAN, -0.103352, [0, -0.134064, 0, 0.180967, 0.329744],
    ),
    "GRPO": (
        ClippedSurrogate(), SEQUENCE_MEAN, 0.126670, [0, -0.111720, 0, 0.226209, 0.412180],
    ),
    "DAPO": (
        ClippedSurrogate(clip_high=0.28), TOKEN_MEAN,
        -0.123633, [-0.244281, -0.134064, 0, 0.180967, 0.329744],
    ),
    "Dr. GRPO": (
        ClippedSurrogate(), SEQUENCE_SUM / 8, -0.032298, [0, -0.041895, 0, 0.056552, 0.103045],
    ),
    "dual clip": (
        ClippedSurrogate(clip_high=0.28, dual_clip=1.5), TOKEN_MEAN,
        -0.153377, [-0.244281, -0.134064, 0, 0.180967, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("objective", "weight", "loss", "gradient"), KNOWN.values(), ids=KNOWN)
def test_values_and_gradients_are_the_published_ones(backend, objective, weight, loss, gradient):
    """Source: `known_values.py`, F1, from the methods' own equations."""
    assert_known(f1(objective, backend, weight), loss, gradient)
