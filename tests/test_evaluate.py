import json
import math
import sys
from statistics import fmean

import pytest

from rlvr_fast import cli
from rlvr_fast.compare import compare, evaluate_models
from rlvr_fast.config import EvalConfig
from rlvr_fast.evaluate import Answer, evaluate_model, evaluation, per_prompt
from rlvr_fast.prompts import Prompt
from rlvr_fast.tasks import Example, Task, load_task

OPTIONS = {"low": 0, "high": 4, "chat": False, "holdout": 5}
MIXED = {
    "easy": {"task": "addition", "options": {**OPTIONS, "high": 1, "holdout": 3}},
    "hard": {"task": "addition", "options": OPTIONS},
}


def config(**options):
    given = {"task": "addition", "task_options": OPTIONS, "max_completion_tokens": 3}
    return EvalConfig(**{**given, **options})


def answered(*groups, tags=None):
    """Groups of (text, reward) as answers to prompts 0, 1 ..., of the tasks with these tags."""
    return [
        [
            Answer(
                prompt=Prompt(index=n, example=Example(str(n), task=tag), ids=[n]),
                text=text,
                reward=reward,
                length=len(text),
                finished=True,
            )
            for text, reward in group
        ]
        for n, (group, tag) in enumerate(zip(groups, tags or [""] * len(groups), strict=True))
    ]


def judged(prompts, completions):
    raise AssertionError("nobody asks")


TASK = Task("any", [], [], judged)


def test_a_model_is_evaluated_greedily_and_by_samples():
    found = evaluate_model("tiny", config(n=4, k="1,4", prompts=3))

    greedy, sampled = found["greedy"], found["sampled"]
    assert (greedy["samples"], greedy["temperature"], greedy["prompts"]) == (1, 0.0, 3)
    assert (sampled["samples"], sampled["temperature"], sampled["unscored"]) == (4, 1.0, 0)
    assert sampled["pass_at"]["1"] == pytest.approx(sampled["reward"])
    assert sampled["pass_at"]["4"] >= sampled["pass_at"]["1"]
    assert greedy["majority"] is None
    assert json.loads(json.dumps(found)) == found


def test_without_n_nothing_is_sampled():
    assert evaluate_model("tiny", config())["sampled"] is None


@pytest.mark.parametrize(("n", "k", "ks"), [(1, "", [1]), (6, "", [1, 2, 4, 6]), (8, "3", [3])])
def test_without_k_powers_of_two_are_estimated(n, k, ks):
    assert config(n=n, k=k).ks == ks


def test_a_k_above_n_is_refused():
    with pytest.raises(ValueError, match=r"^k: wanted 1 to n, 2, got 4$"):
        evaluate_model("no model is needed to see it", config(n=2, k="4"))


def test_values_per_prompt_are_known():
    groups = answered(
        [("1", 1.0), ("2", 0.0), ("2 ", 0.0), ("x1", 1.0)],
        [("7", 0.0), ("5", 0.0), ("05", 1.0), ("none", None)],
    )

    found = per_prompt(TASK, groups, ks=[1, 2])

    assert found == {
        "reward": [0.5, 0.25],
        "length": [1.5, 2.0],
        "pass@1": [0.5, 0.25],
        "pass@2": [pytest.approx(5 / 6), pytest.approx(0.5)],
        "maj@4": [1.0, 0.0],
    }


def test_an_evaluation_has_the_means_and_intervals_of_its_prompts():
    groups = answered([("1", 1.0), ("2", None)], [("1", 0.0), ("1", 0.0)], [("1", 0.5), ("4", 2.0)])

    found = evaluation(TASK, groups, temperature=0.7, ks=[2])

    assert (found.reward, found.prompts, found.samples) == (pytest.approx(7 / 12), 3, 2)
    assert (found.unscored, found.pass_at, found.majority) == (1, {2: 2 / 3}, 1 / 3)
    assert (found.reward_interval.low, found.reward_interval.high) == (0.0, 1.25)
    assert found.majority_interval.kind == found.pass_at_interval[2].kind == "wilson"


def test_every_task_of_a_mixture_is_evaluated_by_itself():
    found = evaluate_model(
        "tiny", config(task="mixture", task_options=MIXED, n=2, max_completion_tokens=2)
    )["sampled"]

    assert {tag: part["prompts"] for tag, part in found["tasks"].items()} == {"easy": 3, "hard": 5}
    parts = [part["reward"] * part["prompts"] for part in found["tasks"].values()]
    assert found["reward"] == pytest.approx(math.fsum(parts) / 8)


def test_a_mixture_counts_votes_by_the_keys_of_each_task():
    parts = {
        "first": Task("", [], [], judged, lambda text: text[0]),
        "last": Task("", [], [], judged, lambda text: text[-1]),
    }
    task = Task("mixture", [], [], judged, parts=parts)
    groups = answered(*[[("ab", 0.0), ("cb", 0.0), ("cd", 1.0)]] * 2, tags=["first", "last"])

    assert per_prompt(task, groups)["maj@3"] == [0.0, 0.0]
    assert per_prompt(task, [[g[2], g[1], g[0]] for g in groups])["maj@3"] == [1.0, 0.0]


def test_a_model_is_no_better_than_itself_without_any_doubt():
    values, answers = evaluate_models(
        ["tiny", "tiny"], config(task="mixture", task_options=MIXED, n=3)
    )

    assert len(answers) == 2
    assert values["against"] == {
        name: values[name] for name in ("model", "task", "greedy", "sampled")
    }
    for found in (values["difference"]["greedy"], values["difference"]["sampled"]):
        for part in (found, *found["tasks"].values()):
            assert (part["better"], part["worse"]) == (0, 0)
            assert {tuple(one.values()) for one in part["differences"].values()} == {(0, 0, 0)}


def test_the_difference_of_two_models_is_paired():
    hard, easy = [("1", 0.0), ("2", 0.0)], [("1", 1.0), ("2", 1.0)]
    middle = [("1", 0.5), ("2", 0.5)]
    first, second = answered(easy, easy, middle, hard), answered(easy, easy, hard, hard)

    found = compare(TASK, first, second, ks=[1], correct=0.5)

    gain = found.differences["reward"]
    assert (found.prompts, found.better, found.worse) == (4, 1, 0)
    # The mean of a resample is binomial (4, 1/4) / 8: see test_estimates.
    assert (gain.value, gain.low, gain.high) == (0.125, 0.0, 0.375)
    assert found.differences["pass@1"].value == 0.25
    assert found.differences["length"].value == 0.0
    assert compare(TASK, second, first).differences["reward"].high == 0.0


def test_answers_to_other_prompts_are_not_compared():
    one, two = answered([("1", 1.0)]), answered([("1", 1.0)], [("1", 1.0)])

    with pytest.raises(ValueError, match=r"^answers: wanted those of two models to the same"):
        compare(TASK, one, two)


@pytest.mark.parametrize("name", ["output", "completions", "plot"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name}: wanted a file in a folder that exists, got"):
        config(**{name: str(tmp_path / "no" / "x.png")})


def test_a_plot_in_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"^plot: wanted .png, .svg or .pdf, got 'x.jpeg'$"):
        config(plot="x.jpeg")


def evaluated(capsys, *arguments):
    """What `rlvr-fast eval tiny` prints: JSON, and the table."""
    common = "--task_options.chat false --max_completion_tokens 2 --prompts 4"
    assert cli.main(["eval", "tiny", "--task", "addition", *common.split(), *arguments]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


def test_the_command_shows_a_table_and_writes_what_it_is_asked_for(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / f"{name}.png" for name in ("output", "completions", "plot")}
    given = [word for name, path in files.items() for word in (f"--{name}", str(path))]

    values, table = evaluated(capsys, "--n", "2", "--against", "tiny", *given)

    assert json.loads(files["output"].read_text()) == values
    assert files["plot"].read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in files["completions"].read_text().splitlines()]
    assert len(lines) == 2 * (4 + 8)
    sampled = [line["reward"] for line in lines[:12] if line["kind"] == "sampled"]
    assert fmean(sampled) == values["sampled"]["reward"]
    assert lines[0]["prompt"] == load_task("addition", {"chat": False}).evaluation[0].prompt
    shown = table[table.index("tiny  ") :].splitlines()
    assert shown[0].split() == ["tiny", "tiny", "difference"]
    assert [line.split()[0] for line in shown if line.startswith("  ")] == [
        "reward", "length", "finished", "reward", "pass@1", "pass@2", "maj@2", "length", "finished",
    ]  # fmt: skip
    assert "0 better, 0 worse" in table
    assert "+0.000 [+0.000, +0.000]" in table


def test_a_single_greedy_evaluation_can_be_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib")

    _, table = evaluated(capsys, "--plot", str(tmp_path / "x.svg"))

    assert "mean reward" in (tmp_path / "x.svg").read_text()
    assert "difference" not in table


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    code = cli.main(["eval", "tiny", "--task", "addition", "--plot", "x.png"])

    assert code == 2
    assert capsys.readouterr().err == "rlvr-fast: plot: wanted matplotlib: pip install matplotlib\n"
