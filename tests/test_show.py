import json
import random
import unicodedata
from pathlib import Path

import pytest

from rlvr_fast import cli, config, show
from rlvr_fast.run import train
from rlvr_fast.show import Layout, columns_of, plain, wrapped

HOSTILE = (
    "\x1b]0;title\x07\x1b[2J\x1b[31mred\x9b5n\r over\x08\x00 \x7f \u202egnp\u2066 \u200b\ufeff "
    "\u2028 \udcff \U000e0041 \x85 end"
)


def completion(step, prompt, text, reward, **more):
    row = {"step": step, "prompt": prompt, "completion": text, "reward": reward}
    return row | {"tokens": 3, "finished": True} | more


def folder(at, rows):
    at.mkdir()
    (at / "config.json").write_text("{}")
    steps = sorted({row["step"] for row in rows})
    numbers = [{"step": s, "reward": 0.25, "length": 3.0, "sequences": 64.0} for s in steps]
    for name, each in (("metrics", numbers or [{"step": 0}]), ("completions", rows)):
        (at / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return at


def neutral(text):
    return [c for c in text if unicodedata.category(c)[0] == "C" and c != "\n"] == []


def test_what_a_terminal_might_obey_is_shown_as_escapes(tmp_path):
    row = completion(1, HOSTILE, HOSTILE, 1.0, task=HOSTILE)
    chat = completion(1, [{"role": HOSTILE, "content": HOSTILE}], HOSTILE, 1.0)
    run = folder(tmp_path / "run", [row, chat])

    page = show.page(run, None, Layout(width=80))

    assert not neutral(HOSTILE)
    assert neutral(page)
    assert "\u2028" not in page
    assert neutral(show.comparison(run, run, None, Layout(width=80)))
    assert plain("\x1b[0m\u202e\U000e0041\r\tx") == r"\x1b[0m\u202e\U000e0041\x0d    x"
    assert plain("naïve 漢字 🙂\n") == "naïve 漢字 🙂\n"


def test_wrapped_lines_fit_and_lose_nothing_but_the_spaces_they_are_cut_at():
    words = random.Random(0).choices(["a", "wort", "x" * 50, "漢字かな" * 5, "e\u0301", ""], k=400)
    text = " ".join(words).replace("wort wort", "wort\nwort")

    for width in (20, 37, 100):
        lines = wrapped(text, width)
        assert max(map(columns_of, lines)) <= width
        joined = "".join(lines).replace(" ", "")
        assert joined == text.replace(" ", "").replace("\n", "")
    assert wrapped("one two three", 8) == ["one two", "three"]
    assert wrapped("a\n\nb", 8) == ["a", "", "b"]
    assert wrapped("漢字かな", 5) == ["漢字", "かな"]
    assert wrapped("漢", 1) == ["漢"]


def test_completions_of_a_prompt_stand_side_by_side_the_best_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        completion(7, "2+2=", "five", 0.0, advantage=-0.5, sample=0, group=0),
        completion(7, "2+2=", "four", 1.0, advantage=1.5, sample=3, group=0, finished=False),
        completion(7, "2+2=", "?", None, sample=5, tokens=1),
        completion(6, "1+1=", "two", 1.0),
    ]

    page = show.page(folder(Path("run"), rows), None, Layout(width=124))

    title, *lines = page.split("\n")
    table = [[cell.strip() for cell in line.split(" |")] for line in lines[4:]]
    assert title == "run, step 7, mean reward 0.25, mean length 3, 3 of 64 completions"
    assert lines[:4] == ["", "=" * 124, "2+2=", ""]
    assert table == [
        ["reward 1, advantage +1.5, 3 tokens, cut", "reward 0, advantage -0.5, 3 tokens,",
         "unscored, 1 token, sample 5"],
        ["off, sample 3", "sample 0", ""],
        ["-" * 39] * 3,
        ["four", "five", "?"],
    ]  # fmt: skip


def test_columns_are_as_many_as_the_width_allows(tmp_path):
    rows = [completion(1, "p", f"text-{i}", float(-i)) for i in range(5)]
    run = folder(tmp_path / "run", rows)

    def beside(width):
        page = show.page(run, 1, Layout(width=width))
        assert max(map(columns_of, page.split("\n")[1:])) <= width
        return [line.split(" | ") for line in page.split("\n") if line.startswith("text-")]

    assert [len(line) for line in beside(38)] == [1] * 5
    assert [len(line) for line in beside(79)] == [2, 2, 1]
    assert [len(line) for line in beside(500)] == [5]


def test_long_texts_and_further_prompts_are_counted(tmp_path):
    rows = [completion(1, f"prompt {i}", "a line\n" * 50, 1.0) for i in range(6)]

    page = show.page(folder(tmp_path / "run", rows), 1, Layout(width=60, lines=10, prompts=2))

    assert page.count("a line") == 20
    assert page.count("[41 more lines]") == 2
    assert "prompt 1" in page
    assert "prompt 2" not in page
    assert page.endswith("[4 more prompts: --prompts 6]")


def test_a_chat_is_shown_with_its_roles_and_a_task_with_its_name(tmp_path):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"}]
    run = folder(tmp_path / "run", [completion(1, chat, "4", 1.0, task="sums")])

    assert "[sums] system: be brief\nuser: 2+2?\n" in show.page(run, 1, Layout())


def test_two_runs_stand_side_by_side_where_their_prompts_are_the_same(tmp_path):
    first = [completion(4, "p", "from a", 1.0), completion(4, "p", "and a", 0.5)]
    first += [completion(4, "only a", "x", 1.0), completion(5, "only a", "x", 1.0)]
    second = [completion(4, "p", "from b", 0.0), completion(5, "only b", "y", 1.0)]
    a, b = folder(tmp_path / "a", first), folder(tmp_path / "b", second)

    page = show.comparison(a, b, None, Layout(width=200))

    assert ", step 4, " in page
    assert "only" not in page
    texts = [line.split(" |") for line in page.split("\n") if line.startswith(("from", "and"))]
    cells = [[cell.strip() for cell in line] for line in texts]
    assert cells == [["from a", "from b"], ["and a", ""]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "rlvr-fast show: the following arguments are required: RUN"),
        ("nowhere", "run: wanted a folder with a config.json, got nowhere"),
        ("none", "run: wanted completions in none/completions.jsonl, got none"),
        ("good --step 9", "step: wanted one of 1-3, 5, which good has, got 9"),
        ("good --width 10", "width: wanted >= 20, got 10"),
        ("good --prompts 0", "prompts: wanted >= 1, got 0"),
        ("good --lines 0", "lines: wanted >= 1, got 0"),
        ("good --against nowhere", "run: wanted a folder with a config.json, got nowhere"),
        ("good --against other", "against: wanted a run with prompts of good in the same steps"),
        ("good --against good --step 4", "step: wanted one of 1-3, 5, which good has, got 4"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "good", [completion(step, "p", "t", 1.0) for step in (1, 2, 3, 5)])
    folder(tmp_path / "other", [completion(1, "q", "t", 1.0)])
    folder(tmp_path / "none", [])

    assert cli.main(["show", *arguments.split()]) == 2

    error = capsys.readouterr().err
    assert error.startswith(f"rlvr-fast: {message}")
    assert error.count("\n") == 1


def test_a_real_run_is_shown_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    train(config.load("tiny", {"run_folder": str(run), "steps": 2, "log_completions": 6}))
    capsys.readouterr()

    assert cli.main(["show", str(run), "--step", "1", "--width", "90"]) == 0

    shown = capsys.readouterr().out
    assert shown.startswith("run, step 1, mean reward 0.0")
    assert shown.count("=" * 90) == 3
    assert shown.count("sample ") == 6


def test_an_output_that_cannot_write_a_character_gets_its_escape(tmp_path, monkeypatch):
    import io
    import sys

    run = folder(tmp_path / "run", [completion(1, "p", "漢", 1.0)])
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))

    assert cli.main(["show", str(run)]) == 0

    assert b"\\u6f22" in written.getvalue()
