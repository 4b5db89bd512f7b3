"""RAPO: forward KL to a power of the reference that falls with the reward."""

import math
from dataclasses import replace

import pytest
import torch
from rollouts import rollout_of
from transformers import AutoModelForCausalLM

from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.methods import method
from rlvr_fast.methods.rapo import FlattenedReferenceKL
from rlvr_fast.objectives import ClippedSurrogate
from rlvr_fast.ops import logprobs
from rlvr_fast.ops.fused_rows import fused_rows
from rlvr_fast.ops.objective_rows import Segmentation, evaluate
from rlvr_fast.optimise import Optimiser
from rlvr_fast.scoring import PolicyScorer
from rlvr_fast.tracing.level import Level, level
from rlvr_fast.tracing.tokens import TokenFields
from rlvr_fast.tracing.trace import trace

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
KNOWN = {1.0: 0.274887, 0.5: 0.157228, 0.0: 0.070240}
"""KL(reference^power, normalised || policy), from `known_values.py`."""


def enumerated(objective, backend, power, *, normalised=True, policy=POLICY):
    """The loss and the logits' gradient, every token once with its own probability as weight."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    log_normaliser = (REFERENCE**power).sum().log() if normalised else torch.tensor(0.0)
    fields = TokenFields(
        weight=policy.to(dtype),
        ref_logp=REFERENCE.log().to(dtype),
        advantage=torch.zeros(3, dtype=dtype),
        extras={
            "power": torch.full((3,), power, dtype=dtype),
            "log_normaliser": log_normaliser.to(dtype).expand(3).contiguous(),
        },
    )
    logits = policy.log().to(dtype).expand(3, -1).contiguous()
    targets, out = torch.arange(3), torch.empty_like(logits)
    if backend == "triton":
        rows = fused_rows(
            logits, targets, fields, None, objective, trace(objective), scale=1.0, cap=0.0, out=out
        )
        return float((fields.weight * rows[2]).sum()), out.sum(0)
    stats = logprobs.BACKENDS[backend](logits, targets, 1.0, 0.0)
    said = evaluate(objective, stats, fields, Segmentation(), slice(0, 3))
    logprobs.GRAD_BACKENDS[backend](
        logits, targets, stats, said.dlogp, said.dentropy, 1.0, 0.0, out
    )
    return float((fields.weight * said.token_loss).sum()), out.sum(0)


def flattened(power):
    return REFERENCE**power / (REFERENCE**power).sum()


@pytest.mark.parametrize("backend", logprobs.BACKENDS)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("power", KNOWN)
def test_the_mean_over_the_policy_is_the_published_kl(backend, exact, power):
    loss, _ = enumerated(FlattenedReferenceKL(coef=1.0, exact=exact), backend, power)

    assert loss == pytest.approx(KNOWN[power], abs=2e-6)


@pytest.mark.parametrize("backend", logprobs.BACKENDS)
@pytest.mark.parametrize("power", KNOWN)
def test_the_mean_of_the_exact_gradient_is_that_of_the_kl(backend, power):
    _, gradient = enumerated(FlattenedReferenceKL(coef=1.0, exact=True), backend, power)

    logits = POLICY.log().requires_grad_()
    q = flattened(power)
    (q * (q.log() - logits.log_softmax(0))).sum().backward()
    torch.testing.assert_close(gradient.double(), logits.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", logprobs.BACKENDS)
def test_the_estimate_as_it_stands_has_the_gradient_of_another_function(backend):
    """`-x log x dlogp`, which is not the KL's; both push towards q."""
    _, gradient = enumerated(FlattenedReferenceKL(coef=1.0), backend, 0.5)

    x = flattened(0.5) / POLICY
    dlogp = torch.eye(3) - POLICY
    wanted = ((-x * x.log() * POLICY)[:, None] * dlogp).sum(0)
    torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_a_policy_that_is_the_flattened_reference_costs_nothing(exact):
    objective = FlattenedReferenceKL(coef=1.0, exact=exact)

    loss, gradient = enumerated(objective, "reference", 0.5, policy=flattened(0.5))

    assert loss == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max() < 1e-12


def test_without_a_normaliser_the_estimate_is_never_below_0_and_not_the_kl():
    loss, _ = enumerated(FlattenedReferenceKL(coef=1.0), "reference", 0.5, normalised=False)

    x = REFERENCE**0.5 / POLICY
    assert loss == pytest.approx(float((POLICY * (x * x.log() - x + 1)).sum()))
    assert loss > KNOWN[0.5]


@pytest.mark.parametrize(
    ("reward", "power"),
    [(1.0, 1.0), (0.0, 0.5), (0.5, 0.75), (-1.0, 0.5), (3.0, 1.0), (None, 1.0)],
)
def test_the_power_rises_with_the_reward(reward, power):
    assert method("rapo", {}).power(reward) == power


def test_without_the_kl_it_is_grpo():
    chosen, grpo = method("rapo", {"kl_weight": 0.0}), method("grpo", {})

    assert chosen.objective() == grpo.objective() == ClippedSurrogate()
    assert configs.load("tiny", {"method": "rapo"}).entropy_coef == 0.1
    assert chosen.settings == {"entropy_coef": 0.001}


@pytest.mark.parametrize("gradient", ["pathwise", "exact"])
def test_the_objective_runs_in_the_single_pass(gradient):
    objective = method("rapo", {"gradient": gradient}).objective()

    assert level(objective) is Level.TOKEN
    assert trace(objective) is not None


def test_log_ratios_of_60_leave_everything_finite():
    for exact in (False, True):
        for policy in ([1 - 1e-26, 5e-27, 5e-27], [5e-27, 5e-27, 1 - 1e-26]):
            loss, gradient = enumerated(
                FlattenedReferenceKL(exact=exact), "cpp", 1.0, policy=torch.tensor(policy).double()
            )
            assert math.isfinite(loss)
            assert gradient.isfinite().all()


TEMPERATURE = 0.7


def batch():
    torch.manual_seed(0)
    groups = []
    for rewards in ([1.0, 0.0, None], [0.5, 0.0]):
        ids = torch.randint(4, 99, (4,)).tolist()
        groups.append(
            [
                rollout_of(
                    torch.randint(4, 99, (n + 1,)).tolist(),
                    prompt_ids=ids,
                    reward=reward,
                    advantage=0.0,
                )
                for n, reward in enumerate(rewards)
            ]
        )
    return groups


def optimiser(options, **settings):
    config = configs.load("tiny", {"entropy_coef": 0.0, **settings})
    path = models.resolve("tiny")
    model, tokenizer = models.load(path)
    reference = models.load(path)[0].requires_grad_(False)
    chosen = method("rapo", options)
    return Optimiser(config, chosen, model, reference, vocab_size=len(tokenizer))


@pytest.mark.parametrize("wrong", [0.5, 0.0])
def test_the_normaliser_is_that_of_the_whole_row_of_the_reference(wrong):
    """The oracle: Hugging Face's own logits in fp64, one sequence at a time."""
    made = optimiser({"power_wrong": wrong}, temperature=TEMPERATURE, tokens_per_microbatch=16)
    scorer = PolicyScorer(config=made._config, policy=made.policy, reference=made.reference, step=1)

    shaped = made._method.shape(batch(), scorer)

    theirs = AutoModelForCausalLM.from_pretrained(models.resolve("tiny"), dtype=torch.float64)
    seen = set()
    for rollout in (each for group in shaped for each in group):
        power, found = rollout.extras["power"], rollout.extras["log_normaliser"]
        seen.add(power)
        ids = torch.tensor([[*rollout.train_prompt_ids, *rollout.completion_ids]])
        with torch.no_grad():
            logits = theirs(ids).logits[0, len(rollout.train_prompt_ids) - 1 : -1, :100]
        wanted = (power * (logits / TEMPERATURE).log_softmax(-1)).logsumexp(-1).tolist()
        assert (found if power != 1 else [found] * len(wanted)) == pytest.approx(wanted, abs=1e-5)
    assert seen == {1.0, wrong, wrong + 0.5 * (1 - wrong)}


@pytest.mark.parametrize("options", [{"normaliser": "none"}, {"kl_weight": 0.0}])
def test_no_further_forward_where_no_normaliser_is_wanted(options):
    shaped = method("rapo", options).shape(batch(), scorer=None)

    assert {each.extras["log_normaliser"] for group in shaped for each in group} == {0.0}


def test_only_wrong_answers_move_a_policy_that_is_the_reference():
    """Without any advantage, so that nothing but the KL acts."""
    read = {}
    for reward in (0.0, 1.0):
        options = {"kl_weight": 10.0, "power_wrong": 0.0}
        made = optimiser(options, learning_rate=1e-3, temperature=TEMPERATURE)
        groups = [[replace(r, reward=reward) for r in group] for group in batch()]
        read[reward] = [made.update(groups, step) for step in range(1, 9)]

    assert read[1.0][0]["grad_norm"] < 1e-4 < 1e-1 < read[0.0][0]["grad_norm"]
    assert read[0.0][-1]["loss"] < 0.1 * read[0.0][0]["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power_wrong": 1.5}, r"^power_wrong: wanted a number in \[0, 1\], got 1.5$"),
        ({"kl_weight": -1.0}, r"^kl_weight: wanted >= 0, got -1.0$"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        method("rapo", options)
