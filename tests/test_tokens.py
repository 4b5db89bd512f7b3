"""Sums, means and extremes over the unmasked tokens of segments, against plain Python loops."""

import math
from itertools import pairwise

import pytest
import torch

from rlvr_fast.ops.objective_rows import Segmentation, evaluate
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.tokens import Segments, TokenFields, Tokens

SEQUENCES = [0, 3, 3, 4, 8, 9]
"""Of 3, 0, 1, 4 and 1 tokens; of the last the only one is masked."""
GROUPS = [0, 4, 9]
KEPT = [1, 0, 1, 1, 1, 1, 0, 1, 0]
VALUES = [0.5, 9.0, -1.0, 2.0, -3.0, 0.25, -9.0, -3.0, 7.0]
REDUCTIONS = {"sum": sum, "mean": lambda x: sum(x) / len(x), "max": max, "min": min}
NAMES = [f"seq_{name}" for name in REDUCTIONS] + ["group_sum", "group_mean"]


def tokens(kept=KEPT, sequences=SEQUENCES, groups=GROUPS):
    zeros = torch.zeros(len(kept), dtype=torch.float64)
    fields = TokenFields(weight=torch.tensor(kept).double() / 7, extras={})
    cut = Segmentation(seq=torch.tensor(sequences), group=torch.tensor(groups))
    return cut.view(zeros, zeros, fields, slice(0, len(kept)))


def looped(name, values):
    """`[T]`; None for a masked token, of which nothing is promised."""
    level, _, kind = name.partition("_")
    offsets = SEQUENCES if level == "seq" else GROUPS
    found = [None] * len(values)
    for start, stop in pairwise(offsets):
        kept = [i for i in range(start, stop) if KEPT[i]]
        for i in kept:
            found[i] = REDUCTIONS[kind]([values[j] for j in kept])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_unmasked_token_gets_what_a_loop_over_its_segment_finds(name):
    found = getattr(tokens(), name)(torch.tensor(VALUES).double()).tolist()

    wanted = looped(name, VALUES)
    assert [x for x, y in zip(found, wanted, strict=True) if y is not None] == pytest.approx(
        [y for y in wanted if y is not None]
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
def test_what_stands_in_a_masked_token_reaches_no_other(name, spoilt):
    values = torch.tensor(VALUES).double()
    kept = torch.tensor(KEPT, dtype=torch.bool)

    found = getattr(tokens(), name)(values.masked_fill(~kept, spoilt))

    assert torch.equal(found[kept], getattr(tokens(), name)(values)[kept])


@pytest.mark.parametrize("name", ["seq_max", "seq_min"])
def test_a_masked_token_has_its_own_value_for_an_extreme(name):
    found = getattr(tokens(), name)(torch.tensor(VALUES).double())

    assert [found[i].item() for i in (1, 6, 8)] == [9.0, -9.0, 7.0]


@pytest.mark.parametrize("name", ["seq_max", "seq_min"])
@pytest.mark.parametrize("value", [-math.inf, math.inf, 0.0])
def test_an_extreme_of_equal_values_is_that_value(name, value):
    found = getattr(tokens(), name)(torch.full((9,), value).double())

    assert found.tolist() == [value] * 9


@pytest.mark.parametrize("name", ["seq_max", "seq_min"])
def test_extremes_are_exact_in_the_dtype_they_come_in(name):
    values = torch.randn(9)

    found = getattr(tokens(), name)(values)

    assert found.dtype == torch.float32
    assert set(found.tolist()) <= set(values.tolist())


@pytest.mark.parametrize("name", ["seq_max", "seq_min"])
def test_no_gradient_flows_through_an_extreme(name):
    values = torch.tensor(VALUES).double().requires_grad_()

    assert not getattr(tokens(), name)(values).requires_grad


@pytest.mark.parametrize("name", ["seq_sum", "seq_mean", "group_sum", "group_mean"])
def test_the_gradient_of_a_total_reaches_the_unmasked_tokens_of_the_segment_alone(name):
    values = torch.tensor(VALUES).double().requires_grad_()
    upstream = torch.tensor([float(i) for i in range(1, 10)]).double() * torch.tensor(KEPT)

    (found,) = torch.autograd.grad(getattr(tokens(), name)(values), values, upstream)

    kind, _, reduction = name.partition("_")
    offsets = SEQUENCES if kind == "seq" else GROUPS
    for start, stop in pairwise(offsets):
        count = max(sum(KEPT[start:stop]), 1) if reduction == "mean" else 1
        total = sum((i + 1) * KEPT[i] for i in range(start, stop)) / count
        assert found[start:stop].tolist() == pytest.approx(
            [total * keep for keep in KEPT[start:stop]]
        )


@pytest.mark.parametrize("name", NAMES)
def test_segments_without_a_token_leave_nothing_behind(name):
    empty = tokens(kept=[], sequences=[0, 0, 0], groups=[0, 0])

    assert getattr(empty, name)(torch.zeros(0).double()).shape == (0,)


def test_a_segment_of_masked_tokens_sums_to_zero_and_not_to_nan():
    segments = Segments(index=torch.tensor([0, 0]), count=1, kept=torch.zeros(2, dtype=torch.bool))

    assert segments.sum(torch.tensor([math.nan, 1.0])).tolist() == [0.0, 0.0]
    assert segments.mean(torch.tensor([math.nan, 1.0])).tolist() == [0.0, 0.0]


class Extreme(Objective):
    """Each token against the extremes of its sequence."""

    def token_loss(self, t: Tokens):
        return t.logp * (t.seq_max(t.logp) - t.seq_min(t.logp))


def test_an_objective_that_asks_for_an_extreme_sees_its_whole_sequence():
    assert level(Extreme()) is Level.SEQUENCE


@pytest.mark.parametrize("rows", [slice(0, 4), slice(4, 9)])
def test_a_tile_of_whole_sequences_finds_what_the_whole_batch_does(rows):
    logp = torch.tensor(VALUES).double() - 10
    stats = torch.stack([logp, *torch.zeros(3, 9).double()])
    weight = torch.tensor(KEPT).double()
    cut = Segmentation(seq=torch.tensor(SEQUENCES))

    whole, part = (
        evaluate(Extreme(), stats[:, at], TokenFields(weight=weight[at], extras={}), cut, at)
        for at in (slice(0, 9), rows)
    )

    assert torch.equal(part.dlogp, whole.dlogp[rows])
    assert torch.equal(part.token_loss, whole.token_loss[rows])
