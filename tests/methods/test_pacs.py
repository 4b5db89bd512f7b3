"""Outcome prediction: known scores and losses, and RLOO's gradient where the policy is the old."""

import math

import pytest
import torch
from rewarded import group

from rlvr_fast.methods import method
from rlvr_fast.methods.base import BatchShape
from rlvr_fast.methods.pacs import CLASS_WEIGHT, LABEL, Centring, OutcomeCrossEntropy, Proxy
from rlvr_fast.objectives import PolicyGradient
from rlvr_fast.ops.objective_rows import Segmentation, evaluate
from rlvr_fast.tracing.tokens import TokenFields

LENGTHS = [2, 1, 3, 2]
PROXIES = [0.3, -0.1, 0.2, 0.0]
REWARDS = [1.0, 0.0, 0.0, 0.0]


def labelled(*rewards, **options):
    return method("pacs", options).advantages([group(*rewards)])[0]


def batch(proxies, rewards, lengths=LENGTHS, *, groups=None, weights=None, objective=None):
    """One row a token, the proxy spread unevenly over a sequence; weights of a sequence mean."""
    lengths, count = torch.tensor(lengths), len(lengths)
    place = torch.arange(count).repeat_interleave(lengths)
    steps = torch.cat([torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in lengths])
    gaps = torch.tensor(proxies).double()[place] / lengths[place] + 0.05 * steps.double()
    old = -1 - torch.rand(len(place)).double()
    label = torch.tensor(rewards).double()
    mean = label.mean()
    fields = TokenFields(
        weight=1 / (count * lengths[place]).double(),
        old_logp=old,
        advantage=((label - mean) * count / max(count - 1, 1))[place],
        extras={
            LABEL: label[place],
            CLASS_WEIGHT: torch.tensor(weights or [1.0] * count).double()[place],
        },
    )
    stats = torch.stack([old + gaps, *torch.zeros(3, len(place)).double()])
    seq = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    cut = Segmentation(seq=seq, group=seq[torch.tensor(groups or [0, count])])
    found = evaluate(objective or OutcomeCrossEntropy(), stats, fields, cut, slice(0, len(place)))
    return found, fields.weight, place


def scores(proxies, **kwargs):
    """From the loss of a label 0, softplus(s), by sequence."""
    found, _, place = batch(proxies, [0.0] * len(proxies), [2] * len(proxies), **kwargs)
    first = [int((place == i).nonzero()[0]) for i in range(len(proxies))]
    return torch.log(torch.expm1(found.token_loss))[first].tolist()


def test_scores_have_their_known_values():
    """Source: the method's own definition, psi = [.3, -.1, .2, 0]."""
    wanted = [0.266667, -0.266667, 0.133333, -0.133333]

    assert scores(PROXIES) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("weights", "loss"), [(None, 0.632022), ([2.0, 2 / 3, 2 / 3, 2 / 3], 0.610907)]
)
def test_losses_have_their_known_values(weights, loss):
    """Source: the method's own definition, psi = [.3, -.1, .2, 0], R = [1, 0, 0, 0]."""
    found, weight, _ = batch(PROXIES, REWARDS, weights=weights)

    assert float((weight * found.token_loss).sum()) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("proxies", [[0.0] * 4, PROXIES, [30.0, -60.0, 5.0, 0.0]])
def test_the_gradient_is_that_of_the_closed_form(proxies):
    """dL/dpsi_i = (g_i - mean of the others' g) / S with g = w (sigmoid(s) - R)."""
    weights = [2.0, 2 / 3, 2 / 3, 2 / 3]
    found, _, place = batch(proxies, REWARDS, weights=weights)

    psi, label = torch.tensor(proxies).double(), torch.tensor(REWARDS).double()
    score = psi - (psi.sum() - psi) / 3
    g = torch.tensor(weights).double() * (torch.sigmoid(score) - label)
    wanted = (g - (g.sum() - g) / 3) / 4
    torch.testing.assert_close(found.dlogp, wanted[place], rtol=1e-6, atol=1e-9)


def test_on_policy_and_unweighted_the_gradient_is_that_of_rloo():
    """dL/dpsi = [-1/4, 1/12, 1/12, 1/12], the same on each token of a sequence."""
    found, _, place = batch([0.0] * 4, REWARDS, lengths=[1, 1, 1, 1])
    plain, _, _ = batch([0.0] * 4, REWARDS, lengths=[1, 1, 1, 1], objective=PolicyGradient())

    torch.testing.assert_close(found.dlogp, plain.dlogp, rtol=1e-12, atol=1e-15)
    wanted = torch.tensor([-1 / 4, 1 / 12, 1 / 12, 1 / 12]).double()
    torch.testing.assert_close(found.dlogp, wanted, rtol=1e-6, atol=0)
    longer, _, place = batch([0.0] * 4, REWARDS)
    torch.testing.assert_close(longer.dlogp, wanted[place], rtol=1e-6, atol=0)


def test_a_group_that_is_all_right_has_a_gradient_only_away_from_the_old_policy():
    at, _, _ = batch([0.0] * 4, [1.0] * 4)
    away, _, _ = batch(PROXIES, [1.0] * 4)

    assert at.dlogp.abs().max() < 1e-15
    assert away.dlogp.abs().max() > 1e-3


def test_what_is_predicted_right_is_let_go():
    unsure, _, _ = batch([0.0, 0.0], [1.0, 0.0], [1, 1])
    sure, _, _ = batch([9.0, -9.0], [1.0, 0.0], [1, 1])

    assert sure.dlogp.abs().max() < 1e-6 * unsure.dlogp.abs().max()


def test_a_group_of_one_is_plain_cross_entropy():
    found, _, _ = batch([0.7], [1.0], [3])

    wanted = torch.full((3,), 1 / (1 + math.exp(-0.7)) - 1).double()
    torch.testing.assert_close(found.dlogp, wanted, rtol=1e-6, atol=0)


def test_centred_as_in_grpo_scores_are_standardised_and_a_group_of_one_has_no_gradient():
    objective = OutcomeCrossEntropy(centring=Centring.GRPO)
    psi = torch.tensor(PROXIES).double()

    found = scores(PROXIES, objective=objective)
    alone, _, _ = batch([0.7], [1.0], [3], objective=objective)

    assert found == pytest.approx(((psi - psi.mean()) / (psi.std() + 1e-6)).tolist(), rel=1e-6)
    assert alone.dlogp.abs().max() < 1e-6


def test_centred_as_in_grpo_the_gradient_is_autograds_own_of_the_dense_formula():
    objective = OutcomeCrossEntropy(centring=Centring.GRPO)
    psi = torch.tensor(PROXIES, dtype=torch.float64, requires_grad=True)
    score = (psi - psi.mean()) / (psi.std() + 1e-6)
    label = torch.tensor(REWARDS).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(score, label)

    found, _, place = batch(PROXIES, REWARDS, objective=objective)

    (wanted,) = torch.autograd.grad(loss, psi)
    torch.testing.assert_close(found.dlogp, wanted[place], rtol=1e-5, atol=1e-7)


def test_on_policy_a_std_of_zero_leaves_the_direction_and_a_finite_gradient():
    found, _, _ = batch(
        [0.0] * 3, [1.0, 0.0, 0.0], [1] * 3, objective=OutcomeCrossEntropy(centring=Centring.GRPO)
    )

    wanted = torch.tensor([-2 / 9, 1 / 9, 1 / 9]).double() * 1e6
    torch.testing.assert_close(found.dlogp, wanted, rtol=1e-5, atol=0)


def test_uncentred_the_score_is_the_proxy():
    found = scores(PROXIES, objective=OutcomeCrossEntropy(centring=Centring.NONE, beta=2.0))

    assert found == pytest.approx([2 * x for x in PROXIES], abs=1e-6)


def test_the_mean_log_probability_does_not_read_the_old_policy():
    objective = OutcomeCrossEntropy(proxy=Proxy.MEAN_LOGP, centring=Centring.NONE)
    fields = TokenFields(
        weight=torch.ones(3).double(),
        old_logp=torch.full((3,), 9.0).double(),
        extras={LABEL: torch.zeros(3).double(), CLASS_WEIGHT: torch.ones(3).double()},
    )
    stats = torch.stack([torch.tensor([-1.0, -2.0, -3.0]), *torch.zeros(3, 3)]).double()

    found = evaluate(objective, stats, fields, Segmentation(seq=torch.tensor([0, 3])), slice(0, 3))

    assert found.token_loss.tolist() == pytest.approx([math.log1p(math.exp(-2))] * 3)


def test_groups_do_not_see_each_other():
    together, _, _ = batch(PROXIES, REWARDS, groups=[0, 2, 4])
    alone, _, _ = batch(PROXIES[:2], REWARDS[:2], LENGTHS[:2])

    torch.testing.assert_close(together.dlogp[:3], alone.dlogp / 2, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("balance", "wanted"),
    [
        ("question", [2.0, 2 / 3, 2 / 3, 2 / 3]),
        ("only_positive", [1.0, 0.0, 0.0, 0.0]),
        ("only_negative", [0.0, 1.0, 1.0, 1.0]),
        ("none", [1.0] * 4),
    ],
)
def test_class_weights_have_their_known_values(balance, wanted):
    found = labelled(*REWARDS, balance=balance)

    assert [r.extras[CLASS_WEIGHT] for r in found] == pytest.approx(wanted)


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_group_of_one_label_is_not_weighted(reward):
    found = labelled(reward, reward, reward)

    assert [r.extras[CLASS_WEIGHT] for r in found] == [1.0] * 3
    assert [r.extras[LABEL] for r in found] == [reward] * 3


def test_a_completion_that_nobody_could_score_is_left_out():
    found = labelled(1.0, None, 0.0, 0.0)

    assert [r.scored_tokens for r in found] == [2, 0, 2, 2]
    weights = [r.extras[CLASS_WEIGHT] for r in found if r.scored_tokens]
    assert weights == pytest.approx([1.5, 0.75, 0.75])


def test_partial_credit_counts_from_the_bar_on():
    found = labelled(1.0, 0.5, 0.0, correct=0.5)

    assert [r.extras[LABEL] for r in found] == [1.0, 1.0, 0.0]


def test_a_sequence_counts_once_whatever_its_length():
    shape = BatchShape(
        seq_lengths=torch.tensor([2, 5]),
        group_offsets=torch.tensor([0, 2]),
        max_completion_tokens=8,
    )

    assert method("pacs", {}).seq_weights(shape).tolist() == pytest.approx([1 / 4, 1 / 10])
