import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.collect import Batch, Collector, sampling_seed
from rlvr_fast.methods import method
from rlvr_fast.prompts import Prompts
from rlvr_fast.rollout import Completion
from rlvr_fast.tasks import Example, Task
from rlvr_fast.trainer import Trainer


class Parrot:
    """An engine that answers with the prompt's last token, as often as the sample's number says."""

    def generate(self, prompts, sampling):
        return [
            [
                Completion(
                    token_ids=[ids[-1]] * min(1 + i, sampling.max_tokens),
                    logp=[-1.0] * min(1 + i, sampling.max_tokens),
                    finished=1 + i < sampling.max_tokens,
                )
                for i in range(sampling.n)
            ]
            for ids in prompts
        ]


def mixed_for_odd_digits(prompts, completions):
    """A group of an odd digit has a signal, an even one's has none."""
    return [float(len(text)) if int(text[0]) % 2 else 1.0 for text in completions]


def collector(reward=mixed_for_odd_digits, *, examples=range(10), **overrides):
    given = {
        "run_folder": "unused",
        "prompts_per_step": 3,
        "samples_per_prompt": 4,
        "max_completion_tokens": 5,
        **overrides,
    }
    config = configs.load("tiny", given)
    tokenizer = AutoTokenizer.from_pretrained(models.resolve("tiny"))
    task = Task("digits", [Example(str(n)) for n in examples], [], reward)
    prompts = Prompts(task.train, tokenizer, seed=config.seed)
    chosen = method(config.method, config.method_options)
    return Collector(config, chosen, task, prompts, tokenizer, Parrot()), prompts


def digits(groups):
    return [int(group[0].text[0]) for group in groups]


def test_without_refilling_a_batch_is_what_was_sampled():
    made, prompts = collector()

    batch = made.batch(1, 4)

    assert [group[0].prompt for group in batch.groups] == prompts.take(4, 3)
    assert batch.dropped == []
    assert batch.position == 7


def test_groups_without_a_signal_are_replaced_as_whole_groups():
    made, prompts = collector(refill_rounds=10)

    batch = made.batch(1, 0)

    visited = [int(prompt.example.prompt) for prompt in prompts.take(0, batch.position)]
    assert digits(batch.groups) == [n for n in visited if n % 2]
    assert digits(batch.dropped) == [n for n in visited if not n % 2]
    assert len(batch.groups) == 3
    assert {len(group) for group in batch.groups} == {4}


def test_refilling_stops_after_its_rounds():
    made, prompts = collector(refill_rounds=1, examples=[0, 2, 4, 6, 8, 20, 1])
    order = [prompt.example.prompt for prompt in prompts.take(0, 100)]
    start = next(
        i for i in range(95) if "1" in order[i + 3 : i + 6] and "1" not in order[i : i + 3]
    )

    batch = made.batch(1, start)

    assert [group[0].prompt.example.prompt for group in batch.groups] == ["1"]
    assert len(batch.dropped) == 5
    assert batch.position == start + 6


def test_a_batch_without_any_signal_is_what_was_sampled_first():
    made, prompts = collector(refill_rounds=2, examples=[0, 2, 4, 6])

    batch = made.batch(1, 0)

    assert [group[0].prompt for group in batch.groups] == prompts.take(0, 3)
    assert len(batch.dropped) == 6
    assert batch.position == 9


def test_metrics_count_what_was_dropped():
    made, _ = collector(refill_rounds=10)

    batch = made.batch(1, 0)

    found = batch.metrics()
    groups, dropped = len(batch.groups), len(batch.dropped)
    assert dropped > 0
    assert found["groups_dropped"] == dropped
    assert found["sequences"] == 4 * (groups + dropped)
    assert found["reward"] == pytest.approx((2.5 * groups + dropped) / (groups + dropped))
    assert found["groups_with_signal"] == pytest.approx(groups / (groups + dropped))


def test_masked_completions_are_in_no_numerator_and_no_denominator():
    made, _ = collector(overlong="mask", max_completion_tokens=3, examples=[1, 3, 5])

    batch = made.batch(1, 0)

    for group in batch.groups:
        assert [rollout.scored_tokens for rollout in group] == [1, 2, 0, 0]
        assert [rollout.reward for rollout in group] == [1.0, 2.0, 3.0, 3.0]


def test_the_overlong_penalty_falls_linearly_over_the_buffer():
    made, _ = collector(overlong="penalty", overlong_buffer=2, examples=[2], prompts_per_step=1)

    (group,) = made.batch(1, 0).groups

    assert [len(rollout.completion_ids) for rollout in group] == [1, 2, 3, 4]
    assert [rollout.penalty for rollout in group] == [0.0, 0.0, 0.0, 0.5]
    assert [rollout.reward for rollout in group] == [1.0] * 4
    assert [rollout.advantage > 0 for rollout in group] == [True, True, True, False]


def test_a_buffer_that_nobody_named_is_a_fifth_of_the_limit():
    made, _ = collector(
        overlong="penalty",
        max_completion_tokens=10,
        samples_per_prompt=10,
        examples=[2],
        prompts_per_step=1,
    )

    (group,) = made.batch(1, 0).groups

    assert [rollout.penalty for rollout in group] == [0.0] * 8 + [0.5, 1.0]


def test_group_sizes_may_differ_from_prompt_to_prompt():
    made, _ = collector(prompts_per_step=4)
    made._task = replace(made._task, train=[Example(str(n), samples=n or None) for n in range(4)])
    made._prompts = Prompts(made._task.train, made._tokenizer)

    batch = made.batch(1, 0)

    sizes = {int(group[0].prompt.example.prompt): len(group) for group in batch.groups}
    assert sizes == {0: 4, 1: 1, 2: 2, 3: 3}
    assert [digits([group]) for group in batch.groups] == [
        [int(group[0].prompt.example.prompt)] for group in batch.groups
    ]


def test_a_batch_survives_json_bit_for_bit():
    made, prompts = collector(refill_rounds=10)
    batch = made.batch(3, 2)

    values = json.loads(json.dumps(batch.to_values()))

    assert Batch.from_values(values, prompts) == batch


def test_every_step_and_round_samples_with_a_seed_of_its_own():
    seeds = {sampling_seed(0, step, round_) for step in range(20) for round_ in range(5)}

    assert len(seeds) == 100
    assert sampling_seed(0, 1, 0) == sampling_seed(0, 1, 0)


def test_a_pipelined_batch_is_sampled_one_update_behind(tmp_path):
    """Its log-probabilities are those of the weights before the last update."""
    given = {
        "run_folder": str(tmp_path),
        "pipeline": True,
        "mismatch_correction": "token_truncate",
        "learning_rate": 0.05,
        "steps": 3,
    }
    config = configs.load("tiny", given)
    task = Task("digits", [Example(f"{n}+1=") for n in range(9)], [], first_token)
    trainer = Trainer(config, task)
    trainer.sync()
    found = [trainer.step(step)[0] for step in (1, 2, 3)]

    assert found[0]["mismatch_max"] < 1e-4
    assert min(values["mismatch_max"] for values in found[1:]) > 1e-2


def first_token(prompts, completions):
    return [float(text[:1] in "01234") for text in completions]


def test_the_batch_ahead_runs_with_the_threads_of_the_trainer():
    from rlvr_fast.ahead import Ahead

    seen = []
    ahead = Ahead(lambda step, position: seen.append(torch.get_num_threads()))

    ahead.start(2, 0)
    ahead.wait()

    assert seen == [1]
