"""ProGRPO: confidences in prompt and answer. Values: notes on 2602.05281."""

import math
from dataclasses import replace

import pytest
import torch
from known import BACKENDS, TOKEN_MEAN, assert_known, f1
from rollouts import rollout_of

from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.methods import method
from rlvr_fast.methods.progrpo import low_quantile_confidence
from rlvr_fast.optimise import Optimiser
from rlvr_fast.scoring import PolicyScorer

LOGP = [-0.1, -0.2, -2.0, -0.05, -0.3, -0.01, -0.02, -0.4, -1.0, -0.03]


def groups_of(*rewards):
    """One group per list of rewards; prompts and completions of unequal length."""
    draw = torch.Generator().manual_seed(2)

    def ids(count):
        return torch.randint(4, 90, (count,), generator=draw).tolist()

    groups = []
    for index, each in enumerate(rewards):
        prompt = ids(2 + 4 * index)
        groups.append(
            [
                rollout_of(ids(3 + 3 * i), prompt_ids=prompt, index=index, reward=reward)
                for i, reward in enumerate(each)
            ]
        )
    return groups


@pytest.fixture(scope="module")
def scorer():
    config = configs.load("tiny", {"method": "progrpo"})
    model, tokenizer = models.load(models.resolve("tiny"))
    made = Optimiser(config, method("progrpo", {}), model, vocab_size=len(tokenizer))
    return PolicyScorer(config=config, policy=made.policy, reference=None, step=1)


def lifts(scorer, groups, **options):
    """What is added to the parent's advantages."""
    chosen, parent = method("progrpo", options), method("grpo", {})
    with_advantages = parent.advantages(groups)
    shaped = chosen.shape(chosen.advantages(groups), scorer)
    return [
        [mine.advantage - plain.advantage for mine, plain in zip(*both, strict=True)]
        for both in zip(shaped, with_advantages, strict=True)
    ]


@torch.no_grad()
def confidence(model, prompt, completion):
    """Without any of our code: of the completion, and of a prompt's tokens but the first."""
    logp = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].double()
    logp = logp[:, :100].log_softmax(-1)
    start = len(prompt)
    rows = logp[start - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]
    count = math.ceil(len(rows) / 5)
    return float(rows.sort().values[:count].mean().exp())


def test_a_confidence_has_the_published_value():
    assert low_quantile_confidence(torch.tensor(LOGP), 0.2) == pytest.approx(0.22313, abs=5e-6)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (5, 1), (6, 2), (15, 3), (35, 7)])
def test_a_fifth_of_the_tokens_is_rounded_up(length, count):
    logp = -torch.arange(length, dtype=torch.float64)

    found = low_quantile_confidence(logp, 0.2)

    assert math.log(found) == pytest.approx(-(length - 1) + (count - 1) / 2)


def test_no_tokens_are_certain():
    assert low_quantile_confidence(torch.empty(0), 0.2) == 1


def test_the_lift_is_the_difference_of_confidences_under_the_policy(scorer):
    groups, model = groups_of([1.0, 0.0, 1.0], [0.0, 1.0]), scorer.policy.model

    found = lifts(scorer, groups, alpha=0.3)

    for group, each in zip(groups, found, strict=True):
        prompt = group[0].train_prompt_ids
        asked = confidence(model, prompt[:1], prompt[1:])
        answers = [confidence(model, prompt, r.completion_ids) for r in group]
        assert each == pytest.approx([0.3 * (asked - a) for a in answers], abs=1e-6)
        assert max(map(abs, each)) > 1e-4


def test_of_two_correct_answers_the_less_confident_one_is_learnt_more(scorer):
    groups = groups_of([1.0, 0.0, 1.0])
    shaped = method("progrpo", {}).shape(method("progrpo", {}).advantages(groups), scorer)
    prompt = groups[0][0].train_prompt_ids

    first, _, third = shaped[0]

    sure = [
        confidence(scorer.policy.model, prompt, r.completion_ids) for r in (groups[0][0], third)
    ]
    assert sure[0] != sure[1]
    assert (first.advantage > third.advantage) == (sure[0] < sure[1])


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, [True, False, False]),
        ({"applies_to": "some_correct"}, [True, False, True]),
        ({"alpha": 0}, [False, False, False]),
    ],
)
def test_groups_without_variance_are_left_alone(scorer, options, changed):
    groups = groups_of([1.0, 0.0], [0.0, 0.0], [1.0, 1.0])

    found = lifts(scorer, groups, **options)

    assert [any(each) for each in found] == changed


def test_an_answer_without_reward_or_without_trained_tokens_is_left_alone(scorer):
    (group,) = groups_of([1.0, 0.0, None, 1.0])
    group[3] = replace(group[3], loss_mask=[0] * len(group[3].completion_ids))

    (found,) = lifts(scorer, [group])

    assert [bool(lift) for lift in found] == [True, True, False, False]


def test_tokens_the_policy_did_not_write_do_not_count(scorer):
    (group,) = groups_of([1.0, 0.0])
    (said,) = scorer.rollouts([group])
    mask = [0, 1, 1, 0, 0, 1]
    group[1] = replace(group[1], loss_mask=mask)
    (prompt,) = scorer.prompts([group[1].train_prompt_ids])

    (found,) = lifts(scorer, [group])

    own = low_quantile_confidence(said[1].logp[torch.tensor(mask) > 0], 0.2)
    assert found[1] == pytest.approx(0.2 * (low_quantile_confidence(prompt, 0.2) - own), abs=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_its_objective_is_the_published_wider_clip(backend):
    """DAPO's row of F1."""
    gradient = [-0.244281, -0.134064, 0, 0.180967, 0.329744]

    found = f1(method("progrpo", {}).objective(), backend, TOKEN_MEAN)

    assert_known(found, -0.123633, gradient)


@pytest.mark.parametrize(("name", "value"), [("alpha", -0.1), ("fraction", 0), ("fraction", 1.1)])
def test_an_option_that_cannot_be_names_wanted_and_got(name, value):
    with pytest.raises(ValueError, match=f"^{name}: wanted .*, got {value}"):
        method("progrpo", {name: value})
