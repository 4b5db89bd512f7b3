import pytest
import torch
from rewarded import FIXTURE, advantages, group

from rlvr_fast.methods import method
from rlvr_fast.methods.noisy_verifier import false_negative_rate
from rlvr_fast.tracing.tokens import TokenFields, Tokens

RHO0, RHO1 = 0.1, 0.2
RATES = {"false_positive_rate": RHO0, "false_negative_rate": RHO1}


def corrected(correction, **options):
    """For a rejected and an accepted answer."""
    return advantages(
        "noisy_verifier", group(0, 1), correction=correction, where="advantage", **options
    )


@pytest.mark.parametrize(
    ("correction", "wrong", "right"), [("backward", 0.0, 1.0), ("forward", -0.7, 0.0)]
)
def test_the_mean_over_the_verifiers_errors_is_known(correction, wrong, right):
    """Source: 2510.00915; the corrected outcome of a truly wrong and a truly right answer."""
    rejected, accepted = corrected(correction, **RATES)

    assert (1 - RHO0) * rejected + RHO0 * accepted == pytest.approx(wrong, abs=1e-12)
    assert RHO1 * rejected + (1 - RHO1) * accepted == pytest.approx(right, abs=1e-12)


def test_without_errors_outcomes_stay_and_only_wrong_answers_count_forward():
    assert corrected("backward") == [0, 1]
    assert corrected("forward") == [-1, 0]


@pytest.mark.parametrize(("correction", "share"), [("backward", 1.0), ("forward", 1 - RHO0 - RHO1)])
def test_the_expected_gradient_is_that_of_a_faultless_verifier(correction, share):
    """All answers of three, of which the first and the last are right, and all verdicts."""
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(0)
    truth = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    accepts = (1 - RHO1) * truth + RHO0 * (1 - truth)
    loss = torch.zeros((), dtype=torch.float64)
    for verdict, value in enumerate(corrected(correction, **RATES)):
        chance = accepts if verdict else 1 - accepts
        fields = TokenFields(
            weight=torch.ones(3),
            old_logp=logp.detach(),
            advantage=torch.full((3,), value, dtype=torch.float64),
            extras={},
        )
        said = method("noisy_verifier", {}).objective()
        of_answers = said.token_loss(Tokens(logp, torch.zeros(3), fields))
        loss = loss + (logp.exp().detach() * chance * of_answers).sum()

    (found,) = torch.autograd.grad(-loss, logits, retain_graph=True)
    (clean,) = torch.autograd.grad((logp.exp() * truth).sum(), logits)

    torch.testing.assert_close(found, share * clean, rtol=0, atol=1e-12)


def test_a_mean_scales_the_correction_and_a_standard_deviation_undoes_it():
    by_mean = advantages("noisy_verifier", group(*FIXTURE), **RATES)
    by_std = advantages("noisy_verifier", group(*FIXTURE), norm="std", **RATES)

    assert by_mean == pytest.approx([x / 0.7 for x in (0.6, -0.4, -0.4, 0.6, -0.4)])
    assert by_std == pytest.approx(advantages("grpo", group(*FIXTURE)), abs=3e-6)


@pytest.mark.parametrize("correction", ["backward", "forward"])
def test_what_nobody_could_score_has_no_advantage(correction):
    found = advantages("noisy_verifier", group(1, None, 0), correction=correction, **RATES)

    assert found[1] == 0
    assert found[0] - found[2] == pytest.approx(1.0 if correction == "forward" else 1 / 0.7)


def test_a_verifier_no_better_than_chance_is_refused():
    with pytest.raises(ValueError, match=r"^false_positive_rate: wanted below 1 together with"):
        method("noisy_verifier", {"false_positive_rate": 0.4, "false_negative_rate": 0.6})


def test_forward_weights_are_no_rewards():
    with pytest.raises(ValueError, match=r"^where: wanted advantage with correction = forward"):
        method("noisy_verifier", {"correction": "forward", "where": "reward"})


def test_appeals_find_the_rate():
    """80 of 100 right answers were accepted; half of the others were looked at again."""
    assert false_negative_rate(80, 10, 0.5) == pytest.approx(0.2)
    assert false_negative_rate(80, 10, 0.5, before=0.4, decay=0.75) == pytest.approx(0.35)
    assert false_negative_rate(0, 0, 0.1) == 0
    with pytest.raises(ValueError, match=r"^share: wanted in \(0, 1\], got 0$"):
        false_negative_rate(1, 1, 0)
