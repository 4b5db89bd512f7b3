"""The endless order of prompts: a function of seed and position, fair to every task."""

from collections import Counter

import pytest

from rlvr_fast import models
from rlvr_fast.prompts import Prompts
from rlvr_fast.tasks import Example

KNOWN = [4, 0, 9, 2, 5, 12, 6, 8, 3, 1, 1, 2]
WEIGHTS = {"a": 0.7, "b": 0.2, "c": 0.1}


@pytest.fixture(scope="module")
def tokenizer():
    return models.load(models.resolve("tiny"))[1]


def mixture(tokenizer, seed=0, sizes=(7, 5, 3)):
    examples = [
        Example(str(n), task=tag)
        for tag, size in zip("abc", sizes, strict=True)
        for n in range(size)
    ]
    return Prompts(examples, tokenizer, seed=seed, weights=WEIGHTS)


def taken(prompts, position, count):
    return [prompt.index for prompt in prompts.take(position, count)]


def test_every_epoch_visits_every_prompt_once_in_its_own_order(tokenizer):
    prompts = Prompts([Example(str(n)) for n in range(10)], tokenizer, seed=3)

    order = taken(prompts, 0, 20)

    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


@pytest.mark.parametrize("cuts", [[1] * 200, [0, 7, 64, 100, 29], [200]])
def test_the_order_does_not_depend_on_how_it_is_taken(tokenizer, cuts):
    prompts, position, order = mixture(tokenizer), 0, []
    for count in cuts:
        order += taken(prompts, position, count)
        position += count

    assert order == taken(mixture(tokenizer), 0, 200)


def test_a_distant_position_is_the_same_when_it_is_reached_first(tokenizer):
    position = 10**9 + 7

    assert taken(mixture(tokenizer), position, 50)[20:] == taken(
        mixture(tokenizer), position + 20, 30
    )


def test_the_order_is_the_same_in_every_process_and_version(tokenizer):
    """A checkpoint remembers a position: whatever changes the order breaks runs in progress."""
    assert taken(mixture(tokenizer), 100, 12) == KNOWN


def test_another_seed_is_another_order(tokenizer):
    assert taken(mixture(tokenizer, seed=1), 0, 50) != taken(mixture(tokenizer, seed=2), 0, 50)


def test_every_task_comes_in_proportion_to_its_weight_at_any_time(tokenizer):
    order = [prompt.example.task for prompt in mixture(tokenizer).take(0, 2000)]

    for length in range(1, 2001):
        counts = Counter(order[:length])
        assert all(abs(counts[tag] - length * share) < 3 for tag, share in WEIGHTS.items())


def test_every_example_of_a_task_comes_once_per_epoch_of_that_task(tokenizer):
    prompts = mixture(tokenizer).take(0, 1000)

    for tag, size in zip("abc", (7, 5, 3), strict=True):
        own = [prompt.index for prompt in prompts if prompt.example.task == tag]
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(epochs) > 30
        assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(sorted(set(own)))}
        assert len(set(map(tuple, epochs))) > 1


def test_the_order_within_a_task_does_not_depend_on_the_other_tasks(tokenizer):
    few, many = (
        [
            p.example.prompt
            for p in mixture(tokenizer, sizes=sizes).take(0, 90)
            if p.example.task == "a"
        ]
        for sizes in ((7, 5, 3), (7, 50, 1))
    )

    assert few == many


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, r"wanted one for each of \['a', 'b', 'c'\], got \['a'\]"),
        ({"a": 1.0, "b": 1.0, "c": 1e-9}, "wanted shares of at least 0.0001, got"),
    ],
)
def test_weights_that_fit_no_task_are_refused(tokenizer, weights, message):
    examples = [Example("?", task=tag) for tag in "abc"]

    with pytest.raises(ValueError, match=f"^weights: {message}"):
        Prompts(examples, tokenizer, weights=weights)


def test_a_negative_position_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"^take: wanted position and count >= 0, got -1 and 2$"):
        mixture(tokenizer).take(-1, 2)
