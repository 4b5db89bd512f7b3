"""The asymmetric confidence penalty: what it multiplies, and what it leaves alone."""

import math

import pytest
import torch
from known import ADVANTAGE, BACKENDS, LOGP, REF, SEQUENCE_MEAN, f1
from rewarded import FIXTURE, advantages, group

from rlvr_fast.methods import method
from rlvr_fast.methods.ace import WRONG

ALL_WRONG, SECOND_WRONG = {WRONG: [1.0] * 5}, {WRONG: [0.0] * 3 + [1.0] * 2}


def moved(by, extras=ALL_WRONG, **options):
    """Gradient and loss of five tokens, all `by` above the reference, on policy."""
    logp = [x + by for x in REF]
    objective = method("ace", options).objective()
    return f1(objective, "reference", SEQUENCE_MEAN, extras=extras, logp=logp, old=logp)


@pytest.mark.parametrize(("confidence", "factor"), [(-2, 1.126928), (0, 1.693147), (2, 3.126928)])
def test_the_multiplier_has_its_known_values(confidence, factor):
    """Source: 1 + softplus(c), from the method's own definition."""
    by = confidence / 10
    scaled, plain = (moved(by, clip_low=9.0, clip_high=9.0, alpha=a) for a in (10.0, 0.0))
    ten = 1 + 10 * math.log1p(math.exp(by))

    assert scaled.loss == pytest.approx(plain.loss * ten, rel=1e-5)
    assert 1 + math.log1p(math.exp(confidence)) == pytest.approx(factor, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_is_over_the_tokens_of_the_sequence_and_right_answers_are_untouched(backend):
    options = {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean"}
    grpo, ace = (
        f1(method(name, options).objective(), backend, SEQUENCE_MEAN, extras=SECOND_WRONG)
        for name in ("grpo", "ace")
    )

    confidence = sum(a - b for a, b in zip(LOGP[3:], REF[3:], strict=True)) / 2
    factor = torch.tensor([1.0] * 3 + [1 + math.log1p(math.exp(confidence))] * 2)
    torch.testing.assert_close(ace.dlogp.float(), grpo.dlogp.float() * factor)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_without_alpha_it_is_grpo_to_the_last_bit(backend):
    grpo, ace = (
        f1(method(name, options).objective(), backend, SEQUENCE_MEAN, extras=ALL_WRONG)
        for name, options in (("grpo", {}), ("ace", {"alpha": 0.0}))
    )

    assert ace.loss == grpo.loss
    assert torch.equal(ace.dlogp, grpo.dlogp)


def test_the_surer_the_policy_is_of_an_error_the_harder_it_is_pushed_down():
    pushed = [moved(by).dlogp[4].item() for by in (-0.4, -0.1, 0.0, 0.1, 0.15)]

    assert pushed == sorted(pushed)
    assert pushed[0] > 0


def test_no_gradient_flows_through_the_confidence():
    """The gradient is that of a constant multiplier: `-A / n` times it, on policy."""
    factor = 1 + math.log1p(math.exp(0.1))

    wanted = [-a * w * factor for a, w in zip(ADVANTAGE, [1 / 6] * 3 + [1 / 4] * 2, strict=True)]
    assert moved(0.1).dlogp.tolist() == pytest.approx(wanted, rel=1e-6)


def test_only_scored_completions_below_the_bar_are_wrong():
    ((right, partly, wrong, unscored),) = method("ace", {}).advantages([group(1.0, 0.5, 0.0, None)])

    found = [rollout.extras[WRONG] for rollout in (right, partly, wrong, unscored)]
    assert found == [0.0, 1.0, 1.0, 0.0]
    ((_, partly, _),) = method("ace", {"correct": 0.5}).advantages([group(1.0, 0.5, 0.0)])
    assert partly.extras[WRONG] == 0.0


def test_the_advantages_and_weights_are_those_of_grpo():
    found, wanted = (advantages(name, group(*FIXTURE)) for name in ("ace", "grpo"))

    assert found == wanted
    assert method("ace", {}).needs_reference
