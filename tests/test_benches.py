"""The benches at tiny sizes: what they measure with, what they write, and who is compared."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benches import cases, measure, parts, peers, plots, problems, shapes, suite
from benches.contenders import EVERYBODY, FLOOR, OURS, Contender, share_skipped
from benches.measure import Call, compare
from benches.report import Entry, Results, Table

ROOT = Path(__file__).resolve().parents[1]
QUICK_ONES = [c for c in EVERYBODY.values() if not c.setup and not c.cuda_only]
TABLE = Table(title="a title", rows=[{"": "one", "ms": 1234.5}, {"": "two", "ms": None}])


@pytest.fixture(scope="module")
def head() -> problems.Problem:
    return problems.problem(64, 32, 200)


def test_a_table_is_markdown_with_three_digits_that_count():
    lines = replace(TABLE, notes=["a note"]).markdown().splitlines()

    assert lines[0] == "### a title"
    assert lines[2:6] == ["|     |   ms |", "|-----|-----:|", "| one | 1234 |", "| two |    - |"]
    assert lines[-1] == "- a note"


def test_results_are_on_disk_after_every_case(tmp_path):
    results = Results(tmp_path, "cpu", "2026-01-02")

    results.save("part: case", Entry(tables=[TABLE], seconds={"one": [1.0, 2.0]}))
    results.save("part: other", Entry(left_out=["somebody: no time"]), skipped=True)

    found = json.loads(results.path.read_text())
    assert found["entries"]["part: case"]["seconds"] == {"one": [1.0, 2.0]}
    assert found["versions"]["torch"] == torch.__version__
    text = results.path.with_suffix(".md").read_text()
    assert "### a title" in text
    assert "- part: other: somebody: no time" in text


def test_a_stopped_run_resumes_unless_the_sources_have_changed(tmp_path, monkeypatch):
    results = Results(tmp_path, "cpu", "2026-01-02")
    results.save("part: done", Entry(tables=[TABLE]))
    results.save("part: left out", Entry(), skipped=True)
    results.save("part: failed", Entry(failed="ValueError: no"))

    again = Results(tmp_path, "cpu", "2026-01-02")
    monkeypatch.setattr(measure, "commit", lambda: "another")
    elsewhere = Results(tmp_path, "cpu", "2026-01-02")

    kept = ("part: done", "part: left out", "part: failed")
    assert [again.done(key) for key in kept] == [True, False, False]
    assert not elsewhere.done("part: done")


def test_a_case_that_raises_is_recorded_and_the_run_goes_on(tmp_path, capsys):
    def broken(seconds: float) -> Entry:
        raise RuntimeError("boom\nat length")

    results = Results(tmp_path, "cpu", "2026-01-02")
    tried = [
        parts.Case(name="broken", run=broken),
        parts.Case(name="works", run=lambda seconds: Entry(tables=[TABLE])),
    ]

    suite.run_cases(results, "part", tried, seconds=60)

    assert results.entries["part: broken"]["failed"] == "RuntimeError: boom"
    assert results.done("part: works")


def test_every_case_of_every_part_gets_time_unless_it_is_extra():
    on = parts.Machine(device="cpu", scale=parts.SCALES["cpu"], rate=1e12)

    for name, (make, _) in parts.PARTS.items():
        shares = {case.name: case.share for case in make(on)}
        total = sum(shares.values())
        small = [case for case, share in shares.items() if share < 0.01 * total]
        assert small == (["T=8192", "T=16384"] if name == "tokens" else [])


def test_plots_are_a_thousand_pixels_wide(tmp_path):
    from matplotlib import image

    results = Results(tmp_path, "cpu", "2026-01-02")
    for tokens in (1024, 2048, 4096):
        rows = [
            {"": n, "median ms": tokens * k, "x floor": k, "MB": k}
            for n, k in ((FLOOR, 1.0), (OURS, 1.1), ("torch", 3.0))
        ]
        facts = {"T": tokens, "D": 64, "V": 1000}
        results.save(
            f"tokens: T={tokens}", Entry(tables=[Table(title="t", rows=rows)], facts=facts)
        )
    results.save("policy_loss: dense", Entry(tables=[Table(title="t", rows=rows)], facts=facts))

    drawn = {path.stem.split("2026-01-02-")[1]: image.imread(path) for path in results.plots()}

    assert set(drawn) == {"time-tokens", "memory-tokens", "floor-tokens", "floor"}
    assert {picture.shape[1] for picture in drawn.values()} == {1000}


def test_labels_at_the_ends_of_lines_lie_apart():
    found = plots._apart([0.2, 0.5, 0.51, 0.52, 0.9], 0.05)

    gaps = [b - a for a, b in pairwise(found)]
    assert min(gaps) > 0.049
    assert found[0] == 0.2


def contender(name: str, **changes) -> Contender:
    return replace(EVERYBODY["torch"], name=name, **changes)


def plan(contenders, **changes):
    given = {"seconds": 1000.0, "rate": 1e9, "memory": 1e12} | changes
    return cases.plan(contenders, (64, 32, 200), "cpu", **given)


def test_a_short_budget_goes_to_the_first_ones():
    named = [contender(name, cost={"cpu": 10.0}) for name in ("first", "second", "third")]

    kept = [len(plan(named, seconds=seconds).contenders) for seconds in (1.0, 0.25, 0.14, 0.01)]

    assert kept == [3, 2, 1, 0]
    assert [c.name for c in plan(named, seconds=0.25).contenders] == ["first", "second"]
    assert "third: would take about" in plan(named, seconds=0.25).left_out[0]


def test_who_does_not_fit_the_memory_or_is_not_installed_is_left_out():
    large = contender("large", logit_bytes=100)
    absent = contender("absent", modules=("no_such_module",), install="nothing")

    found = plan([large, absent], memory=1e6)

    assert not found.contenders
    assert found.left_out[0] == "large: would need about 0 GB"
    assert found.left_out[1].endswith("No module named 'no_such_module' (pip install nothing)")


@pytest.mark.parametrize("workload", [shapes.DENSE, shapes.LENGTHS], ids=lambda w: w.name)
@pytest.mark.parametrize("who", QUICK_ONES, ids=lambda c: c.name)
def test_contenders_agree_with_fp64(who, workload, head):
    if who.missing("cpu"):
        pytest.skip(who.missing("cpu"))
    given = head.like(64, replace(workload, moved=0.4))
    exact = who.truth(given)

    errors = cases.distances(who.build(given)(), exact, given)

    assert max(errors.values()) <= cases.TOLERANCE


@pytest.mark.parametrize("who", [c for c in QUICK_ONES if c.score], ids=lambda c: c.name)
def test_contenders_score_as_fp64_does(who, head):
    if who.missing("cpu"):
        pytest.skip(who.missing("cpu"))

    found = who.score(head)()

    for own, true in zip(found, problems.true_scores(head), strict=True):
        assert own is None or (own.detach() - true).norm() <= cases.TOLERANCE * true.norm()


def test_padded_and_packed_hold_the_same_tokens():
    given = problems.problem(100, 4, 50, workload=shapes.LENGTHS)

    padded = given.padded(given.hidden)

    assert int(given.lengths.sum()) == 100
    assert padded.shape[:2] == (len(given.lengths), int(given.lengths.max()))
    assert torch.equal(given.unpadded(padded), given.hidden)


def test_workloads_are_what_they_say():
    torch.manual_seed(0)
    half = problems.problem(160, 16, 50, workload=shapes.zero_advantage(0.5))
    sure = problems.problem(64, 512, 500, workload=shapes.CONFIDENT)

    logp, entropy = problems.true_scores(sure)

    assert share_skipped(half) == pytest.approx(0.5)
    assert float(logp.min()) > -0.1
    assert float(entropy.max()) < 0.1


def test_times_are_compared_round_by_round():
    calls = [Call(name=name, run=lambda: None, work=1.0) for name in ("a", "b", "c")]

    timings = compare(calls, floor="b", rounds=3)

    assert [t.name for t in timings] == ["a", "b", "c"]
    assert timings[1].ratio == 1.0
    assert all(len(t.seconds) == 3 for t in timings)


def test_what_raises_is_told_in_one_line():
    assert peers.attempt(lambda: 1) == (1, None)
    assert peers.attempt(lambda: 1 / 0) == (None, "ZeroDivisionError: division by zero")


def test_the_suite_runs_a_part_and_then_finds_it_done(tmp_path, capsys):
    command = ["--quick", "--only", "rows", "--minutes", "0.1", "--out", str(tmp_path)]

    codes = suite.main(command), suite.main(command)

    assert codes == (0, 0)
    assert "rows: sweeps: done before" in capsys.readouterr().out
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".md"]


def test_the_gpu_suite_can_be_rehearsed_where_nothing_is_installed(tmp_path):
    """Without site, so that the editable install of the project is not seen."""
    site = Path(torch.__file__).parents[1]
    names = ["checks", "pieces", "ceilings", "bars", "budgets"]
    command = [
        sys.executable,
        "-S",
        ROOT / "benches/gpu_suite.py",
        "--rehearse",
        "--minutes",
        "3",
    ]
    command += [word for name in names for word in ("--only", name)] + ["--out", tmp_path]
    environment = {"PYTHONPATH": str(site), "RLVR_FAST_CACHE": str(tmp_path / "cache")}

    done = subprocess.run(
        command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = tmp_path.glob("*-rehearsal.json")
    entries = json.loads(path.read_text())["entries"]
    assert len([key for key in entries if key.startswith("check: ")]) > 30
    assert not [key for key, entry in entries.items() if entry["failed"] or entry["skipped"]]
