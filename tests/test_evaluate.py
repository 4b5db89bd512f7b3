from itertools import combinations

import pytest

from rlvr_fast.config import EvalConfig
from rlvr_fast.evaluate import evaluate_model, pass_at_k

OPTIONS = {"low": 0, "high": 4, "chat": False, "holdout": 5}


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 1), (5, 2, 1), (8, 3, 4), (8, 1, 8), (10, 9, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n, c, k):
    subsets = list(combinations([True] * c + [False] * (n - c), k))

    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_neither_overflows_nor_cancels():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match=r"^pass@k: wanted 0 <= correct <= samples"):
        pass_at_k(n, c, k)


def test_a_model_is_evaluated_greedily_and_by_samples():
    config = EvalConfig(
        task="addition", task_options=OPTIONS, n=4, k="1,4", max_completion_tokens=3, prompts=3
    )

    found = evaluate_model("tiny", config)

    greedy, sampled = found["greedy"], found["sampled"]
    assert (greedy["samples"], greedy["temperature"], greedy["prompts"]) == (1, 0.0, 3)
    assert (sampled["samples"], sampled["temperature"], sampled["unscored"]) == (4, 1.0, 0)
    assert sampled["pass_at"]["1"] == pytest.approx(sampled["reward"])
    assert sampled["pass_at"]["4"] >= sampled["pass_at"]["1"]


def test_without_n_nothing_is_sampled():
    config = EvalConfig(task="addition", task_options=OPTIONS, max_completion_tokens=1)

    assert evaluate_model("tiny", config)["sampled"] is None


def test_a_k_above_n_is_refused():
    config = EvalConfig(task="addition", task_options=OPTIONS, n=2, k="4")

    with pytest.raises(ValueError, match=r"^k: wanted 1 to n, 2, got 4$"):
        evaluate_model("tiny", config)
