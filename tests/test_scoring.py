"""What a scorer says, against stock transformers in fp64 on one sequence at a time.

Run as a program, this file is one of two processes that share a model.
"""

import copy
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from ranks import run_two
from rollouts import rollout_of
from small_models import KINDS, model_of
from torch.distributed.tensor import DTensor

from rlvr_fast import config as configs
from rlvr_fast import lora, models, parallel
from rlvr_fast.config import TrainConfig
from rlvr_fast.methods.grpo import GRPO
from rlvr_fast.methods.scores import Scores
from rlvr_fast.objectives import Objective, importance_ratio
from rlvr_fast.optimise import Optimiser
from rlvr_fast.packed import Sample, pack
from rlvr_fast.parallel import ALONE, World
from rlvr_fast.policy import Policy
from rlvr_fast.scoring import PolicyScorer

VOCABULARY = 47
"""Three less than the embedding has rows."""
SHAPES = [(3, [4, 0, 7]), (12, [2]), (1, [5, 1, 9])]
"""Tokens of a prompt and of its completions."""


def groups_of(shapes=SHAPES, *, vocabulary=VOCABULARY):
    draw = torch.Generator().manual_seed(1)

    def ids(count):
        return torch.randint(3, vocabulary, (count,), generator=draw).tolist()

    groups = []
    for index, (length, completions) in enumerate(shapes):
        prompt = ids(length)
        groups.append(
            [
                # Nobody scores what was completed.
                rollout_of(ids(count), prompt_ids=prompt, index=index, gen_prompt_ids=[1])
                for count in completions
            ]
        )
    return groups


def scorer_of(model, reference=None, *, vocabulary=VOCABULARY, **overrides):
    config = configs.load("tiny", overrides)
    policy, frozen = (
        None if each is None else Policy(config, each, vocab_size=vocabulary)
        for each in (model, reference)
    )
    return PolicyScorer(config=config, policy=policy, reference=frozen, step=1)


@torch.no_grad()
def stock(model, rollout, *, temperature=1.0, min_p=0.0):
    """`Scores` in fp64, without any of our code."""
    wide = copy.deepcopy(model).double()
    tokens = torch.tensor([[*rollout.train_prompt_ids, *rollout.completion_ids]])
    first, count = len(rollout.train_prompt_ids) - 1, len(rollout.completion_ids)
    logits = wide(input_ids=tokens).logits[0, first : first + count, :VOCABULARY] / temperature
    logp = logits.log_softmax(-1)
    p = logp.exp()
    top = p.max(-1, keepdim=True).values if count else p[:, :1]
    return Scores(
        logp=logp.gather(1, torch.tensor(rollout.completion_ids, dtype=torch.int64)[:, None])[:, 0],
        entropy=-(p * logp).sum(-1),
        mean_logit=logits.mean(-1),
        logsumexp=logits.logsumexp(-1),
        sum_squared_prob=(p * p).sum(-1),
        kept_mass=torch.where(p >= min_p * top, p, 0).sum(-1),
        max_prob=top[:, 0],
    )


def assert_scores(found, model, groups, **settings):
    assert [len(each) for each in found] == [len(group) for group in groups]
    for group, each in zip(groups, found, strict=True):
        for rollout, scores in zip(group, each, strict=True):
            for name, value, wanted in zip(
                Scores._fields, scores, stock(model, rollout, **settings), strict=True
            ):
                assert value.dtype == torch.float32
                assert not value.requires_grad
                assert value.shape == wanted.shape == (len(rollout.completion_ids),)
                torch.testing.assert_close(
                    value.double(), wanted, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("budget", [1, 15, 8192])
@pytest.mark.parametrize("kind", [*KINDS, "tiny"])
def test_scores_are_the_models_own_in_the_order_of_the_rollouts(kind, budget):
    model = models.load(models.resolve("tiny"))[0] if kind == "tiny" else model_of(kind)
    groups = groups_of()

    found = scorer_of(model, tokens_per_microbatch=budget).rollouts(groups, min_p=0.3)

    assert_scores(found, model, groups, min_p=0.3)


@pytest.mark.parametrize("given", [None, 1.6])
def test_the_temperature_is_the_configs_unless_another_is_given(given):
    model, groups = model_of("Qwen2"), groups_of()

    found = scorer_of(model, temperature=0.7).rollouts(groups, temperature=given)

    assert_scores(found, model, groups, temperature=given or 0.7)


def test_the_reference_scores_when_it_is_asked_for():
    model, reference, groups = model_of("Llama"), model_of("Llama", seed=1), groups_of()
    scorer = scorer_of(model, reference)

    assert_scores(scorer.rollouts(groups, reference=True), reference, groups)
    assert_scores(scorer.rollouts(groups), model, groups)


@pytest.mark.parametrize("share", [False, True])
def test_prompts_of_their_own_in_one_group_and_empty_groups_are_scored(share):
    model, (group, other, _) = model_of("Llama"), groups_of()
    group[1:] = [replace(group[1], completion_ids=[5, 6], train_prompt_ids=[9, 8, 7, 6]), group[2]]

    found = scorer_of(model, share_prompts=share).rollouts([[], group, [], other])

    assert_scores(found, model, [[], group, [], other])


def test_a_prompt_has_a_log_probability_for_every_token_but_the_first():
    model, prompts = model_of("Qwen3"), [[5, 9, 33, 12], [7], [40, 3], (6, 6, 6)]

    found = scorer_of(model, tokens_per_microbatch=4).prompts(prompts)

    for prompt, logp in zip(prompts, found, strict=True):
        wanted = stock(model, rollout_of(prompt[1:], prompt_ids=prompt[:1])).logp
        torch.testing.assert_close(logp.double(), wanted, rtol=2e-5, atol=2e-5)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match=r"^prompt_ids: wanted at least one token, got none$"):
        scorer_of(model_of("Llama")).prompts([[3, 4], []])


def test_nothing_at_all_has_no_scores():
    scorer = scorer_of(model_of("Llama"))

    assert scorer.rollouts([]) == scorer.prompts([]) == scorer.hidden([], len) == []


@pytest.mark.parametrize("budget", [1, 8192])
def test_hidden_states_are_those_that_predict_each_token(budget):
    model, groups = model_of("Llama"), groups_of()

    found = scorer_of(model, tokens_per_microbatch=budget).hidden(groups, torch.clone)

    wide = copy.deepcopy(model).double()
    for group, each in zip(groups, found, strict=True):
        for rollout, hidden in zip(group, each, strict=True):
            tokens = torch.tensor([[*rollout.train_prompt_ids, *rollout.completion_ids]])
            first, count = len(rollout.train_prompt_ids) - 1, len(rollout.completion_ids)
            with torch.no_grad():
                wanted = wide.get_decoder()(input_ids=tokens).last_hidden_state[0]
            assert hidden.dtype == torch.float32
            assert not hidden.requires_grad
            torch.testing.assert_close(
                hidden.double(), wanted[first : first + count], rtol=2e-5, atol=2e-5
            )


def test_statistics_lie_beside_the_tokens_of_a_pack():
    model, groups = model_of("Qwen2"), groups_of()
    packed = pack(
        [
            [Sample(prompt_ids=r.train_prompt_ids, completion_ids=r.completion_ids) for r in group]
            for group in groups
        ]
    )

    found = scorer_of(model).statistics(packed, min_p=0.2)

    wanted = [stock(model, rollout, min_p=0.2) for group in groups for rollout in group]
    for name in Scores._fields:
        flat = torch.cat([getattr(each, name) for each in wanted])
        torch.testing.assert_close(getattr(found, name).double(), flat, rtol=2e-5, atol=2e-5)
    assert found.top_id.max() < VOCABULARY


def test_scoring_leaves_weights_gradients_and_generators_alone():
    model, groups = model_of("Llama"), groups_of()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    scorer = scorer_of(model, precision="bf16")

    scores = scorer.rollouts(groups)
    scorer.prompts([[1, 2, 3]])
    scorer.hidden(groups, torch.clone)

    assert scores[0][0].logp.dtype == torch.float32
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_under_adapters_the_reference_is_the_model_without_them():
    pytest.importorskip("peft", reason="adapters need it; the test extra installs it")
    model, groups = model_of("Llama"), groups_of()
    plain = copy.deepcopy(model)
    lora.wrap(model, rank=4, alpha=8.0)
    for name, parameter in lora.trained(model):
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1)
    merged = copy.deepcopy(plain)
    merged.load_state_dict(dict(lora.named_weights(model)))
    scorer = replace(
        scorer_of(model),
        reference=Policy(
            configs.load("tiny"), model, vocab_size=VOCABULARY, adapters=False
        ),
    )  # fmt: skip

    assert_scores(scorer.rollouts(groups, reference=True), plain, groups)
    assert_scores(scorer.rollouts(groups), merged, groups)


@dataclass(frozen=True, kw_only=True)
class Looking(Objective):
    """Reads what `shape` and `prepare` have found."""

    def token_loss(self, t):
        since = importance_ratio(t.extras["now"], t.extras["before"])
        return -importance_ratio(t.logp, t.extras["now"]) * since * t.advantage


@dataclass(frozen=True, kw_only=True)
class Looks(GRPO):
    def shape(self, groups, scorer):
        scores = scorer.rollouts(groups)
        return [
            [
                replace(rollout, extras={"before": found.logp.tolist()})
                for rollout, found in zip(*both, strict=True)
            ]
            for both in zip(groups, scores, strict=True)
        ]

    def prepare(self, packs, scorer, update):
        prepared = []
        for packed in packs:
            extras = {**packed.scored.extras, "now": scorer.statistics(packed).logp}
            prepared.append(replace(packed, scored=replace(packed.scored, extras=extras)))
        return prepared

    def objective(self):
        return Looking()


def trained(world: World, split: bool):
    """Scores before and after two updates whose method scores, and what the updates said."""
    config = TrainConfig(
        model="tiny", task="addition", method="grpo", run_folder="x", precision="fp32",
        updates_per_batch=2, learning_rate=1e-3, tokens_per_microbatch=12,
    )  # fmt: skip
    model, tokenizer = models.load(models.resolve("tiny"))
    if split:
        parallel.split(model, world)
    made = Optimiser(config, Looks(), model, vocab_size=len(tokenizer), world=world)
    groups = [
        [replace(r, advantage=i - 0.7) for i, r in enumerate(group) if r.completion_ids]
        for group in groups_of([(3, [4, 6]), (12, [2, 8]), (1, [5, 1, 9])])
    ]
    scorer = PolicyScorer(config=config, policy=made.policy, reference=None, step=1)
    found = {"before": scores(scorer, groups)}
    found["kept"] = all(isinstance(p, DTensor) == split for p in model.parameters())
    read = made.update(groups, step=1)
    found["read"] = [read[name] for name in ("loss", "grad_norm", "entropy")]
    found["after"] = scores(scorer, groups)
    return found


def scores(scorer, groups):
    read = [x for each in scorer.rollouts(groups) for found in each for x in found]
    read += scorer.prompts([rollout.train_prompt_ids for (rollout, *_) in groups])
    return torch.cat([*read, *(h for each in scorer.hidden(groups, torch.flatten) for h in each)])


def main(out: str) -> None:
    torch.set_num_threads(1)
    with parallel.join("cpu") as world:
        found = [trained(world, split) for split in (False, True)]
        world.barrier()
    torch.save(found, out)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of the two found."""
    outs = run_two(__file__, tmp_path_factory.mktemp("ranks"))
    return [torch.load(out) for out in outs]


@pytest.mark.parametrize("split", [False, True])
def test_two_ranks_score_and_update_like_one_process(processes, split):
    alone = trained(ALONE, False)

    for each in processes:
        found = each[split]
        torch.testing.assert_close(found["before"], alone["before"], rtol=1e-5, atol=1e-5)
        assert found["read"] == pytest.approx(alone["read"], rel=1e-4)
        torch.testing.assert_close(found["after"], alone["after"], rtol=1e-3, atol=1e-4)
    assert (alone["after"] - alone["before"]).abs().max() > 0.01


@pytest.mark.parametrize("split", [False, True])
def test_both_ranks_score_to_the_same_bits(processes, split):
    first, second = (each[split] for each in processes)

    assert torch.equal(first["before"], second["before"])
    assert torch.equal(first["after"], second["after"])


def test_after_scoring_the_weights_are_split_again(processes):
    assert [each[1]["kept"] for each in processes] == [True, True]


if __name__ == "__main__":
    main(sys.argv[1])
