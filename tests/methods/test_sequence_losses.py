"""Losses of whole sequences: published values, and what keeps a sequence's numbers its own."""

import math

import pytest
import torch
from known import (
    ADVANTAGE,
    BACKENDS,
    ENTROPY,
    LENGTHS,
    LOGP,
    OLD,
    REF,
    ROLLOUT,
    SEQUENCE_MEAN,
    SEQUENCE_SUM,
    assert_known,
    f1,
)

from rlvr_fast.methods import method
from rlvr_fast.methods.ace import WRONG, ConfidenceScaledSurrogate
from rlvr_fast.methods.base import BatchShape
from rlvr_fast.methods.dhpo import MixedSurrogate, Mixing
from rlvr_fast.methods.gmpo import GeometricSurrogate
from rlvr_fast.methods.pacs import CLASS_WEIGHT, LABEL, Centring, OutcomeCrossEntropy, Proxy
from rlvr_fast.methods.vespo import GammaWeightedGradient
from rlvr_fast.objectives import ClippedSurrogate, PolicyGradient, SequenceClippedSurrogate
from rlvr_fast.ops.objective_rows import Segmentation, evaluate
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.tokens import TokenFields
from rlvr_fast.tracing.vanishing import vanishes

SHAPE = BatchShape(seq_lengths=LENGTHS, group_offsets=torch.tensor([0, 2]), max_completion_tokens=8)
GUIDED = MixedSurrogate(mixing=Mixing.ENTROPY)
WIDE = {"clip_low": 0.5, "clip_high": 0.5}
KNOWN = {
    "GSPO-token": (
        "gspo_token", {}, SEQUENCE_MEAN, 0.110501, [0, 0, 0, 0.305351, 0.305351],
    ),
    "GSPO-token .5": (
        "gspo_token", WIDE, SEQUENCE_MEAN, 0.058116, [-0.184195] * 3 + [0.305351] * 2,
    ),
    "LUSPO": ("luspo", {}, SEQUENCE_SUM, -0.282347, [0, 0, 0, 0.610701, 0.610701]),
    "LUSPO .5": (
        "luspo", WIDE, SEQUENCE_SUM, -0.436354, [-0.552585] * 3 + [0.610701] * 2,
    ),
    "GMPO": (
        "gmpo", {}, SEQUENCE_MEAN, 0.076232, [-0.178157, -0.178157, 0, 0.305351, 0.305351],
    ),
    "DHPO averaged": (
        "dhpo", {}, SEQUENCE_MEAN, 0.109855, [0, -0.147958, 0, 0.265780, 0.358766],
    ),
    "DHPO all token": (
        "dhpo", {"token_share": 1.0}, SEQUENCE_MEAN,
        0.126670, [0, -0.111720, 0, 0.226209, 0.412180],
    ),
    "DHPO all sequence": (
        "dhpo", {"token_share": 0.0}, SEQUENCE_MEAN, 0.110501, [0, 0, 0, 0.305351, 0.305351],
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "options", "weight", "loss", "gradient"), KNOWN.values(), ids=KNOWN
)
def test_values_and_gradients_are_the_published_ones(
    backend, name, options, weight, loss, gradient
):
    """Source: `known_values.py`, F1, from the methods' own equations."""
    kind = method(name, options)

    torch.testing.assert_close(kind.seq_weights(SHAPE), weight)
    assert_known(f1(kind.objective(), backend, weight), loss, gradient)


OBJECTIVES = {
    "gspo_token": SequenceClippedSurrogate(),
    "gmpo": GeometricSurrogate(),
    "vespo": GammaWeightedGradient(),
    "vespo from sampler": GammaWeightedGradient(from_sampler=True),
    "dhpo": MixedSurrogate(),
    "dhpo by entropy": GUIDED,
    "ace": ConfidenceScaledSurrogate(surrogate=ClippedSurrogate(clip_high=0.28)),
    "pacs": OutcomeCrossEntropy(),
    "pacs grpo": OutcomeCrossEntropy(centring=Centring.GRPO),
    "pacs none": OutcomeCrossEntropy(centring=Centring.NONE),
    "pacs mean logp": OutcomeCrossEntropy(proxy=Proxy.MEAN_LOGP),
}


@pytest.mark.parametrize(("name", "objective"), OBJECTIVES.items(), ids=OBJECTIVES)
def test_an_objective_looks_as_far_as_it_says_and_no_further(name, objective):
    of_groups = name in ("pacs", "pacs grpo", "pacs mean logp")

    assert level(objective) is (Level.GROUP if of_groups else Level.SEQUENCE)
    assert vanishes(objective) is not name.startswith("pacs")


def rows(objective, given, sequences, group=None):
    """The objective on rows of `given` fields, one group, weights as given."""
    names = ("logp", "entropy", "old_logp", "ref_logp", "rollout_logp", "advantage", "weight")
    logp, entropy, old, ref, rollout, advantage, weight = (given[name] for name in names)
    fields = TokenFields(
        weight=weight, old_logp=old, ref_logp=ref, rollout_logp=rollout, advantage=advantage,
        extras={name: given[name] for name in (WRONG, LABEL, CLASS_WEIGHT)},
    )  # fmt: skip
    stats = torch.stack([logp, entropy, torch.zeros_like(logp), torch.zeros_like(logp)])
    cut = Segmentation(seq=torch.tensor(sequences), group=torch.tensor(group or [0, sequences[-1]]))
    return evaluate(objective, stats, fields, cut, slice(0, len(logp)))


def fixture(dtype=torch.float64):
    wrong = [0.0] * 3 + [1.0] * 2
    named = {
        "logp": LOGP, "entropy": ENTROPY, "old_logp": OLD, "ref_logp": REF,
        "rollout_logp": ROLLOUT, "advantage": ADVANTAGE, "weight": [1 / 6] * 3 + [1 / 4] * 2,
        WRONG: wrong, LABEL: [1 - x for x in wrong], CLASS_WEIGHT: [1.5] * 5,
    }  # fmt: skip
    return {name: torch.tensor(values, dtype=dtype) for name, values in named.items()}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("spoilt", [7.0, math.nan])
def test_masked_tokens_within_a_sequence_count_nowhere(objective, spoilt):
    """A NaN stands where nobody computed a number; log-probability and entropy always exist."""
    given, place = fixture(), torch.tensor([0, 1, 1, 2, 3, 4, 4])
    masked = torch.tensor([False, True, False, False, False, False, True])
    filled = {name: value[place].masked_fill(masked, spoilt) for name, value in given.items()}
    filled["logp"] = given["logp"][place].masked_fill(masked, -5.0)
    filled["entropy"] = given["entropy"][place].masked_fill(masked, 5.0)
    filled["weight"] = given["weight"][place].masked_fill(masked, 0.0)

    plain, found = rows(objective, given, [0, 3, 5]), rows(objective, filled, [0, 4, 7])

    assert not found.dlogp[masked].any()
    torch.testing.assert_close(found.dlogp[~masked], plain.dlogp, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.token_loss[~masked], plain.token_loss, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_sequence_of_masked_tokens_is_not_there(objective):
    given, place = fixture(), torch.tensor([0, 1, 2, 0, 1, 3, 4])
    masked = torch.tensor([False, False, False, True, True, False, False])
    filled = {name: value[place] for name, value in given.items()}
    filled["weight"] = filled["weight"].masked_fill(masked, 0.0)

    plain, found = rows(objective, given, [0, 3, 5]), rows(objective, filled, [0, 3, 5, 7])

    assert not found.dlogp[masked].any()
    torch.testing.assert_close(found.dlogp[~masked], plain.dlogp, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("gap", [60.0, -60.0])
def test_a_log_ratio_of_sixty_either_way_stays_finite_in_single_precision(objective, gap):
    given = fixture(torch.float32)
    given["logp"] = torch.full((5,), min(gap, 0.0) - 1)
    given |= {name: given["logp"] - gap for name in ("old_logp", "ref_logp", "rollout_logp")}

    found = rows(objective, given, [0, 3, 5])

    assert torch.isfinite(found.token_loss).all()
    assert torch.isfinite(found.dlogp).all()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_sequences_of_one_token_and_of_none_are_no_trouble(objective):
    given = {name: value[2:4] for name, value in fixture().items()}
    given |= {"old_logp": given["logp"]}

    found = rows(objective, given, [0, 1, 1, 2])

    assert torch.isfinite(found.token_loss).all()
    assert torch.isfinite(found.dlogp).all()
    assert found.dlogp.any()


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_entropy_gets_no_gradient(objective):
    found = rows(objective, fixture(), [0, 3, 5])

    assert found.dentropy is None or not found.dentropy.any()


def test_equal_lengths_make_the_length_times_gspo():
    given = {name: value[:4] for name, value in fixture().items()}
    given["advantage"] = torch.tensor([1.0, 1.0, -1.0, -1.0]).double()

    found = [
        rows(
            method(name, WIDE).objective(),
            given | {"weight": torch.full((4,), weight, dtype=torch.float64)},
            [0, 2, 4],
        ).dlogp
        for name, weight in (("luspo", 1 / 2), ("gspo", 1 / 4))
    ]

    torch.testing.assert_close(found[0], 2 * found[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["luspo", "vespo"])
def test_on_policy_the_gradient_is_that_of_the_summed_log_probability(name):
    kind = method(name, {})
    weight = kind.seq_weights(SHAPE)

    found = f1(kind.objective(), "reference", weight, old=LOGP).dlogp
    plain = f1(PolicyGradient(), "reference", weight, old=LOGP).dlogp

    torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)


def test_tokens_with_advantages_of_their_own_are_clipped_by_their_own_sign():
    advantage = [1.0, -1.0, 1.0, -1.0, 1.0]

    found = f1(
        method("gspo_token", {}).objective(), "reference", SEQUENCE_MEAN, advantage=advantage
    )

    s = [math.exp(0.1), math.exp(0.2)]
    wanted = [0, s[0] / 6, 0, s[1] / 4, 0]
    assert found.dlogp.tolist() == pytest.approx(wanted, rel=1e-6)


def test_gspo_token_is_gspo_for_advantages_that_are_constant_in_a_sequence():
    assert method("gspo_token", {}).objective() == method("gspo", {}).objective()
    assert torch.equal(
        method("gspo_token", {}).seq_weights(SHAPE), method("gspo", {}).seq_weights(SHAPE)
    )


def test_one_extreme_token_moves_the_geometric_mean_by_its_bound_only():
    """The third token of F1 is clipped at 0.4: what lies beyond changes nothing but its place."""
    beyond = [*LOGP[:2], -0.01, *LOGP[3:]]

    found = [
        f1(GeometricSurrogate(), "reference", SEQUENCE_MEAN, logp=logp) for logp in (LOGP, beyond)
    ]

    assert found[0].loss == pytest.approx(found[1].loss, abs=1e-12)
    assert found[0].dlogp[2] == found[1].dlogp[2] == 0


def test_sequences_far_from_the_sampling_policy_lose_their_gradient_smoothly():
    gaps = torch.tensor([-6.0, -2.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    given = fixture() | {"advantage": torch.ones(5).double(), "weight": torch.ones(5).double()}
    given["logp"] = given["old_logp"] + gaps

    found = -rows(GammaWeightedGradient(), given, [0, 1, 2, 3, 4, 5]).dlogp

    assert found[2] == 1
    assert found[0] < 1e-3
    assert found[1] < 0.4
    assert found[3] < 0.05
    assert found[4] < 1e-6


def test_no_ratio_of_a_sequence_counts_as_less_than_the_floor_or_more_than_exp_20():
    given = fixture() | {"advantage": torch.ones(5).double(), "weight": torch.ones(5).double()}
    given["logp"] = given["old_logp"] + torch.tensor([-15.0, -15, 15, 15, 15]).double()
    undamped = GammaWeightedGradient(k_positive=0.25, lambda_positive=0.0)

    found = -rows(undamped, given, [0, 2, 5]).dlogp

    wanted = [1e-8**0.25] * 2 + [math.exp(5.0)] * 3
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)


def test_with_one_token_the_two_ratios_are_the_same():
    given = {name: value[1:2] for name, value in fixture().items()}
    same = {"clip_low": 0.2, "clip_high": 0.2, "seq_clip_low": 0.2, "seq_clip_high": 0.2}

    found = [
        rows(MixedSurrogate(token_share=share, **same), given, [0, 1]).dlogp
        for share in (0.0, 0.3, 1.0)
    ]

    torch.testing.assert_close(found[1:], [found[0]] * 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("luspo", "clip_low", -1.0, r"^clip_low: wanted >= 0, got -1.0$"),
        ("gmpo", "clip_high", -1.0, r"^clip_high: wanted >= 0, got -1.0$"),
        ("vespo", "lambda_negative", -1.0, r"^lambda_negative: wanted >= 0, got -1.0$"),
        ("dhpo", "token_share", 1.5, r"^token_share: wanted a number in \[0, 1\], got 1.5$"),
        ("dhpo", "seq_clip_high", -1.0, r"^seq_clip_high: wanted >= 0, got -1.0$"),
        ("ace", "alpha", -1.0, r"^alpha: wanted >= 0, got -1.0$"),
        ("pacs", "beta", -1.0, r"^beta: wanted >= 0, got -1.0$"),
        ("rover", "future", -1.0, r"^future: wanted >= 0, got -1.0$"),
    ],
)
def test_an_option_that_cannot_be_names_wanted_and_got(name, option, value, message):
    with pytest.raises(ValueError, match=message):
        method(name, {option: value})
