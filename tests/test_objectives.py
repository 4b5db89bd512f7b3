"""Objectives against numbers computed without us (NumPy, gradients by central differences)."""

import math

import pytest
import torch
from torch import Tensor

from rlvr_fast import aggregate, objectives
from rlvr_fast.objectives import Objective
from rlvr_fast.ops.objective_rows import Segmentation, evaluate
from rlvr_fast.tracing.tokens import TokenFields

LENGTHS = torch.tensor([3, 2])
OLD = [-1.0, -0.5, -2.0, -0.3, -1.2]
NEW = [-0.8, -0.9, -1.5, -0.4, -0.7]
REF = [-1.1, -0.6, -1.4, -0.2, -1.0]
ADVANTAGE = [1.0, 1.0, 1.0, -1.0, -1.0]

TOKEN_MEAN = aggregate.token_mean(LENGTHS)
SEQUENCE_MEAN = aggregate.sequence_mean(LENGTHS)
CONSTANT = aggregate.constant_length(LENGTHS, length=8)

KNOWN: dict[str, tuple[Objective, Tensor, float, list[float]]] = {
    "PPO .2, token mean": (
        objectives.ClippedSurrogate(), TOKEN_MEAN,
        -0.103352, [0, -0.134064, 0, 0.180967, 0.329744],
    ),
    "GRPO .2, sequence mean": (
        objectives.ClippedSurrogate(), SEQUENCE_MEAN,
        0.126670, [0, -0.111720, 0, 0.226209, 0.412180],
    ),
    "DAPO .2/.28, token mean": (
        objectives.ClippedSurrogate(clip_high=0.28), TOKEN_MEAN,
        -0.123633, [-0.244281, -0.134064, 0, 0.180967, 0.329744],
    ),
    "Dr.GRPO .2, constant 8": (
        objectives.ClippedSurrogate(), CONSTANT,
        -0.032298, [0, -0.041895, 0, 0.056552, 0.103045],
    ),
    "dual clip 1.5": (
        objectives.ClippedSurrogate(clip_high=0.28, dual_clip=1.5), TOKEN_MEAN,
        -0.153377, [-0.244281, -0.134064, 0, 0.180967, 0],
    ),
    "k1": (objectives.KL1(coef=1.0), TOKEN_MEAN, 0.0, [0.2] * 5),
    "k2": (objectives.KL2(coef=1.0), TOKEN_MEAN, 0.032, [0.06, -0.06, -0.02, -0.04, 0.06]),
    "k3": (
        objectives.KL3(coef=1.0), TOKEN_MEAN,
        0.031614, [0.051836, -0.069972, -0.021034, -0.044281, 0.051836],
    ),
    "GSPO": (
        objectives.SequenceClippedSurrogate(), SEQUENCE_MEAN,
        0.110501, [0, 0, 0, 0.305351, 0.305351],
    ),
    "GSPO .5/.5": (
        objectives.SequenceClippedSurrogate(clip_low=0.5, clip_high=0.5), SEQUENCE_MEAN,
        0.058116, [-0.184195] * 3 + [0.305351] * 2,
    ),
    "CISPO 1.28": (
        objectives.CappedWeight(cap=1.28), TOKEN_MEAN,
        0.448495, [-0.244281, -0.134064, -0.256, 0.180967, 0.256],
    ),
    "CISPO 5": (
        objectives.CappedWeight(), TOKEN_MEAN,
        0.507490, [-0.244281, -0.134064, -0.329744, 0.180967, 0.329744],
    ),
    "REINFORCE": (objectives.PolicyGradient(), TOKEN_MEAN, 0.42, [-0.2, -0.2, -0.2, 0.2, 0.2]),
}  # fmt: skip


def value_and_gradient(objective: Objective, seq_weight: Tensor) -> tuple[float, Tensor]:
    weight = seq_weight.repeat_interleave(LENGTHS).double()
    given = [torch.tensor(x, dtype=torch.float64) for x in (OLD, REF, ADVANTAGE)]
    fields = TokenFields(
        weight=weight, old_logp=given[0], ref_logp=given[1], advantage=given[2], extras={}
    )
    logp = torch.tensor(NEW, dtype=torch.float64)
    stats = torch.stack([logp, torch.ones(5), torch.zeros(5), torch.zeros(5)])
    cut = Segmentation(seq=torch.tensor([0, 3, 5]))
    found = evaluate(objective, stats, fields, cut, slice(0, 5))
    return float((weight * found.token_loss).sum()), found.dlogp


@pytest.mark.parametrize(
    ("objective", "seq_weight", "value", "gradient"), KNOWN.values(), ids=KNOWN.keys()
)
def test_values_and_gradients_are_the_published_ones(objective, seq_weight, value, gradient):
    """Source: the fixture of `known_values.py`, from the methods' own equations."""
    found, dlogp = value_and_gradient(objective, seq_weight)
    assert found == pytest.approx(value, abs=2e-6)
    torch.testing.assert_close(dlogp, torch.tensor(gradient).double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("old_probability", "low", "high"),
    [
        (1.0, 0.8000, 1.1708),
        (0.9, 0.7687, 1.1872),
        (0.8, 0.7236, 1.2071),
        (0.64, 0.5, 1.25),
        (0.5, 0.5, 1.3062),
        (0.1, 0.5, 2.0),
        (0.01, 0.5, 5.0),
        (0.0023, 0.5, 9.838),
        (0.0022, 0.5, 10.0),
        (1e-30, 0.5, 10.0),
    ],
)
def test_dynamic_bounds_are_those_of_the_paper(old_probability, low, high):
    """Source: DCPO (2509.02333), equations 4-6 at 0.16/0.20; the loss is flat beyond the bounds."""
    objective = objectives.DynamicClipSurrogate()
    old = torch.full((4,), math.log(old_probability), dtype=torch.float64)
    edges = torch.tensor([high * 0.999, high * 1.001, low * 1.001, low * 0.999])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    fields = TokenFields(
        weight=torch.ones(4).double(), old_logp=old, advantage=advantage, extras={}
    )
    stats = torch.stack([old + edges.double().log(), *torch.zeros(3, 4).double()])
    dlogp = evaluate(objective, stats, fields, Segmentation(), slice(0, 4)).dlogp
    assert torch.equal(dlogp != 0, torch.tensor([True, False, True, False]))


def test_the_dynamic_surrogate_caps_the_ratio_of_negative_advantages_too():
    """Source: DCPO (2509.02333), r_max = 10 as dual clip."""
    objective = objectives.DynamicClipSurrogate()
    fields = TokenFields(
        weight=torch.ones(2),
        old_logp=torch.tensor([-5.0, -5.0]),
        advantage=-torch.ones(2),
        extras={},
    )
    stats = torch.zeros(4, 2)
    stats[0] = torch.tensor([-5 + math.log(9.9), -5 + math.log(10.1)])
    found = evaluate(objective, stats, fields, Segmentation(), slice(0, 2))
    torch.testing.assert_close(found.token_loss, torch.tensor([9.9, 10.0]))
    assert found.dlogp[1] == 0


def test_the_entropy_bonus_differentiates_the_entropy_and_nothing_else():
    stats = torch.zeros(4, 2)
    stats[1] = torch.tensor([0.5, 2.0])
    fields = TokenFields(weight=torch.tensor([1.0, 0.5]), extras={})
    objective = objectives.EntropyBonus(coef=0.1)
    found = evaluate(objective, stats, fields, Segmentation(), slice(0, 2))
    torch.testing.assert_close(found.token_loss, torch.tensor([-0.05, -0.2]))
    assert (found.dlogp == 0).all()
    torch.testing.assert_close(found.dentropy, torch.tensor([-0.1, -0.05]))


def test_adding_objectives_adds_their_losses_and_gradients():
    parts = [objectives.ClippedSurrogate(), objectives.KL3(coef=0.04), objectives.KL2(coef=0.1)]
    total, gradient = value_and_gradient(parts[0] + parts[1] + parts[2], TOKEN_MEAN)
    values, gradients = zip(*(value_and_gradient(p, TOKEN_MEAN) for p in parts), strict=True)
    assert total == pytest.approx(sum(values))
    torch.testing.assert_close(gradient, torch.stack(gradients).sum(0))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (aggregate.token_mean(LENGTHS), [0.2, 0.2]),
        (aggregate.sequence_mean(LENGTHS), [1 / 6, 1 / 4]),
        (aggregate.constant_length(LENGTHS, length=8), [1 / 16, 1 / 16]),
        (aggregate.mean_per_sequence(LENGTHS), [1 / 3, 1 / 2]),
        (aggregate.mean_per_sequence(LENGTHS, scale=0.5), [1 / 6, 1 / 4]),
    ],
    ids=["token mean", "sequence mean", "constant length", "sum of means", "scaled sum of means"],
)
def test_aggregation_is_a_weight_per_token(weights, expected):
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_an_empty_sequence_is_counted_and_weighs_nothing_infinite():
    weights = aggregate.sequence_mean(torch.tensor([0, 2]))
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.25]))


def test_a_constant_length_below_one_is_refused():
    with pytest.raises(ValueError, match="length: wanted at least 1, got 0"):
        aggregate.constant_length(LENGTHS, length=0)
