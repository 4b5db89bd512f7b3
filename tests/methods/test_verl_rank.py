"""Effective ranks of hidden states. Values: notes on the released code, `known_values.py`."""

import json
import math
from dataclasses import replace

import pytest
import torch
from rollouts import rollout_of

from rlvr_fast import config as configs
from rlvr_fast import metrics, models
from rlvr_fast.methods import method
from rlvr_fast.methods.verl_rank import (
    Indicators,
    effective_rank,
    exploration_bonus,
    growth_and_acceleration,
    prefix_ranks,
)
from rlvr_fast.optimise import Optimiser
from rlvr_fast.run import resumed_config, train
from rlvr_fast.scoring import PolicyScorer

OPTIONS = {"stride": 2}
"""So that short completions have prefixes."""


def plain_rank(hidden):
    """By singular values."""
    values = torch.linalg.svdvals(hidden.double() - hidden.double().mean(0))
    share = values / values.sum()
    return float(torch.special.entr(share).sum().exp())


def groups_of(*rewards, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(4, 90, (count,), generator=draw).tolist()

    prompt = ids(4)
    return [
        [rollout_of(ids(9 - i), prompt_ids=prompt, reward=reward) for i, reward in enumerate(each)]
        for each in rewards
    ]


@pytest.fixture(scope="module")
def scorer():
    config = configs.load("tiny", {"method": "verl_rank"})
    model, tokenizer = models.load(models.resolve("tiny"))
    made = Optimiser(config, method("verl_rank", {}), model, vocab_size=len(tokenizer))
    return PolicyScorer(config=config, policy=made.policy, reference=None, step=1)


def after_a_step(scorer, means=None, **options):
    """Running means far below anything that comes, so that there is a bonus."""
    chosen = method("verl_rank", OPTIONS | options)
    chosen.load_state_dict({"means": means or dict.fromkeys(Indicators._fields, 1e-3)})
    return chosen


@pytest.mark.parametrize(
    ("hidden", "wanted"),
    [
        ([[1.0, 0], [2, 0], [5, 0]], 1.0),
        (torch.eye(4).tolist(), 3.0),
        ([[1.0, 0], [-1, 0], [0, 2], [0, -2]], 1.889882),
        ([[3.0, 4.0]], 1.0),
        ([[0.0, 0], [0, 0]], 1.0),
    ],
    ids=["rank one", "identity", "two directions", "one row", "no variance"],
)
def test_an_effective_rank_has_the_published_value(hidden, wanted):
    assert effective_rank(torch.tensor(hidden)) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("shape", [(5, 30), (30, 5), (12, 12), (2, 3)])
def test_either_gram_matrix_gives_what_singular_values_give(shape):
    hidden = 100 + torch.randn(shape)

    assert effective_rank(hidden) == pytest.approx(plain_rank(hidden), rel=1e-6)


@pytest.mark.parametrize("shape", [(41, 12), (9, 64), (13, 13), (3, 4), (4, 4)])
@pytest.mark.parametrize("stride", [1, 4, 5])
def test_ranks_of_prefixes_are_those_of_each_alone(shape, stride):
    hidden = 10 + torch.randn(shape)

    found = prefix_ranks(hidden, stride)

    wanted = [plain_rank(hidden[: t + 1]) for t in range(stride, len(hidden), stride)]
    assert found == pytest.approx(wanted, rel=1e-6)


def test_growth_and_acceleration_have_the_published_values():
    assert growth_and_acceleration([3, 3.6, 3.9, 4.5]) == pytest.approx((0.733333, 0.2), abs=1e-6)


@pytest.mark.parametrize("ranks", [[], [3.0]])
def test_a_completion_of_less_than_two_prefixes_does_not_grow(ranks):
    assert growth_and_acceleration(ranks) == (0, 0)


@pytest.mark.parametrize(
    ("relative", "wanted"), [((0.5, 0.2, 0.0), 0.329746), ((0.5, 0.2, 1.0), 0.430559)]
)
def test_a_bonus_has_the_published_value(relative, wanted):
    assert exploration_bonus(Indicators(*relative)) == pytest.approx(wanted, abs=1e-6)


def test_the_first_step_is_the_parent_and_starts_the_means(scorer):
    chosen, groups = method("verl_rank", OPTIONS), groups_of([1.0, 0.0], [0.0, 1.0, 0.0])
    groups = chosen.advantages(groups)

    assert chosen.shape(groups, scorer) == groups

    seen = [plain_rank(each) for g in scorer.hidden(groups, torch.clone) for each in g]
    mean = chosen.state_dict()["means"]["rank"]
    assert mean == pytest.approx(0.3 * sum(seen) / len(seen), rel=1e-5)


def test_means_decay_and_a_step_is_compared_with_those_before_it(scorer):
    chosen, groups = method("verl_rank", OPTIONS), groups_of([1.0, 0.0])
    groups = chosen.advantages(groups)
    chosen.shape(groups, scorer)
    first = chosen.state_dict()["means"]["rank"]

    (shaped,) = chosen.shape(groups, scorer)

    assert chosen.state_dict()["means"]["rank"] == pytest.approx(first * 1.7)
    # Ranks are 1 / 0.3 of the means: far above.
    lifted = [
        each.advantage[-1] - rollout.advantage
        for each, rollout in zip(shaped, groups[0], strict=True)
    ]
    assert lifted == pytest.approx([abs(rollout.advantage) / 2 for rollout in groups[0]])


@pytest.mark.parametrize("kappa", [1.25, 2.0, 100.0])
def test_the_lift_keeps_every_sign_and_is_bounded(scorer, kappa):
    chosen = after_a_step(scorer, kappa=kappa, broadcast=True)
    groups = chosen.advantages(groups_of([1.0, 0.0, 0.0], [1.0, 1.0, 1.0]))

    shaped = chosen.shape(groups, scorer)

    for after, before in zip(shaped[0], groups[0], strict=True):
        assert after.advantage > before.advantage
        assert after.advantage * before.advantage > 0
        assert after.advantage - before.advantage <= abs(before.advantage) / kappa + 1e-12
    assert shaped[1] == groups[1]


def test_below_the_means_nothing_is_lifted(scorer):
    chosen = after_a_step(scorer, dict.fromkeys(Indicators._fields, 1e6))
    groups = chosen.advantages(groups_of([1.0, 0.0]))

    assert chosen.shape(groups, scorer) == groups


def test_only_the_last_token_the_policy_wrote_is_lifted(scorer):
    chosen = after_a_step(scorer)
    (group,) = chosen.advantages(groups_of([1.0, 0.0]))
    mask = [1] * 6 + [0] * (len(group[1].completion_ids) - 6)
    group[1] = replace(group[1], loss_mask=mask)

    ((first, second),) = chosen.shape([group], scorer)

    for rollout, before, at in ((first, group[0], 8), (second, group[1], 5)):
        lifted = [i for i, a in enumerate(rollout.advantage) if a != before.advantage]
        assert lifted == [at]


def test_growth_is_that_of_the_last_tokens_when_asked(scorer):
    chosen, groups = method("verl_rank", OPTIONS | {"last_tokens": 5}), groups_of([1.0])
    ((hidden,),) = scorer.hidden(groups, torch.clone)

    chosen.shape(chosen.advantages(groups), scorer)

    wanted = growth_and_acceleration(prefix_ranks(hidden[-5:], 2))
    means = chosen.state_dict()["means"]
    assert (means["growth"], means["acceleration"]) == pytest.approx([0.3 * x for x in wanted])
    assert means["rank"] == pytest.approx(0.3 * plain_rank(hidden), rel=1e-5)


def test_an_empty_completion_is_left_alone(scorer):
    chosen = after_a_step(scorer)
    (group,) = chosen.advantages(groups_of([1.0, 0.0]))
    group[1] = replace(group[1], completion_ids=[])

    ((_, second),) = chosen.shape([group], scorer)

    assert second == group[1]
    assert all(map(math.isfinite, chosen.state_dict()["means"].values()))


def test_what_it_remembers_survives_json(scorer):
    chosen, again = method("verl_rank", OPTIONS), method("verl_rank", OPTIONS)
    chosen.shape(chosen.advantages(groups_of([1.0, 0.0])), scorer)

    again.load_state_dict(json.loads(json.dumps(chosen.state_dict())))

    assert again.state_dict() == chosen.state_dict()


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_run_resumes_to_the_same_bits(tmp_path, pipelined):
    given = {
        "method": "verl_rank", "method_options": {"stride": 1, "broadcast": True}, "steps": 4,
        "checkpoint_every": 2, "keep_checkpoints": 3, "trackers": "none", "pipeline": pipelined,
        "mismatch_correction": "token_truncate", "max_completion_tokens": 4,
        "prompts_per_step": 4, "samples_per_prompt": 4, "eval_prompts": 2,
    }  # fmt: skip
    whole = tmp_path / "whole"
    train(configs.load("tiny", given | {"run_folder": str(whole)}))
    part = tmp_path / "part"
    train(configs.load("tiny", given | {"run_folder": str(part)}))
    last = part / "checkpoints" / "step-000004"
    last.rename(tmp_path / "gone")

    train(resumed_config(part, None, {})[0], resume=True)

    file = "model/model.safetensors"
    assert (part / file).read_bytes() == (whole / file).read_bytes()
    states = [
        json.loads((run / "checkpoints/step-000004/state.json").read_text())["method_state"]
        for run in (part, whole)
    ]
    assert states[0] == states[1]
    assert states[0]["means"]["rank"] > 0.3
    assert [row["step"] for row in metrics.read(part)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "value"), [("kappa", 1), ("decay", 0), ("stride", 0), ("last_tokens", 0)]
)
def test_an_option_that_cannot_be_names_wanted_and_got(name, value):
    with pytest.raises(ValueError, match=f"^{name}: wanted .*, got {value}"):
        method("verl_rank", {name: value})
