"""A data set of your own, from a file, a folder or the Hugging Face hub, and a reward by name.

GSM8K, whose answers end in `#### 72`, is

    task = "dataset"
    [task_options]
    path = "openai/gsm8k"
    name = "main"
    eval_split = "test"
    prompt = "question"
    answer_after = "####"
    reward = "number"

Without the hub: `path = "gsm8k"`, a folder with `train-*.parquet` and `test-*.parquet` in it.
"""

import logging
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlvr_fast import options as settings
from rlvr_fast.rewards.answers import last_number
from rlvr_fast.rewards.named import Named, check_takes, load_reward
from rlvr_fast.tasks import Example, Prompt, Task, user_message
from rlvr_fast.tasks.rows import Row, read

_LOG = logging.getLogger(__name__)
_RESERVED = ("prompts", "completions", "self")  # arguments of every reward function
# A word in braces, unless it is the argument of a LaTeX command.
_PLACEHOLDER = re.compile(r"(\\[A-Za-z]+)?\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Where rows come from, and which columns are the prompt, the answer and the reward's."""

    path: str
    """A .jsonl, .json, .parquet or .csv file, a folder of them, or the id of a hub data set."""
    reward: str
    """exact, number, contains, math, or your own as module:function or path/to/file.py:function."""
    name: str = ""
    """Configuration of a hub data set."""
    split: str = ""
    """To train on; empty: train. In a folder: files whose names start with it; empty: all."""
    eval_path: str = ""
    """Rows to evaluate on, as for path; empty: from path."""
    eval_split: str = ""
    """Split to evaluate on; with neither this nor eval_path, rows of path are held out."""
    prompt: str = ""
    """Column with the prompt's text; empty: prompt."""
    messages: str = ""
    """Instead: column with a chat, a list of {role, content}."""
    template: str = ""
    """Instead: text in which every {column} is replaced by what the row has there."""
    chat: bool = True
    """Ask in a user message; else the text is the prompt. A chat stays a chat."""
    answer: str = ""
    """Column that the reward function gets as `answer`; empty: answer."""
    answer_after: str = ""
    """The answer is what follows the last one of these in its column, such as ####."""
    samples: str = "samples"
    """Column, where there is one, with the number of completions to sample of a prompt."""
    holdout: int | None = None
    """Rows held out for evaluation, 0: evaluate on the training rows; none: a tenth, at most 64."""
    limit: int | None = None
    """Use so many rows of path, those held out included; none: all."""
    shuffle_seed: int | None = 0
    """Of the order in which rows are held out and limited; none: the order of the files."""

    def __post_init__(self) -> None:
        ways = [name for name in ("prompt", "messages", "template") if getattr(self, name)]
        if len(ways) > 1:
            raise ValueError(f"prompt: wanted one of prompt, messages, template, got {ways}")
        for name, least in (("holdout", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: wanted >= {least}, got {value}")
        if self.holdout is not None and (self.eval_path or self.eval_split):
            raise ValueError(
                f"holdout: wanted none, since eval_path or eval_split is given, got {self.holdout}"
            )


def load(options: Mapping[str, Any]) -> Task:
    """The task `dataset` with `options` of `DatasetOptions`.

    All columns but the prompt's go to the reward function by name, a list with one entry per
    completion; None where a row lacks one. A training row whose prompt is also one to evaluate on
    is left out.

    Raises:
        ValueError: for an unknown option, and for a row that makes no example; the message names
            the file, the row (from 1) and the column.
        ImportError: where a package is missing.
        OSError: for a file that cannot be read.
    """
    chosen = settings.build("option of task dataset", DatasetOptions, options)
    verifier = load_reward(chosen.reward)
    rows, held_out = _split(chosen)
    train, evaluation = (_examples(part, chosen, verifier) for part in (rows, held_out))
    for examples in filter(None, (train, evaluation)):
        check_takes(verifier.reward, examples[0].columns)
    if evaluation:
        train = _disjoint(train, evaluation)
    return Task("dataset", train, evaluation or train, verifier.reward, verifier.answer_key)


def _split(chosen: DatasetOptions) -> tuple[list[Row], list[Row]]:
    """Rows to train and to evaluate on."""
    separate = bool(chosen.eval_path or chosen.eval_split)
    split = chosen.split or ("train" if chosen.eval_split and not chosen.eval_path else "")
    rows = read(chosen.path, name=chosen.name, split=split)
    if chosen.shuffle_seed is not None:
        random.Random(chosen.shuffle_seed).shuffle(rows)
    rows = rows[: chosen.limit]
    if separate:
        path = chosen.eval_path or chosen.path
        name = chosen.name if path == chosen.path else ""
        return rows, read(path, name=name, split=chosen.eval_split)
    holdout = min(64, len(rows) // 10) if chosen.holdout is None else chosen.holdout
    if holdout >= len(rows):
        raise ValueError(f"holdout: wanted less than the {len(rows)} rows, got {holdout}")
    return rows[holdout:], rows[:holdout]


def _disjoint(train: Sequence[Example], evaluation: Sequence[Example]) -> list[Example]:
    asked = {repr(example.prompt) for example in evaluation}
    kept = [example for example in train if repr(example.prompt) not in asked]
    if not kept:
        raise ValueError(
            "path: wanted prompts that are not evaluated on as well, got none; with holdout = 0 "
            "the training rows are evaluated on"
        )
    if len(kept) < len(train):
        _LOG.info("dataset: %d training rows left out: held out", len(train) - len(kept))
    return kept


def _examples(rows: Sequence[Row], chosen: DatasetOptions, verifier: Named) -> list[Example]:
    names = dict.fromkeys(name for row in rows for name in row.values)
    for name in names:
        if name in _RESERVED:
            raise ValueError(
                f"{rows[0].source}: wanted no column named {name}, which the trainer passes to "
                f"reward functions itself"
            )
    if chosen.answer not in ("", "answer") and "answer" in names:
        raise ValueError(
            f"answer: wanted {rows[0].source} without a column answer besides {chosen.answer}"
        )
    own = [name for name in names if name not in _prompt_columns(chosen)]
    return [_example(row, own, chosen, verifier) for row in rows]


def _prompt_columns(chosen: DatasetOptions) -> tuple[str, ...]:
    """Those that no reward function gets."""
    return (_text_column(chosen), chosen.messages, chosen.samples)


def _text_column(chosen: DatasetOptions) -> str:
    return "" if chosen.messages or chosen.template else chosen.prompt or "prompt"


def _example(row: Row, own: Iterable[str], chosen: DatasetOptions, verifier: Named) -> Example:
    columns = {name: row.values.get(name) for name in own}
    answer = chosen.answer or "answer"
    if verifier.needs or chosen.answer or chosen.answer_after:
        columns["answer"] = _answer(row, _cell(row, answer), chosen, verifier)
    return Example(_prompt(row, chosen), columns, samples=_samples(row, chosen.samples))


def _prompt(row: Row, chosen: DatasetOptions) -> Prompt:
    if chosen.messages:
        return _chat(row, chosen.messages)
    if chosen.template:
        column, text = "template", _filled(chosen.template, row)
    else:
        column = _text_column(chosen)
        text = _cell(row, column)
        if not isinstance(text, str):
            hint = "; a chat goes by the option messages" if isinstance(text, list) else ""
            raise _refusal(row, column, "text", text, hint)
    if not text.strip():
        raise _refusal(row, column, "text that is not empty", text)
    return user_message(text) if chosen.chat else text


def _chat(row: Row, column: str) -> Prompt:
    value = _cell(row, column)
    if not isinstance(value, list) or not value:
        raise _refusal(row, column, "a list of {role, content}", value)
    for message in value:
        texts = message if isinstance(message, dict) else {}
        if not all(isinstance(texts.get(name), str) for name in ("role", "content")):
            raise _refusal(row, column, "messages with text as role and content", message)
    last = value[-1]
    if last["role"] == "assistant" or not last["content"].strip():
        raise _refusal(row, column, "a last message that asks something", last)
    # Parquet has a None for every key that another message has.
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def _filled(template: str, row: Row) -> str:
    """Plain replacement: `str.format` would let a template read attributes."""

    def text(match: re.Match[str]) -> str:
        if match[1]:
            return match[0]
        value = _cell(row, match[2])
        if type(value) not in (str, int, float):
            raise _refusal(row, match[2], "text or a number for the template", value)
        return str(value)

    filled, placeholders = _PLACEHOLDER.subn(text, template)
    if not placeholders:
        raise ValueError(f"template: wanted text with a {{column}} in it, got {template!r}")
    return filled


def _answer(row: Row, value: Any, chosen: DatasetOptions, verifier: Named) -> Any:
    column = chosen.answer or "answer"
    if chosen.answer_after:
        _, mark, after = value.rpartition(chosen.answer_after) if type(value) is str else ("",) * 3
        if not (mark and after.strip()):
            raise _refusal(row, column, f"text with {chosen.answer_after} and the answer", value)
        value = after.strip()
    if not verifier.needs:
        return value
    text = str(value) if type(value) in (str, int, float) else ""
    if not text.strip() or (verifier.needs == "a number" and last_number(text) is None):
        raise _refusal(row, column, verifier.needs, value)
    return text


def _samples(row: Row, column: str) -> int | None:
    value = row.values.get(column) if column else None
    if isinstance(value, str) and value.strip().isdecimal():  # CSV knows no numbers
        value = int(value) if len(value) < 10 else value
    if value in (None, ""):
        return None
    if type(value) is not int or value < 1:
        raise _refusal(row, column, "an integer >= 1", value, '; samples = "" ignores the column')
    return value


def _cell(row: Row, column: str) -> Any:
    if column not in row.values:
        raise ValueError(f"{row.place}: wanted a column {column}, got {sorted(row.values)}")
    return row.values[column]


def _refusal(row: Row, column: str, wanted: str, got: Any, hint: str = "") -> ValueError:
    shown = repr(got)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return ValueError(f"{row.place}, column {column}: wanted {wanted}, got {shown}{hint}")
