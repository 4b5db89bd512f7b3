import json

import pytest
from rewarded import advantages, group
from transformers import AutoTokenizer

from rlvr_fast import config as configs
from rlvr_fast import models
from rlvr_fast.collect import Collector
from rlvr_fast.methods import method
from rlvr_fast.methods.wgrpo import pair_of
from rlvr_fast.prompts import Prompts
from rlvr_fast.rollout import Completion
from rlvr_fast.tasks import Example, Task

RARE_SUCCESS = group(1, *[0] * 7)
RARE_FAILURE = group(0, *[1] * 7, index=1)


class Counting:
    """An engine whose samples repeat the prompt's last token, the first once, the next twice; it
    remembers how many it was asked for.
    """

    def __init__(self):
        self.asked = []

    def generate(self, prompts, sampling):
        self.asked.append(len(prompts) * sampling.n)
        lengths = range(1, 1 + sampling.n)
        return [
            [Completion(token_ids=[ids[-1]] * n, logp=[-1.0] * n, finished=True) for n in lengths]
            for ids in prompts
        ]


def digits(groups):
    return [int(group[0].text[0]) for group in groups]


def as_often_as_the_digit_says(prompts, completions):
    """Digit d is solved d times of 8: the engine's samples have 1 to 8 tokens."""
    return [float(len(text) <= int(text[0])) for text in completions]


def collector(chosen, examples=range(9), engine=None):
    given = {
        "run_folder": "unused",
        "method": "wgrpo",
        "prompts_per_step": 4,
        "samples_per_prompt": 8,
        "max_completion_tokens": 9,
    }
    tokenizer = AutoTokenizer.from_pretrained(models.resolve("tiny"))
    task = Task("digits", [Example(str(n)) for n in examples], [], as_often_as_the_digit_says)
    prompts = Prompts(task.train, tokenizer)
    config = configs.load("tiny", given)
    return Collector(config, chosen, task, prompts, tokenizer, engine or Counting())


def test_rare_outcomes_are_amplified():
    """Source: sqrt((1 - p) / p) and -sqrt(p / (1 - p)) at p = 1/8 and 7/8."""
    success = advantages("wgrpo", RARE_SUCCESS)
    failure = advantages("wgrpo", RARE_FAILURE)

    assert success[:2] == pytest.approx([2.645751, -0.377964], abs=1e-5)
    assert failure[:2] == pytest.approx([-2.645751, 0.377964], abs=1e-5)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_weight_of_wrong_answers_matters_only_without_a_standard_deviation(weight):
    def found(norm, negative_weight):
        return advantages("wgrpo", RARE_SUCCESS, norm=norm, negative_weight=negative_weight)

    assert found("std", weight) == pytest.approx(found("std", 1.0), abs=1e-5)
    scaled = [x * (1 + weight) / 2 for x in found("mean", 1.0)]
    assert found("mean", weight) == pytest.approx(scaled)


def test_wrong_answers_worth_nothing_and_no_standard_deviation_are_dr_grpo():
    found = advantages("wgrpo", RARE_SUCCESS, norm="mean", negative_weight=0.0)

    assert found == pytest.approx(advantages("dr_grpo", RARE_SUCCESS))


def test_the_two_prompts_have_weights_of_their_own():
    plain = advantages("wgrpo", RARE_SUCCESS, RARE_FAILURE)

    found = advantages("wgrpo", RARE_SUCCESS, RARE_FAILURE, hard_weight=2.0, easy_weight=3.0)

    assert found == pytest.approx([*(2 * x for x in plain[:8]), *(3 * x for x in plain[8:])])


def test_what_nobody_could_score_has_no_advantage():
    assert advantages("wgrpo", group(1, None, 0)) == pytest.approx([1, 0, -1], abs=1e-5)


def test_the_pair_is_solved_and_failed_most_rarely_but_not_never():
    assert pair_of({5: 0.0, 3: 0.5, 8: 0.125, 1: 0.75, 4: 1.0}) == {"hard": 8, "easy": 1}
    assert pair_of({3: 0.5, 8: 0.5, 4: 1.0}) == {"hard": 3, "easy": 8}
    assert pair_of({3: 0.5, 4: 1.0, 5: 0.0}) == {}


def test_one_probe_finds_the_pair_that_fills_every_batch():
    engine = Counting()
    made = collector(method("wgrpo", {}), engine=engine)

    first = made.batch(1, 0)
    second = made.batch(2, first.position)

    assert digits(first.groups) == digits(second.groups) == [1, 7, 1, 7]
    assert engine.asked == [9 * 8, 4 * 8, 4 * 8]


def test_the_probe_has_its_own_size():
    engine = Counting()
    chosen = method("wgrpo", {"probe_prompts": 5, "probe_samples": 3})

    collector(chosen, engine=engine).batch(1, 0)

    assert engine.asked[0] == 5 * 3


def test_without_two_candidates_a_step_trains_as_usual_and_the_next_probes_again():
    engine = Counting()
    made = collector(method("wgrpo", {}), examples=[0, 0, 3, 8], engine=engine)

    for step in (1, 2):
        assert set(digits(made.batch(step, 0).groups)) == {0, 3, 8}

    assert engine.asked == [4 * 8] * 4


def test_without_a_pair_all_prompts_are_trained():
    engine = Counting()
    made = collector(method("wgrpo", {"pair": False}), engine=engine)

    assert len(set(digits(made.batch(1, 0).groups))) == 4
    assert engine.asked == [4 * 8]


def test_the_pair_survives_a_checkpoint():
    before, after = method("wgrpo", {}), method("wgrpo", {})
    wanted = collector(before).batch(1, 0)
    engine = Counting()

    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    found = collector(after, engine=engine).batch(1, 0)

    assert found.groups == wanted.groups
    assert engine.asked == [4 * 8]


@pytest.mark.parametrize("name", ["probe_prompts", "probe_samples"])
def test_a_probe_that_cannot_find_a_pair_is_refused(name):
    with pytest.raises(ValueError, match=rf"^{name}: wanted >= 2, got 1$"):
        method("wgrpo", {name: 1})
