"""CANON: halves of a group by entropy or length. Values: notes on 2509.23962 and its code."""

from dataclasses import replace

import pytest
import torch
from rollouts import rollout_of

from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.methods import method
from rlvr_fast.methods.base import BatchShape
from rlvr_fast.methods.canon import conditional_advantages
from rlvr_fast.optimise import Optimiser
from rlvr_fast.scoring import PolicyScorer

REWARDS, METRIC = [1.0, 0.0, 1.0, 1.0], [0.1, 0.2, 0.5, 0.6]


def groups_of(*rewards, seed=0):
    """Two groups of the same rewards; completions of 1, 3, 5 ... tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [
        [
            rollout_of(
                torch.randint(4, 90, (1 + 2 * i,), generator=draw).tolist(),
                prompt_ids=[5, 9, 33],
                reward=reward,
            )
            for i, reward in enumerate(rewards)
        ]
        for _ in range(2)
    ]


def scorer_of(chosen, *, step=1, steps=10):
    config = configs.load("tiny", {"method": "canon", "steps": steps})
    model, tokenizer = models.load(models.resolve("tiny"))
    policy = Optimiser(config, chosen, model, vocab_size=len(tokenizer)).policy
    return PolicyScorer(config=config, policy=policy, reference=None, step=step)


def shaped(chosen, groups, **at):
    found = chosen.shape(chosen.advantages(groups), scorer_of(chosen, **at))
    return [[each.advantage for each in group] for group in found]


@pytest.mark.parametrize(
    ("mu", "wanted"),
    [
        (0.0, [0.5, -0.5, 0.0, 0.0]),
        (0.5, [0.25, -0.75, 0.25, 0.25]),
        (1.0, [0.0, -1.0, 0.5, 0.5]),
    ],
)
def test_advantages_are_the_published_ones(mu, wanted):
    assert conditional_advantages(REWARDS, METRIC, mu=mu) == pytest.approx(wanted)


def test_alpha_and_beta_act_as_published():
    """Halves (1, 0) and (1, 1): means 0.5 and 1; by hand from the two published forms."""
    by_entropy = conditional_advantages(REWARDS, METRIC, mu=1.0, gain_low=0.5, beta=0.1)
    by_length = conditional_advantages(REWARDS, METRIC, mu=1.0, gain_high=0.5, beta=0.1)

    assert by_entropy == pytest.approx([0.5 - 1 - 0.1, -1 - 0.1, 1 - 0.25 + 0.1, 1 - 0.25 + 0.1])
    assert by_length == pytest.approx([1 - 0.5 - 0.1, -0.5 - 0.1, 0.5 - 0.5 + 0.1, 0.5 - 0.5 + 0.1])


def test_a_metric_counts_by_its_order_only():
    stretched = [x**3 - 7 for x in METRIC]

    found, plain = (conditional_advantages(REWARDS, m, mu=0.3) for m in (stretched, METRIC))

    assert found == plain


@pytest.mark.parametrize("metric", ["entropy", "length"])
def test_half_and_half_is_the_parent(metric):
    groups = groups_of(1.0, 0.0, 0.0, 1.0, 1.0, 0.0)
    chosen = method("canon", {"metric": metric, "schedule": "constant", "mu": 0.5})

    found = shaped(chosen, groups)

    parent = method("dr_grpo", {}).advantages(groups)
    wanted = [[each.advantage for each in group] for group in parent]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-7)
    shape = BatchShape(
        seq_lengths=torch.tensor([3, 1]),
        group_offsets=torch.tensor([0, 2]),
        max_completion_tokens=8,
    )
    assert torch.equal(chosen.seq_weights(shape), method("dr_grpo", {}).seq_weights(shape))


def test_entropies_are_the_policys_and_halve_the_group():
    groups = groups_of(1.0, 0.0, 0.0, 1.0)
    chosen = method("canon", {"schedule": "constant", "mu": 1.0})
    scores = scorer_of(chosen).rollouts(groups)

    found = shaped(chosen, groups)

    for group, each, advantages in zip(groups, scores, found, strict=True):
        entropy = [float(x.entropy.mean()) for x in each]
        wanted = conditional_advantages([r.reward for r in group], entropy, mu=1.0)
        assert advantages == pytest.approx(wanted)
        assert entropy != sorted(entropy)  # so that another metric would halve it otherwise


def test_tokens_the_policy_did_not_write_have_no_entropy():
    chosen = method("canon", {"schedule": "constant", "mu": 1.0})
    (group, _) = groups_of(1.0, 0.0, 0.0, 1.0)
    said = scorer_of(chosen).rollouts([group])[0]
    # Of the longest only the token of the lowest entropy is left.
    kept = [int(x == said[3].entropy.min()) for x in said[3].entropy]
    masked = [*group[:3], replace(group[3], loss_mask=kept)]

    found = shaped(chosen, [masked])[0]

    entropy = [float(x.entropy.mean()) for x in said[:3]] + [float(said[3].entropy.min())]
    wanted = conditional_advantages([r.reward for r in group], entropy, mu=1.0)
    assert found == pytest.approx(wanted)


def test_lengths_need_no_model_and_short_answers_gain():
    (group, _) = groups_of(1.0, 1.0, 1.0, 1.0)
    options = {"metric": "length", "schedule": "constant", "mu": 1.0, "alpha": 0.9}
    chosen = method("canon", options)

    (found,) = chosen.advantages([group])

    assert [each.advantage for each in found] == pytest.approx([0.1, 0.1, -0.1, -0.1])
    assert chosen.shape([found], None) == [found]


def test_a_completion_nobody_could_score_is_in_no_half():
    groups = groups_of(1.0, None, 0.0, 1.0, 1.0)
    chosen = method("canon", {"metric": "length", "schedule": "constant", "mu": 1.0})

    (found, _) = chosen.advantages(groups)

    without = conditional_advantages([1.0, 0.0, 1.0, 1.0], [0, 1, 2, 3], mu=1.0)
    advantages = [each.advantage for each in found]
    assert advantages[1] == 0
    assert [advantages[i] for i in (0, 2, 3, 4)] == pytest.approx(without)


def test_penalties_come_off_the_rewards():
    (group, _) = groups_of(1.0, 1.0)
    chosen = method("canon", {"metric": "length", "schedule": "constant", "mu": 1.0})

    (found,) = chosen.advantages([[group[0], replace(group[1], penalty=0.25)]])

    assert [each.advantage for each in found] == pytest.approx([0.25, -0.25])


def test_whoever_of_equals_came_first_does_not_matter():
    rewards, completions = [1.0, 0.0, 0.0], [[5, 6], [5, 7], [4, 9]]
    group = [rollout_of(ids, reward=r) for r, ids in zip(rewards, completions, strict=True)]
    chosen = method("canon", {"metric": "length", "schedule": "constant", "mu": 1.0})

    found = [chosen.advantages([each])[0] for each in (group, group[::-1])]

    assert found[0] == found[1][::-1]


def test_a_group_of_one_has_no_advantage():
    assert conditional_advantages([1.0], [0.5], mu=0.5) == [0.0]


def test_the_accuracy_of_the_batch_is_the_weight_of_the_other_half():
    groups = [groups_of(1.0, 0.0, 1.0, 1.0)[0], groups_of(0.0, 0.0, 1.0, 0.0)[0]]
    by_accuracy = method("canon", {"metric": "length"}).advantages(groups)

    constant = {"metric": "length", "schedule": "constant", "mu": 0.5}
    assert by_accuracy == method("canon", constant).advantages(groups)


@pytest.mark.parametrize(
    ("schedule", "step", "mu"),
    [
        ("cosine", 1, 0.0),
        ("cosine", 16, 0.3),
        ("cosine", 31, 0.6),
        ("cosine", 51, 0.3),
        ("cosine", 71, 0.6),
        ("cosine", 91, 0.3),
        ("reversed_cosine", 16, 0.0),
        ("reversed_cosine", 31, 0.0),
        ("reversed_cosine", 51, 0.3),
        ("reversed_cosine", 71, 0.0),
    ],
)
def test_a_cosine_warms_up_falls_and_starts_again(schedule, step, mu):
    """150 steps, 30 of them warm-up, then three cycles of 40."""
    groups = groups_of(1.0, 0.0, 1.0, 1.0)
    chosen = method("canon", {"metric": "length", "schedule": schedule})

    found = shaped(chosen, groups, step=step, steps=150)

    assert found[0] == pytest.approx(conditional_advantages(REWARDS, METRIC, mu=mu), abs=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mu", 1.5), ("alpha", -1), ("warmup", 1), ("cycles", 0), ("peak", -0.1), ("beta", "nan")],
)
def test_an_option_that_cannot_be_names_wanted_and_got(name, value):
    with pytest.raises(ValueError, match=f"^{name}: wanted .*, got "):
        method("canon", {name: value})
