import pytest
import torch
from known import BACKENDS, SEQUENCE_MEAN, TOKEN_MEAN, assert_known, f1
from rewarded import FIXTURE, advantages, group

from rlvr_fast.methods import method
from rlvr_fast.methods.base import BatchShape
from rlvr_fast.tracing.level import Level, level


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("clip", "loss", "gradient"),
    [
        (0.2, 0.145912, [0, 0, 0, 0.745912, 0.745912]),
        (0.5, 0.070983, [-0.674929, -0.674929, -0.674929, 0.745912, 0.745912]),
    ],
)
def test_the_product_of_a_sequences_ratios_is_clipped(backend, clip, loss, gradient):
    """Source: F1 by hand; the products are exp(0.3) = 1.349859 and exp(0.4) = 1.491825."""
    objective = method("rloo", {"clip_low": clip, "clip_high": clip}).objective()

    assert_known(f1(objective, backend, SEQUENCE_MEAN), loss, gradient)


def test_a_tile_holds_whole_sequences():
    assert level(method("rloo", {}).objective()) is Level.SEQUENCE


def test_the_baseline_is_the_mean_of_the_others():
    """Source: the fixture of the published baselines."""
    found = advantages("rloo", group(*FIXTURE))

    assert found == pytest.approx([0.75, -0.5, -0.5, 0.75, -0.5])


def test_a_ratio_per_token_is_ppos_clip_and_token_mean():
    """Source: `known_values.py`, F1, the row of PPO."""
    chosen = method("rloo", {"ratio": "token"})
    shape = BatchShape(
        seq_lengths=torch.tensor([3, 2]),
        group_offsets=torch.tensor([0, 2]),
        max_completion_tokens=8,
    )

    assert torch.equal(chosen.seq_weights(shape), TOKEN_MEAN)
    found = f1(chosen.objective(), "reference", TOKEN_MEAN)
    assert_known(found, -0.103352, [0, -0.134064, 0, 0.180967, 0.329744])


def test_on_policy_a_sequence_is_one_action():
    """The gradient of `-A sum_t logp`, mean over sequences, whatever their lengths."""
    logp = [-1.0, -0.5, -2.0, -0.3, -1.2]

    found = f1(method("rloo", {}).objective(), "reference", SEQUENCE_MEAN, logp=logp, old=logp)

    assert found.dlogp.tolist() == pytest.approx([-0.5, -0.5, -0.5, 0.5, 0.5])


def test_far_off_policy_nothing_is_infinite():
    far = [-60.0, -60.0, -60.0, -0.001, -0.001]
    old = [-0.001, -0.001, -0.001, -60.0, -60.0]

    found = f1(method("rloo", {}).objective(), "cpp", SEQUENCE_MEAN, logp=far, old=old)

    assert found.dlogits.isfinite().all()
