"""One rollout per prompt: a remembered baseline and entropy in the advantage."""

import json

import pytest
import torch
from known import BACKENDS, TOKEN_MEAN, assert_known, f1, with_entropy
from rewarded import group

from rlvr_fast.methods.mssr import MSSR, EntropyShapedSurrogate
from rlvr_fast.objectives import ClippedSurrogate
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.trace import trace


def values(method, *rewards):
    """The baseline before each visit of prompt 0."""
    found = []
    for reward in rewards:
        found.append(method._value(0))
        method.advantages([group(reward)])
    return found


def test_the_baseline_forgets_as_the_paper_says():
    """Source: b-seeds, entry 19: from Beta(1, 1) with eta 0.9, rewards 1, 1, 0."""
    method = MSSR(memory_low=0.9, memory_high=0.9)

    assert values(method, 1.0, 1.0, 0.0) == pytest.approx([0.5, 0.6786, 0.7699], abs=5e-5)


def test_advantages_are_whitened_over_the_batch():
    found = MSSR().advantages([group(1.0), group(0.0, index=1), group(0.0, index=2)])

    values = torch.tensor([rollout.advantage for (rollout,) in found])
    assert float(values.sum()) == pytest.approx(0, abs=1e-6)
    assert values[1] == values[2] < 0 < values[0]


def test_a_completion_that_nobody_could_score_is_not_counted():
    method = MSSR()

    (_, unscored), _ = method.advantages([group(1.0, None), group(0.0, index=1)])

    assert unscored.advantage == 0
    assert method._counts["0"] == pytest.approx((0.96 + 1, 0.96))


@pytest.mark.parametrize(
    ("kl", "falling", "as_printed"),
    [(0.0, 0.96, 0.875), (0.005, 0.9175, 0.9175), (1.0, 0.875, 0.875)],
)
def test_a_policy_that_moves_forgets_faster(kl, falling, as_printed):
    """Source: b-seeds, entry 19, both readings."""
    for method, wanted in ((MSSR(), falling), (MSSR(as_printed=True), as_printed)):
        method.observe({"kl": kl})
        assert method.eta() == pytest.approx(wanted)


def test_only_the_last_steps_count_and_the_reference_comes_first():
    method = MSSR(window=2)
    for kl in (9.0, 0.0, 0.01):
        method.observe({"kl": 7.0, "ref_kl": kl})

    assert list(method._kls) == [0.0, 0.01]
    assert method.eta() == pytest.approx(0.9175)


@pytest.mark.parametrize(
    ("coef", "divisor", "entropy", "wanted"),
    [(0.4, 2.0, 3.0, -0.5), (2.0, 0.4, 3.0, 1.5), (0.4, 2.0, 0.5, -0.8), (2.0, 0.4, 0.5, 0.0)],
)
def test_the_shaped_advantage_has_its_known_value(coef, divisor, entropy, wanted):
    """Source: b-seeds, entry 19: A = -1, with the constants of the prior work and as printed."""
    objective = EntropyShapedSurrogate(coef=coef, divisor=divisor, clip_low=9.0, clip_high=9.0)

    found = with_entropy(objective, TOKEN_MEAN, entropy=[entropy] * 5, advantage=[-1.0] * 5)

    ratio = torch.tensor([-0.8, -0.9, -1.5, -0.4, -0.7]) - torch.tensor([-1, -0.5, -2, -0.3, -1.2])
    torch.testing.assert_close(
        found.dlogp, -wanted * ratio.double().exp() / 5, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_entropy_it_is_the_clipped_surrogate(backend):
    """Source: F1, PPO .2 with the token mean."""
    found = f1(EntropyShapedSurrogate(coef=0.0), backend, TOKEN_MEAN)

    assert_known(found, -0.103352, [0, -0.134064, 0, 0.180967, 0.329744])
    plain = f1(ClippedSurrogate(), backend, TOKEN_MEAN)
    torch.testing.assert_close(found.dlogp, plain.dlogp, rtol=1e-6, atol=1e-7)


def test_it_runs_in_the_single_pass_and_the_entropy_has_no_gradient():
    objective = MSSR().objective()

    assert level(objective) is Level.TOKEN
    traced = trace(objective)
    assert traced is not None


def test_what_is_remembered_survives_a_checkpoint():
    before, after = MSSR(), MSSR()
    before.advantages([group(1.0), group(0.0, index=1)])
    before.observe({"kl": 0.004})

    after.load_state_dict(json.loads(json.dumps(before.state_dict())))

    batch = [group(0.0), group(1.0, index=1)]
    assert after.advantages(batch) == before.advantages(batch)
    assert after.eta() == before.eta()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_high": 0.5}, "memory_high: wanted between memory_low, 0.875, and 1, got 0.5"),
        ({"divisor": 0.0}, "divisor: wanted > 0, got 0.0"),
    ],
)
def test_an_option_that_cannot_be_names_wanted_and_got(options, message):
    with pytest.raises(ValueError, match=message):
        MSSR(**options)
