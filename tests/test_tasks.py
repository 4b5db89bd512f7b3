"""Tasks: splits, rewards and clear errors."""

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlvr_fast.rewards import score
from rlvr_fast.rewards.answers import final_answer
from rlvr_fast.tasks import Example, Task, load_task
from rlvr_fast.tasks.addition import last_integer
from rlvr_fast.tasks.reasoning_gym import DatasetVerifier


def rewards(task: Task, examples: list[Example], completions: list[str]) -> list[float | None]:
    names = examples[0].columns
    columns = {name: [example.columns[name] for example in examples] for name in names}
    return score(task.reward, [example.prompt for example in examples], completions, columns)


def prompts(examples: Any) -> list[str]:
    return [str(example.prompt) for example in examples]


@pytest.fixture(scope="module")
def countdown() -> Iterator[Task]:
    pytest.importorskip("reasoning_gym")
    task = load_task("reasoning_gym:countdown", {"size": 3, "holdout": 2})
    yield task
    task.close()


def test_addition_asks_for_every_pair_once_and_holds_some_out() -> None:
    task = load_task("addition", {"low": -1, "high": 3, "holdout": 10})
    assert (len(task.train), len(task.evaluation)) == (15, 10)
    assert len({*prompts(task.train), *prompts(task.evaluation)}) == 25
    assert {example.columns["answer"] for example in task.train} <= set(range(-2, 7))


def test_the_split_of_addition_depends_on_its_seed_only() -> None:
    first, again, other = (load_task("addition", {"seed": seed}) for seed in (1, 1, 2))
    assert first == again
    assert prompts(first.evaluation) != prompts(other.evaluation)


def test_no_holdout_evaluates_on_the_training_prompts() -> None:
    task = load_task("addition", {"holdout": 0})
    assert len(task.train) == 400
    assert task.evaluation is task.train


def test_addition_asks_in_a_chat_or_in_plain_text() -> None:
    one = {"low": 2, "high": 2, "holdout": 0}
    chat = load_task("addition", one).train
    assert chat == [Example([{"role": "user", "content": "What is 2 + 2?"}], {"answer": 4})]
    assert load_task("addition", {**one, "chat": False}).train == [Example("2+2=", {"answer": 4})]
    template = {**one, "chat": False, "template": "{a} and {b} {"}
    assert load_task("addition", template).train == [Example("2 and 2 {", {"answer": 4})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hold_out": 3}, r"must be among \['chat', .*\], got \['hold_out'\]"),
        ({"low": 5, "high": 4}, "low must be at most high, got 5 and 4"),
        ({"low": 1, "high": 2, "holdout": 4}, r"holdout must be in \[0, 4\) of 4 pairs, got 4"),
        ({"template": "{a}?"}, "template must hold {a} and {b}"),
    ],
)
def test_options_that_make_no_addition_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task("addition", options)


@pytest.mark.parametrize(
    "name", ["subtraction", "reasoning_gym", "reasoning_gym:", "addition:x", "", "rows"]
)
def test_an_unknown_task_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of addition, .*, reasoning_gym:NAME, got"):
        load_task(name, {})


@pytest.mark.parametrize(
    ("text", "integer"),
    [
        ("3 + 4 = 7.", 7),
        ("it is -12", -12),
        ("007", 7),
        ("none", None),
        ("", None),
        ("\u0667", None),
        ("9" * 10_000_000, None),
        ("1 " * 5_000_000, 1),
        ("-" * 10_000_000 + "5" + "-" * 10_000_000, -5),
    ],
)
def test_the_last_integer_is_found_in_any_text(text: str, integer: int | None) -> None:
    assert last_integer(text) == integer


def test_addition_rewards_the_right_sum_only() -> None:
    task = load_task("addition", {"low": 2, "high": 3, "holdout": 0})
    right = [f"That is {example.columns['answer']}." for example in task.train]
    assert rewards(task, [*task.train], right) == [1.0] * 4
    assert rewards(task, [*task.train], ["7", "", "2+2", "9" * 5000]) == [0.0] * 4


@pytest.mark.parametrize("name", ["basic_arithmetic", "chain_sum", "leg_counting"])
def test_the_answers_of_a_dataset_score_one(name: str) -> None:
    pytest.importorskip("reasoning_gym")
    verifier = DatasetVerifier(name, {"size": 5, "seed": 7})
    copy = pickle.loads(pickle.dumps(verifier))
    for entry in verifier.dataset:
        assert copy(f"so <answer> {entry['answer']}\n</answer>", entry) == 1.0
        assert copy("I do not know", entry) < 0.1


def test_held_out_questions_of_a_dataset_are_not_trained_on() -> None:
    pytest.importorskip("reasoning_gym")
    options = {"size": 50, "holdout": 5, "min_terms": 2, "max_terms": 2, "max_digits": 1}
    first, again = (load_task("reasoning_gym:chain_sum", options) for _ in range(2))
    assert len(first.evaluation) == 5
    assert 0 < len(first.train) <= 50
    assert not {*prompts(first.train)} & {*prompts(first.evaluation)}
    assert first.train == again.train


def test_a_hostile_countdown_answer_is_never_run(countdown: Task, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    examples = [*countdown.train, *countdown.evaluation]
    completions = [f"<answer>{example.columns['answer']}</answer>" for example in examples]
    completions[1] = f"<answer>__import__('os').system('touch {harm}')</answer>"
    completions[2] = f"__import__('os').mkfifo('{harm}')"
    completions[3] = "<answer>" * 10_000
    found = rewards(countdown, examples, completions)
    assert [found[0], found[4]] == [1.0, 1.0]
    assert all(reward is not None and reward < 0.1 for reward in found[1:4])
    assert not harm.exists()


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>1</answer> no, <answer> 2\n</answer> it is", "2"),
        (" 3\n", "3"),
        ("<answer>4", "<answer>4"),
        ("</answer>5<answer>", "</answer>5<answer>"),
        ("<answer>" * 100_000 + "6" + "</answer>" * 9, "6" + "</answer>" * 8),
    ],
)
def test_the_final_answer_stands_in_the_last_tags(completion: str, answer: str) -> None:
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("countdwn", {}, r"must be one like \['countdown'.*, got 'countdwn'"),
        ("chain_sum", {"terms": 2}, r"must be among \[.*'max_terms'.*\], got \['terms'\]"),
        ("chain_sum", {"min_terms": -1}, "options of reasoning_gym:chain_sum: min_terms"),
        ("chain_sum", {"size": 0}, "size must be >= 1 and holdout >= 0, got 0 and 64"),
    ],
)
def test_what_a_dataset_does_not_know_is_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=message):
        load_task(f"reasoning_gym:{name}", options)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlvr_fast.rewards.math import math_reward

    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        load_task("reasoning_gym:countdown", {})
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        math_reward()
