from itertools import product

import pytest
import torch
from rewarded import FIXTURE, advantages, group

from rlvr_fast.methods import method


def test_the_advantage_is_divided_by_the_mean():
    """Source: 2602.02710, algorithm 1, by hand."""
    assert advantages("maxrl", group(*FIXTURE)) == pytest.approx([1.5, -1, -1, 1.5, -1])


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_the_expected_gradient_is_that_of_the_log_success_rate_up_to_an_order(samples):
    """Source: 2602.02710; `log p = -sum_k (1 - p)^k / k`, cut off after k = G - 1. Every outcome
    of G draws from three answers, one of them right, is counted with its probability.
    """
    logits = torch.tensor([0.1, -0.4, 0.7], dtype=torch.float64, requires_grad=True)
    probs = logits.softmax(0)
    expected = torch.zeros((), dtype=torch.float64)
    for draws in product(range(3), repeat=samples):
        weights = advantages("maxrl", group(*[float(draw == 0) for draw in draws]))
        surrogate = sum(
            w * probs[draw].log() for w, draw in zip(weights, draws, strict=True)
        )  # fmt: skip
        expected = expected + probs[list(draws)].prod().detach() * surrogate / samples
    wrong = 1 - probs[0]
    series = -sum(wrong**k / k for k in range(1, samples))

    (found,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(series, logits)

    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_a_penalty_that_eats_the_mean_leaves_no_advantage():
    assert advantages("maxrl", group(-0.5, 0.5)) == [0, 0]


def test_a_dual_clip_below_one_is_named():
    with pytest.raises(ValueError, match=r"^dual_clip: wanted > 1 or none, got 0.5$"):
        method("maxrl", {"dual_clip": 0.5})
