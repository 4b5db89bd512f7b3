"""Tasks that are made of other tasks, or made up."""

import re
import sys

import pytest

from rlvr_fast.methods.base import verified
from rlvr_fast.prompts import Prompt
from rlvr_fast.tasks import load_task
from rlvr_fast.tasks.word_problems import _STORIES

ALL = "add,subtract,multiply,divide"
MIXED = {
    "addition": {"weight": 3, "options": {"low": 0, "high": 3, "holdout": 2}},
    "words": {"task": "word_problems", "options": {"size": 20, "holdout": 4}},
}


def solved(text):
    """An independent reading of a word problem."""
    value = int(re.search(r"has (\d+)", text)[1])
    for sentence in text.split(". ")[1:]:
        if number := re.search(r"\d+", sentence):
            n = int(number[0])
            if re.search(r"more", sentence):
                value += n
            elif re.search(r"gives away|loses|sells|takes", sentence):
                value -= n
            elif re.search(r"trades|turns", sentence):
                value *= n
            else:
                assert re.search(r"equal", sentence)
                value, rest = divmod(value, n)
                assert rest == 0
    return value


@pytest.mark.parametrize("steps", [1, 3])
def test_word_problems_have_the_answer_that_their_words_say(steps):
    task = load_task("word_problems", {"steps": steps, "operations": ALL, "size": 300})

    texts = [example.prompt[0]["content"] for example in [*task.train, *task.evaluation]]
    answers = [example.columns["answer"] for example in [*task.train, *task.evaluation]]
    assert [solved(text) for text in texts] == answers
    assert len(set(texts)) == len(texts) == 364
    assert min(answers) >= 1


def test_every_story_is_told():
    task = load_task("word_problems", {"steps": 2, "operations": ALL, "size": 1000})

    told = " ".join(example.prompt[0]["content"] for example in task.train)
    for sentence in (sentence for stories in _STORIES.values() for sentence in stories):
        words = re.escape(sentence).replace(r"\{He\}", "(He|She)").replace(r"\{n\}", r"\d+")
        assert re.search(words.replace(r"\{him\}", "(him|her)"), told)


def test_no_word_problem_is_trained_on_with_the_numbers_of_one_held_out():
    options = {"steps": 1, "most": 5, "size": 200, "holdout": 5}

    task = load_task("word_problems", options)

    def numbers(examples):
        return {
            (*re.findall(r"\d+", e.prompt[0]["content"]), e.columns["answer"]) for e in examples
        }

    assert numbers(task.train).isdisjoint(numbers(task.evaluation))
    assert task == load_task("word_problems", options)
    assert task != load_task("word_problems", {**options, "seed": 1})


def test_word_problems_are_verified_by_the_last_number():
    (example,) = load_task("word_problems", {"size": 1, "holdout": 0, "chat": False}).train
    prompt = Prompt(index=0, example=example, ids=[1])
    task = load_task("word_problems", {})
    answer = example.columns["answer"]

    found = verified(task, [prompt] * 3, [f"3 - 1: {answer}.", f"{answer} or 77", "none"])

    assert example.prompt.endswith("now? Answer:")
    assert found == [1.0, 0.0, 0.0]
    assert task.answer_key("3 or 07") == "7"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 1}, "unknown option of task word_problems step; the nearest is steps"),
        ({"steps": 0}, "steps: wanted >= 1, got 0"),
        ({"operations": "add,power"}, "unknown operation of word_problems power; the nearest is"),
        ({"operations": "divide", "most": 5, "size": 10**5}, "wanted no more problems than there"),
    ],
)
def test_options_that_make_no_word_problems_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_task("word_problems", options)


def test_a_mixture_holds_every_example_with_its_tag():
    task = load_task("mixture", MIXED)

    tags = [example.task for example in task.train]
    assert (tags.count("addition"), tags.count("words")) == (14, 20)
    assert [example.task for example in task.evaluation] == [
        *["addition", "words"] * 2, "words", "words",
    ]  # fmt: skip
    assert task.weights == {"addition": 3.0, "words": 1.0}
    assert {task.part(example).name for example in task.train} == {"addition", "word_problems"}


def test_a_mixture_without_holdouts_is_evaluated_on_its_training_examples():
    bare = {tag: {**part, "options": {"holdout": 0}} for tag, part in MIXED.items()}

    task = load_task("mixture", bare)

    assert task.evaluation is task.train


def test_every_task_of_a_mixture_judges_its_own_completions_by_its_own_columns(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("sys.path", sys.path.copy())
    strict = tmp_path / "strict_reward_of_a_test.py"
    strict.write_text(
        "def same(prompts, completions, answer, other):\n"
        "    return [float(c[-1]['content'] == a) for c, a in zip(completions, answer)]\n"
    )
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "Say hi", "answer": "hi", "other": 1}\n')
    greeting = {"task": "dataset", "options": {"path": str(path), "reward": f"{strict}:same"}}
    task = load_task("mixture", {**MIXED, "greeting": greeting})
    chosen = [next(e for e in task.train if e.task == tag) for tag in task.parts]
    prompts = [Prompt(index=0, example=e, ids=[1]) for e in [*chosen, *chosen]]
    right = [str(example.columns["answer"]) for example in chosen]

    found = verified(task, prompts, [*right, "hi 7777", "hi 7777", "hi 7777"])

    assert found == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_closing_a_mixture_closes_its_tasks():
    pytest.importorskip("reasoning_gym")
    task = load_task("mixture", {"reasoning_gym:chain_sum": {"options": {"size": 2, "holdout": 0}}})
    prompts = [Prompt(index=0, example=example, ids=[1]) for example in task.train]
    assert verified(task, prompts, [e.columns["answer"] for e in task.train]) == [1.0, 1.0]

    task.close()

    assert task.parts["reasoning_gym:chain_sum"].reward._worker is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "^task_options: wanted a table for each task of the mixture, got none"),
        ({"addition": 3}, r"^task_options.addition: wanted a table of a task, got 3"),
        ({"addition": {"wait": 1}}, "^unknown option of task addition of the mixture wait; the ne"),
        ({"addition": {"weight": 0}}, "^weight: wanted > 0 and finite, got 0"),
        ({"adition": {}}, "^task adition of the mixture: task must be one of"),
        ({"a": {"task": "mixture"}}, "^task_options.a: wanted a task that is no mixture itself"),
        (
            {"addition": {"options": {"low": 2, "high": 1}}},
            "^task addition of the mixture: low must be at most high, got 2 and 1",
        ),
    ],
)
def test_what_is_no_mixture_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_task("mixture", options)
