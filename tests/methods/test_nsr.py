import pytest
import torch
from rewarded import advantages, group

from rlvr_fast import config as configs
from rlvr_fast.methods import method
from rlvr_fast.tracing.tokens import TokenFields, Tokens


def judged(rewards, **options):
    (found,) = method("nsr", options).advantages([group(*rewards, lengths=[2, 3, 4, 5])])
    return [r.advantage for r in found], [r.scored_tokens for r in found]


@pytest.mark.parametrize(
    ("keep", "advantage", "tokens"),
    [
        ("negative", [0, -1, 0, -1], [0, 3, 0, 5]),
        ("positive", [1, 0, 0, 0], [2, 0, 0, 0]),
        ("weighted", [0.1, -1, 0, -1], [2, 3, 0, 5]),
    ],
)
def test_what_is_left_out_has_no_token_in_the_mean(keep, advantage, tokens):
    """The third has no reward."""
    assert judged([1, 0, None, 0], keep=keep) == (advantage, tokens)


def test_a_baseline_is_nowhere():
    """Groups that are right or wrong as a whole teach as much as others."""
    assert advantages("nsr", group(0, 0), group(0, 1)) == [-1, -1, -1, 0]


def test_a_weight_of_one_is_reinforce_and_of_zero_has_the_wrong_answers_alone():
    rewards = [1, 0, 0, 1]

    one, _ = judged(rewards, keep="weighted", positive_weight=1.0)
    zero, _ = judged(rewards, keep="weighted", positive_weight=0.0)
    negative, _ = judged(rewards, keep="negative")

    assert one == [1, -1, -1, 1]
    assert zero == negative == [0, -1, -1, 0]


def test_the_threshold_says_what_is_right():
    assert judged([0.5, 0.6, 0.4, 1], keep="weighted")[0] == [-1, 0.1, -1, 0.1]
    assert judged([0.5, 0.6, 0.4, 1], keep="weighted", right_above=0.45)[0] == [0.1, 0.1, -1, 0.1]


def test_a_wrong_answer_gives_its_probability_to_the_others_in_proportion():
    """Source: 2506.01347; at ratio 1, `dloss/dlogits = (1 - pi_y, -pi_v)`."""
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    logp = logits.log_softmax(0)[:1]
    fields = TokenFields(
        weight=torch.ones(1),
        old_logp=logp.detach(),
        advantage=torch.tensor(judged([0, 0, 0, 0])[0][:1]).double(),
        extras={},
    )

    method("nsr", {}).objective().token_loss(Tokens(logp, torch.zeros(1), fields)).sum().backward()

    torch.testing.assert_close(logits.grad, torch.tensor([0.5, -0.3, -0.2], dtype=torch.float64))


def test_the_papers_entropy_bonus_is_the_default_and_can_be_replaced():
    plain = {"model": "tiny", "task": "addition", "method": "nsr", "run_folder": "unused"}

    assert configs.from_values(plain).entropy_coef == 1e-4
    assert configs.from_values({**plain, "entropy_coef": 0.0}).entropy_coef == 0
