"""Token and sequence ratios mixed by entropy; what holds for all sequence losses is elsewhere."""

import pytest
import torch
from known import SEQUENCE_MEAN, assert_known, with_entropy

from rlvr_fast.methods.dhpo import MixedSurrogate, Mixing

GUIDED = MixedSurrogate(mixing=Mixing.ENTROPY)


def test_the_mixture_by_entropy_has_the_published_value():
    """Source: `known_values.py`, F1, w = [.583333, 0, 1, 0, 1]."""
    found = with_entropy(GUIDED, SEQUENCE_MEAN)

    assert_known(found, 0.164659, [0, 0, 0, 0.305351, 0.412180])


def test_where_all_entropies_of_a_sequence_are_equal_the_ratios_are_averaged():
    found = with_entropy(GUIDED, SEQUENCE_MEAN, entropy=[0.3] * 5)

    assert torch.equal(found.dlogp, with_entropy(MixedSurrogate(), SEQUENCE_MEAN).dlogp)


def test_flipped_the_surest_tokens_go_by_their_own_ratio():
    """w = [.416667, 1, 0, 1, 0]: tokens 1 and 3 as in GRPO, 2 and 4 as in GSPO."""
    flipped = MixedSurrogate(mixing=Mixing.ENTROPY, flip=True)

    found = with_entropy(flipped, SEQUENCE_MEAN).dlogp.tolist()

    wanted = [-0.111720, 0, 0.226209, 0.305351]
    assert found[1:] == pytest.approx(wanted, abs=2e-6)
