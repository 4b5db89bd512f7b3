"""The bench of the methods at tiny sizes: `rlvr-fast bench methods`."""

import json

import pytest

from benches import drawn, learning, suite
from rlvr_fast.methods import METHODS
from rlvr_fast.rollout import SamplingParams


def test_a_drawn_completion_depends_on_its_prompt_and_the_seed_only():
    engine = drawn.DrawnEngine(vocab_size=100, lengths=(1, 7))
    first, second = [5, 6], [7]

    both = engine.generate([first, second], SamplingParams(n=3, seed=4))

    assert engine.generate([second], SamplingParams(n=3, seed=4)) == both[1:]
    assert engine.generate([second], SamplingParams(n=3, seed=5)) != both[1:]
    assert len({tuple(each.token_ids) for group in both for each in group}) == 6


def methods_bench(tmp_path, *arguments):
    """The entries of `rlvr-fast bench methods` by part, and its plots."""
    assert suite.main(["methods", *arguments, "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*-methods-quick.json")
    entries = json.loads(path.read_text())["entries"]
    drawn_plots = {each.stem.rpartition("-")[2] for each in tmp_path.glob("*.png")}
    return {key.partition(":")[0]: entry for key, entry in entries.items()}, drawn_plots


def test_the_methods_bench_times_those_that_are_named_beside_the_baseline(tmp_path, capsys):
    wanted = ["reinforce", "gspo"]

    found, plotted = methods_bench(tmp_path, *wanted, "--only", "update", "--only", "loss")

    for part in ("update", "loss"):
        rows = {row[""]: row for row in found[part]["tables"][0]["rows"]}
        assert set(rows) == {"grpo", *wanted}
        assert rows["grpo"]["x grpo"] == 1
        assert min(row["tokens/s"] for row in rows.values()) > 0
    assert plotted == {"cost"}


def test_a_method_that_fails_is_left_out_of_the_bench_and_the_others_stay(tmp_path, monkeypatch):
    class Broken(METHODS["grpo"]):
        def advantages(self, groups):
            raise RuntimeError("boom")

    monkeypatch.setitem(METHODS, "broken", Broken)

    found, _ = methods_bench(tmp_path, "broken", "reinforce", "--only", "update")

    assert [row[""] for row in found["update"]["tables"][0]["rows"]] == ["grpo", "reinforce"]
    assert found["update"]["left_out"] == ["broken: RuntimeError: boom"]


def test_a_run_of_the_learning_bench_is_the_same_for_the_same_seed():
    first, again, other = (learning.learn("grpo", seed, steps=2) for seed in (0, 0, 1))

    assert len(first.sampled) == 2
    assert (first.sampled, first.greedy) == (again.sampled, again.greedy)
    assert first.sampled != other.sampled
    assert (first.updates, learning.learn("reinforce", 0, steps=1).updates) == (2, 1)


@pytest.mark.slow
def test_the_learning_bench_has_a_run_for_every_seed(tmp_path):
    found, plotted = methods_bench(tmp_path, "reinforce", "--only", "learning")

    (row,) = found["learning"]["tables"][0]["rows"]
    runs = found["learning"]["facts"]["sampled"]["reinforce"]
    assert [len(run) for run in runs] == [3, 3]
    assert row["least"] <= row["greedy"] <= row["greatest"]
    assert row["sampled, all"] == pytest.approx(sum(map(sum, runs)) / 6)
    assert plotted == {"learning"}


def test_the_methods_bench_refuses_an_unknown_name(capsys):
    with pytest.raises(SystemExit, match="2"):
        suite.main(["methods", "reinforc"])

    assert "unknown method reinforc; the nearest is reinforce" in capsys.readouterr().err
