import pytest
from known import BACKENDS, TOKEN_MEAN, assert_known, f1
from rewarded import FIXTURE, group, shaped

from rlvr_fast.methods import method


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradient_are_the_published_ones(backend):
    """Source: `known_values.py`, F1."""
    found = f1(method("gpg", {}).objective(), backend, TOKEN_MEAN)

    assert_known(found, 0.42, [-0.2, -0.2, -0.2, 0.2, 0.2])


def test_a_batch_in_which_all_teach_has_the_centred_rewards():
    assert shaped("gpg", group(*FIXTURE)) == pytest.approx([0.6, -0.4, -0.4, 0.6, -0.4])


def test_groups_that_teach_nothing_scale_the_others_up():
    """B = 8, M = 3."""
    found = shaped("gpg", group(*FIXTURE), group(1, 1, 1, index=1))

    wanted = [8 / 5 * x for x in (0.6, -0.4, -0.4, 0.6, -0.4)]
    assert found == pytest.approx([*wanted, 0, 0, 0])


def test_a_batch_that_teaches_nothing_stays_zero():
    assert shaped("gpg", group(1, 1), group(0, 0, index=1)) == [0] * 4
