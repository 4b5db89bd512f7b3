"""Answers that compare as text or as a number, and reward functions by name."""

import sys
from decimal import Decimal

import pytest

from rlvr_fast.rewards import score
from rlvr_fast.rewards.answers import answer_key, last_boxed, last_number, number_key, text_key
from rlvr_fast.rewards.named import check_takes, load_reward
from rlvr_fast.rewards.workers import VerifierPool


def rewards(name, completions, answer):
    columns = {"answer": [answer] * len(completions), "other": [0] * len(completions)}
    return score(load_reward(name).reward, ["?"] * len(completions), completions, columns)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 72.", "72"),
        ("$1,234.50 in all", "1234.50"),
        ("12,345,678", "12345678"),
        ("1,2,3", "3"),
        ("1234,567", "567"),
        ("from 5-3", "3"),
        ("it is -3", "-3"),
        ("it is \u22123", "-3"),
        ("x=-0.5", "-0.5"),
        ("75%", "75"),
        ("9" * 101, None),
        ("none", None),
        ("", None),
        ("\u0667", None),
    ],
)
def test_the_last_number_of_a_text_is_known(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("9" * 2_000_000 + "x", "9" * 2_000_000 + "x"),
        ("1," * 1_000_000, "1"),
        ("123," * 500_000 + "x", "123"),
        ("<answer>" * 250_000 + "7", "7"),
        ("\\boxed{" * 250_000 + "7", "7"),
        ("\\boxed{" + "{}" * 500_000, None),
        ("." * 1_000_000 + "5" + "-" * 1_000_000, "5"),
    ],
    ids=lambda text: f"{str(text)[:8]}...",
)
def test_an_answer_is_found_in_any_text(text, key):
    """With anything quadratic in it this would take hours."""
    found = answer_key(text)

    assert found == (text.casefold() if key is None else key)


def test_numbers_are_rewarded_by_value():
    completions = ["It is 1,234.0", "1234!", "1234 or 5", "<answer>1234</answer> for 3 days", ""]

    assert rewards("number", completions, "1234") == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert rewards("number", ["7"], "no number") == [None]


def test_exact_answers_are_the_whole_text_or_the_inside_of_the_tags():
    completions = [" New  York\n", "hm <answer>New York</answer>", "new york", "It is New York"]

    assert rewards("exact", completions, "New York") == [1.0, 1.0, 0.0, 0.0]


def test_contained_answers_are_whole_words():
    completions = ["It is new york.", "New Yorker", "X New York", "york new", ""]

    assert rewards("contains", completions, "New York") == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert rewards("contains", ["42", "4 of 2", "4"], 4) == [0.0, 1.0, 1.0]


def test_a_chat_is_judged_by_its_last_message():
    chat = [{"role": "user", "content": "9"}, {"role": "assistant", "content": "7"}]

    assert rewards("number", [chat], 7) == [1.0]


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1} then \boxed{ \frac{1}{2} }.", r"\frac{1}{2}"),
        (r"\boxed{", None),
        ("none", None),
    ],
)
def test_the_last_box_is_read_with_its_braces(text, inside):
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [
        (answer_key, ["<answer>5.0</answer> 7", r"\boxed{5}", "I say 5", " 5"], "I say 7"),
        (answer_key, ["Blue", " blue "], "red"),
        (text_key, ["Yes", "hm <answer>YES</answer>"], "yes 5"),
        (number_key, ["1,000.00", "1000"], "1001"),
    ],
)
def test_equal_answers_have_equal_keys(key, same, other):
    keys = {key(text) for text in same}

    assert len(keys) == 1
    assert key(other) not in keys | {None}


def test_an_empty_text_answers_nothing():
    assert [key(" ") for key in (answer_key, text_key, number_key)] == [None] * 3
    assert number_key("no number") is None


def test_mathematics_is_verified_in_workers():
    pytest.importorskip("math_verify")
    with load_reward("math").reward as reward:
        assert isinstance(reward, VerifierPool)
        assert score(reward, ["?"], [r"\boxed{\frac{2}{4}}"], {"answer": ["1/2"]}) == [1.0]


OWN = """
from rlvr_fast.rewards.workers import VerifierPool

def long(prompts, completions, *, least, **columns):
    return [float(len(c) >= n) for c, n in zip(completions, least)]

def greedy(prompts, completions):
    return [1.0] * len(completions)

async def late(prompts, completions, **columns):
    return []

def verify(completion, least):
    return float(len(completion) >= least)

pool = VerifierPool(verify)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The path of a file of reward functions, whose folder is forgotten afterwards."""
    monkeypatch.setattr("sys.path", sys.path.copy())
    path = tmp_path / "own_rewards_of_a_test.py"
    path.write_text(OWN)
    yield path
    sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("name", ["long", "pool"])
def test_a_function_or_pool_of_the_users_own_is_found_in_a_file(own, name):
    reward = load_reward(f"{own}:{name}").reward

    assert score(reward, ["?"] * 2, ["a", "abc"], {"least": [2, 2]}) == [0.0, 1.0]
    if name == "pool":
        reward.close()


def test_a_function_is_found_in_a_module_that_can_be_imported():
    named = load_reward("rlvr_fast.tasks.addition:sum_reward")

    assert score(named.reward, ["?"], ["7"], {"answer": [7]}) == [1.0]


def test_a_function_that_does_not_take_the_columns_is_refused(own):
    reward = load_reward(f"{own}:greedy").reward

    with pytest.raises(ValueError, match=r"^reward: wanted a function of prompts, .*, x, got gree"):
        check_takes(reward, ["x"])
    with pytest.raises(ValueError, match="missing a required argument: 'least'"):
        check_takes(load_reward(f"{own}:long").reward, ["x"])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("maths", ValueError, "wanted one of exact, number, contains, math or module:function"),
        ("no_such_module:f", ImportError, "wanted a module that can be imported or a path/to"),
        ("no/such/file.py:f", FileNotFoundError, "wanted a Python file, got no/such/file.py"),
        ("math:pi", ValueError, "wanted a plain function pi in math, got 3.14"),
        ("math:no", ValueError, "wanted a plain function no in math, got None"),
        ("{own}:late", ValueError, "wanted a plain function late"),
    ],
)
def test_what_is_no_reward_function_is_refused(own, name, error, message):
    with pytest.raises(error, match=f"^reward: {message}"):
        load_reward(name.format(own=own))


def test_a_file_that_shares_its_name_with_a_module_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", sys.path.copy())
    (tmp_path / "json.py").write_text(OWN)

    with pytest.raises(ValueError, match=r"^reward: wanted a file named unlike any other"):
        load_reward(f"{tmp_path}/json.py:long")
