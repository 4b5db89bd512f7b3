import json
import math
import sys
import warnings

import numpy as np
import pytest

from rlvr_fast import cli, config, plot
from rlvr_fast.curves import Line, Run, curve, lines, load, running_mean
from rlvr_fast.run import train

matplotlib = pytest.importorskip("matplotlib")


def row(step, **values):
    return {"step": step, **values}


def folder(at, rows, **config):
    at.mkdir()
    (at / "config.json").write_text(json.dumps({"seed": 0, "learning_rate": 1e-5, **config}))
    (at / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return at


def full(steps, level=0.5):
    """Rows with all that a run may report."""
    seconds = {"seconds_generate": 3.0, "seconds_verify": 0.5, "seconds_wait": 3.5}
    seconds |= {"seconds_update": 4.0, "seconds_sync": 0.25, "seconds_total": 7.75}
    return [row(0, eval_reward=0.0, eval_length=9.0)] + [
        row(
            step,
            reward=level,
            length=10.0 * level,
            entropy=1.0 / step,
            mismatch_kl=1e-4 * step,
            ref_kl=0.1,
            kl=0.0,
            tokens_per_second=500.0,
            **seconds,
        )
        for step in range(1, steps + 1)
    ]


def panels(drawn, smooth=1):
    """By title, the panels of the picture."""
    with matplotlib.rc_context(plot.STYLE):
        return {axes.get_title("left"): axes for axes in plot._figure(drawn, smooth).axes}


def drawn_lines(axes):
    """What was drawn of data, without the samples of a legend."""
    return [line for line in axes.lines if len(line.get_xdata())]


def test_the_running_mean_is_that_of_the_known_values_of_a_window():
    values = [1.0, math.nan, 4.0, 2.0, math.nan, math.nan, 8.0, 0.5]

    for count in (1, 2, 3, 20):
        expected = [
            np.nan if math.isnan(x) else np.nanmean(values[max(0, i - count + 1) : i + 1])
            for i, x in enumerate(values)
        ]
        np.testing.assert_allclose(running_mean(values, count), expected)


def test_a_curve_is_the_mean_of_the_runs_that_have_a_number_there():
    first = Run(name="a", config={}, rows=[row(0), row(1, reward=1.0), row(2, reward=None)])
    second = Run(name="b", config={}, rows=[row(1, reward=3.0), row(2, reward=None)])
    third = Run(name="c", config={}, rows=[row(3, reward=7.0)])

    found = curve([first, second, third], "reward", 1)

    np.testing.assert_array_equal(found.steps, [1, 2, 3])
    np.testing.assert_array_equal(found.mean, [2, np.nan, 7])
    np.testing.assert_array_equal(found.low, [1, np.nan, 7])
    np.testing.assert_array_equal(found.high, [3, np.nan, 7])
    assert curve([first], "entropy", 1) is None
    assert curve([Run(name="d", config={}, rows=[row(1, reward=None)])], "reward", 1) is None


def test_runs_that_only_differ_by_their_seed_become_one_line(tmp_path):
    runs = load(
        [
            folder(tmp_path / "a", full(2), seed=1, device="cpu", run_folder="a"),
            folder(tmp_path / "b", full(2), seed=2, device="cuda", run_folder="b"),
            folder(tmp_path / "c", full(2), seed=2, learning_rate=2e-5),
        ]
    )

    assert [line.label for line in lines(runs, group=False)] == ["a", "b", "c"]
    assert [line.label for line in lines(runs, group=True)] == ["a, b (mean of 2)", "c"]


def test_folders_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
        folder(tmp_path / parent / "run", full(1))

    runs = load([tmp_path / "x" / "run", tmp_path / "y" / "run"])

    assert [run.name for run in runs] == [f"{tmp_path}/x/run", f"{tmp_path}/y/run"]


def test_every_metric_has_its_panel_and_numbers(tmp_path):
    found = panels(lines(load([folder(tmp_path / "a", full(5))]), group=False))

    assert list(found) == [
        "Reward", "Completion length", "Entropy", "KL divergence", "Time of a step", "Speed",
    ]  # fmt: skip
    sampled, evaluated = drawn_lines(found["Reward"])
    np.testing.assert_array_equal(sampled.get_ydata(), [0.5] * 5)
    np.testing.assert_array_equal(evaluated.get_xdata(), [0])
    assert len(drawn_lines(found["KL divergence"])) == 2  # kl is 0: nothing was off policy
    assert found["KL divergence"].get_ylabel() == "nats per token"
    assert found["Time of a step"].get_legend_handles_labels()[1] == [
        "generate", "verify", "update", "sync",
    ]  # fmt: skip


def test_several_runs_get_a_bar_each_and_their_seeds_a_band(tmp_path):
    runs = load(
        [
            folder(tmp_path / "a", full(5, 0.2), seed=1),
            folder(tmp_path / "b", full(5, 0.4), seed=2),
            folder(tmp_path / "c", full(5), learning_rate=1.0),
        ]
    )

    found = panels(lines(runs, group=True))

    first, second, *_ = drawn_lines(found["Reward"])
    np.testing.assert_allclose(first.get_ydata(), [0.3] * 5)
    np.testing.assert_allclose(second.get_ydata(), [0.5] * 5)
    assert first.get_color() != second.get_color()
    band = found["Reward"].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.2, 0.4))
    bars = found["Time of a step"].containers
    assert [bar.get_width() for bar in bars[0]] == [3.0, 3.0]
    assert len(bars) == 4


def test_runs_without_a_metric_and_with_gaps_are_drawn_without_a_warning(tmp_path):
    gaps = [row(step, reward=None if step % 2 else 0.5) for step in range(1, 9)]
    runs = load([folder(tmp_path / "a", gaps), folder(tmp_path / "b", [row(0, eval_reward=0.1)])])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = panels(lines(runs, group=False))
        plot.draw(lines(runs, group=False), tmp_path / "out.png")

    (sampled, _) = drawn_lines(found["Reward"])
    assert sampled.get_markevery() == [1, 3, 5, 7]  # values without a neighbour to draw a line to
    assert found["Entropy"].texts[0].get_text() == "not recorded"
    assert found["Time of a step"].texts[0].get_text() == "not recorded"


def test_names_that_mean_something_to_matplotlib_are_drawn_as_they_are(tmp_path):
    runs = [Run(name=name, config={}, rows=full(2)) for name in ("_a", "$x_$b^", "100%")]

    written = plot.draw([Line(label=r.name, runs=[r]) for r in runs], tmp_path / "out.svg")

    assert written.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "rlvr-fast plot: the following arguments are required: RUN"),
        ("nowhere", "run: wanted a folder with a config.json, got nowhere"),
        ("empty", "run: wanted steps in empty/metrics.jsonl, got none yet"),
        ("good --smooth 0", "smooth: wanted >= 1, got 0"),
        ("good --smooth x", "rlvr-fast plot: argument --smooth: invalid int value: 'x'"),
        ("good --out plot.gif", "out: wanted a file that ends in .png, .pdf, .svg, got plot.gif"),
        ("good --out no/plot.png", "out: wanted a file in a folder that exists, got no/plot.png"),
        ("good --group maybe", "rlvr-fast plot: argument --group: invalid choice: 'maybe'"),
        ("good " * 11, "runs: wanted at most 10 lines, got 11"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "good", full(2))
    folder(tmp_path / "empty", [])

    assert cli.main(["plot", *arguments.split()]) == 2

    error = capsys.readouterr().err
    assert error.startswith(f"rlvr-fast: {message}")
    assert error.count("\n") == 1


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    runs = load([folder(tmp_path / "a", full(2))])
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(ValueError, match=r"^plot: wanted matplotlib \(pip install matplotlib\)"):
        plot.draw(lines(runs, group=False), tmp_path / "out.png")


def test_a_real_run_is_drawn_into_its_folder(tmp_path, capsys):
    run = tmp_path / "run"
    train(config.load("tiny", {"run_folder": str(run), "steps": 2}))
    capsys.readouterr()

    assert cli.main(["plot", str(run)]) == 0

    assert capsys.readouterr().out == f"{run}/plot.png\n"
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG")
    found = panels(lines(load([run]), group=False))
    assert not [axes for axes in found.values() if axes.texts]  # nothing is missing
