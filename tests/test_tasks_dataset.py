"""The task `dataset`: files, folders and the hub, and what is said of rows that are wrong."""

import json
import logging
import sys

import pytest

from rlvr_fast.rewards import score
from rlvr_fast.tasks import Example, load_task, user_message
from rlvr_fast.tasks.rows import hub_rows, read

GSM = {"question": "How many?", "answer": "2 + 3 = 5\n#### 5"}


def write(folder, rows, name="rows.jsonl"):
    """A file of JSON lines."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path, **options):
    return load_task("dataset", {"reward": "exact", "holdout": 0, "path": str(path), **options})


def numbered(count, **columns):
    return [{"prompt": f"Q{n}", "answer": n, **columns} for n in range(count)]


def asked(examples):
    return [example.prompt[0]["content"] for example in examples]


@pytest.mark.parametrize("kind", ["jsonl", "json", "json lines", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_examples(kind, tmp_path):
    rows = [
        {"prompt": 'What, "5"?\n', "answer": "5", "level": "a"},
        {"prompt": "\u00e9", "answer": "x"},
    ]
    suffix = kind.split()[0]
    path = tmp_path / f"rows.{suffix}"
    if kind == "json":
        path.write_text("\n" + json.dumps(rows, indent=1))
    elif kind == "csv":
        path.write_bytes(
            '\ufeffprompt,answer,level\r\n"What, ""5""?\n",5,a\r\n\r\n\u00e9,x,\r\n'.encode()
        )
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(tmp_path, rows, path.name)

    task = load(path, shuffle_seed=None)

    last = "" if kind == "csv" else None
    assert task.train == [
        Example(user_message('What, "5"?\n'), {"answer": "5", "level": "a"}),
        Example(user_message("\u00e9"), {"answer": "x", "level": last}),
    ]
    assert task.evaluation is task.train


def test_a_folder_is_read_by_split(tmp_path):
    write(tmp_path, numbered(2), "data/train-00000.jsonl")
    write(tmp_path, [{"prompt": "T", "answer": "t"}], "data/train-00001.jsonl")
    write(tmp_path, [{"prompt": "E", "answer": "e"}], "data/test.jsonl")
    write(tmp_path, [{"prompt": "D", "answer": "d"}], "data/dev.jsonl")
    (tmp_path / "README.md").write_text("not a row")

    task = load(tmp_path, eval_split="test", holdout=None, shuffle_seed=None)

    assert asked(task.train) == ["Q0", "Q1", "T"]
    assert asked(task.evaluation) == ["E"]
    assert len(load(tmp_path).train) == 5


def test_a_data_set_of_the_package_datasets_is_read_by_split(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(tmp_path, numbered(3), "train.jsonl")
    write(tmp_path, numbered(1), "test.jsonl")

    rows = list(hub_rows(str(tmp_path), "", "train"))

    assert [row.values for row in rows] == numbered(3)
    assert rows[2].place == f"{tmp_path} (train), row 3"


def test_gsm8k_is_configured_by_its_columns(tmp_path):
    path = write(tmp_path, [GSM])

    task = load(path, prompt="question", answer_after="####", reward="number")

    (example,) = task.train
    assert example.prompt == [{"role": "user", "content": "How many?"}]
    completions = ["so 5.00", "<answer>5</answer>", "6"]
    found = score(task.reward, ["?"] * 3, completions, {"answer": [example.columns["answer"]] * 3})
    assert found == [1.0, 1.0, 0.0]
    assert task.answer_key("it is 5.00") == "5"


def test_a_chat_goes_through_as_it_is(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    path = write(tmp_path, [{"chat": [{**chat[0], "name": None}, chat[1]], "answer": "a"}])

    assert load(path, messages="chat").train == [Example(chat, {"answer": "a"})]


def test_a_template_is_filled_by_plain_replacement(tmp_path):
    row = {"a": "{b} {b.__class__}", "b": 2, "answer": "x"}
    template = r"{a}, {b}; {b.__class__} {} \boxed{b}"

    task = load(write(tmp_path, [row]), template=template, chat=False)

    assert task.train == [Example(r"{b} {b.__class__}, 2; {b.__class__} {} \boxed{b}", row)]


def test_other_columns_reach_the_reward_function_and_the_prompt_does_not(tmp_path):
    rows = [{"prompt": "Q", "x": [1, {"y": None}]}, {"prompt": "R", "x": 2, "z": 1}]
    path = write(tmp_path, rows)

    task = load(path, reward="rlvr_fast.tasks.addition:sum_reward", answer="x", shuffle_seed=None)

    assert [example.columns for example in task.train] == [
        {"x": [1, {"y": None}], "z": None, "answer": [1, {"y": None}]},
        {"x": 2, "z": 1, "answer": 2},
    ]


@pytest.mark.parametrize("samples", [[3, None], ["3", ""]])
def test_a_prompt_may_have_a_group_size_of_its_own(tmp_path, samples):
    rows = [{**row, "samples": n} for row, n in zip(numbered(2), samples, strict=True)]

    task = load(write(tmp_path, rows), shuffle_seed=None)

    assert [example.samples for example in task.train] == [3, None]
    assert load(write(tmp_path, rows), samples="").train[0].columns["samples"] in samples


def test_the_group_size_of_an_example_is_a_count():
    with pytest.raises(ValueError, match=r"^samples: wanted an integer >= 1, got 0$"):
        Example("?", samples=0)


def test_rows_are_held_out_by_seed_and_limited(tmp_path):
    path = write(tmp_path, numbered(30))

    first, again, other = (load(path, holdout=5, shuffle_seed=seed) for seed in (1, 1, 2))
    limited = load(path, holdout=2, limit=6, shuffle_seed=None)
    by_default = load(path, holdout=None)

    assert first == again
    assert sorted(asked(first.train) + asked(first.evaluation)) == sorted(asked(load(path).train))
    assert asked(first.evaluation) != asked(other.evaluation)
    assert (asked(limited.evaluation), asked(limited.train)) == (
        ["Q0", "Q1"],
        ["Q2", "Q3", "Q4", "Q5"],
    )
    assert (len(by_default.train), len(by_default.evaluation)) == (27, 3)


def test_what_is_evaluated_on_is_not_trained_on(tmp_path, caplog):
    train = write(tmp_path, numbered(5), "a.jsonl")
    test = write(tmp_path, [{"prompt": "Q3", "answer": "other"}], "b.jsonl")

    with caplog.at_level(logging.INFO, "rlvr_fast"):
        task = load(train, eval_path=test, holdout=None, shuffle_seed=None)

    assert asked(task.train) == ["Q0", "Q1", "Q2", "Q4"]
    assert asked(task.evaluation) == ["Q3"]
    assert "1 training rows left out" in caplog.text
    with pytest.raises(ValueError, match=r"^path: wanted prompts that are not evaluated on"):
        load(train, eval_path=train, holdout=None)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, ": wanted at least one row, got none"),
        ("\n\n", {}, ": wanted at least one row, got none"),
        ('{"prompt": "a"}\n\n{"prompt"\n', {}, ", row 3: wanted JSON, got: Expecting ':'"),
        ("[" * 100_000, {}, ", row 1: wanted JSON, got: maximum recursion depth"),
        ("[1]\n", {}, ", row 1: wanted a JSON object of columns, got list"),
        (b"\xff\n", {}, ": wanted UTF-8, got 'utf-8' codec can't decode byte 0xff"),
        ('{"text": "a"}', {}, ", row 1: wanted a column (prompt|answer), got ['text']"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}', {}, ", row 2: wanted a column answer"),
        ('{"prompt": 7, "answer": "b"}', {}, ", row 1, column prompt: wanted text, got 7"),
        ('{"prompt": [], "answer": "b"}', {}, "column prompt: wanted text, got []; a chat goes by"),
        ('{"prompt": " ", "answer": "b"}', {}, "column prompt: wanted text that is not empty, got"),
        ('{"prompt": "a", "answer": null}', {}, ", row 1, column answer: wanted text, got None"),
        ('{"prompt": "a", "answer": "b", "samples": 0}', {}, "column samples: wanted an integer"),
        ('{"prompt": "a", "answer": "b", "samples": true}', {}, "samples: wanted an integer >= 1"),
        ('{"prompt": "a", "answer": "b", "prompts": 1}', {}, ": wanted no column named prompts"),
        ('{"prompt": "a", "answer": "b", "completions": 1}', {}, "wanted no column named completi"),
        ('{"prompt": "a", "answer": "b"}', {"reward": "number"}, "wanted a number, got 'b'"),
        (
            '{"prompt": "a", "answer": "5 ####"}',
            {"answer_after": "####"},
            ", row 1, column answer: wanted text with #### and the answer, got '5 ####'",
        ),
        ('{"m": "hi", "answer": "b"}', {"messages": "m"}, "column m: wanted a list of {role, cont"),
        ('{"m": [{"role": "user"}], "answer": "b"}', {"messages": "m"}, "text as role and content"),
        (
            '{"m": [{"role": "assistant", "content": "hi"}], "answer": "b"}',
            {"messages": "m"},
            "column m: wanted a last message that asks something",
        ),
        ('{"a": "b", "answer": "b"}', {"template": "{q}"}, ", row 1: wanted a column q, got ['a'"),
        ('{"a": [], "answer": "b"}', {"template": "{a}"}, "column a: wanted text or a number for"),
        ('{"a": "b", "answer": "b"}', {"template": "a"}, "template: wanted text with a {column}"),
        ('{"prompt": "a", "x": 1, "answer": "b"}', {"answer": "x"}, "without a column answer"),
    ],
)  # fmt: skip
def test_a_row_that_makes_no_example_is_named(text, options, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is what is tested
        load(path, **options)

    assert message.replace("(prompt|answer)", "answer") in str(caught.value)
    assert options.keys() & {"template"} or "rows.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "rows.csv",
            "a,a\n1,2\n",
            r"rows.csv: wanted columns of different names, got \['a', 'a'\]",
        ),
        ("rows.csv", 'a,b\n"1\n",2\n3\n', "rows.csv, row 4: wanted 2 columns, got 1"),
        ("rows.csv", 'a\n"b"c\n', "rows.csv, row 2: wanted CSV, got: "),
        ("rows.json", "[1]", "rows.json, row 1: wanted a JSON object of columns, got int"),
        ("rows.json", "[", "rows.json: wanted JSON, got: "),
        ("rows.parquet", "no parquet", "rows.parquet: wanted Parquet, got: "),
        ("rows.txt", "a", r"path: wanted a file of .jsonl, .json, .parquet, .csv, got .*rows.txt"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, text, message, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_text(text)

    with pytest.raises(ValueError, match=message):
        read(str(path))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": "no/such.jsonl"}, FileNotFoundError, "path: wanted a file, a folder or a hub id"),
        ({"path": "./nothing/at/all"}, FileNotFoundError, "path: wanted a file, a folder or a hub"),
        ({"split": "dev"}, FileNotFoundError, "wanted files dev.*, got rows.jsonl"),
        ({"name": "main"}, ValueError, "name: wanted none, since .* is no data set of the hub"),
        ({"holdout": 3}, ValueError, "holdout: wanted less than the 3 rows, got 3"),
        ({"holdout": 1, "eval_split": "rows"}, ValueError, "holdout: wanted none, since eval_path"),
        ({"limit": 0}, ValueError, "limit: wanted >= 1, got 0"),
        ({"prompt": "a", "template": "{b}"}, ValueError, "prompt: wanted one of prompt, messages"),
        (
            {"rewards": "exact"},
            ValueError,
            "unknown option of task dataset rewards; the nearest is",
        ),
        ({"reward": "sum"}, ValueError, "reward: wanted one of exact, number, contains, math or"),
    ],
)
def test_options_that_make_no_data_set_are_refused(options, error, message, tmp_path):
    write(tmp_path, numbered(3))

    with pytest.raises(error, match=message):
        load(**{"path": tmp_path, **options})


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_text("")
    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(
        ImportError, match=r"rows.parquet: Parquet needs pyarrow: pip install pyarr"
    ):
        load(tmp_path)
    with pytest.raises(
        ImportError, match=r"^path: openai/gsm8k is no file .* pip install datasets"
    ):
        load("openai/gsm8k")
