"""Completions of a training step as text to read, side by side.

What a model wrote may be hostile: no control character of it reaches a terminal.
"""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

from rlvr_fast import metrics
from rlvr_fast.metrics import Row

NARROWEST, GAP = 38, " | "
"""Terminal columns of a completion, unless the page itself has fewer; what stands between two."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How much is shown.

    Raises:
        ValueError: for a width below 20, and for no lines or prompts.
    """

    width: int = 100
    """Of a line, in columns of a terminal."""
    lines: int = 24
    """Of each prompt and completion; what is left out is counted."""
    prompts: int = 4

    def __post_init__(self) -> None:
        for name, least in (("width", 20), ("lines", 1), ("prompts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: wanted >= {least}, got {getattr(self, name)}")


def page(run: Path, step: int | None, layout: Layout) -> str:
    """The completions of a step by prompt, those with the best reward first.

    Args:
        run: folder.
        step: None: the last one with completions.
        layout: how much is shown.

    Raises:
        ValueError: for a folder without a run, or a step without completions.
    """
    rows = _rows(run)
    step = _step(run, [row["step"] for row in rows], step)
    prompts = _by_prompt(row for row in rows if row["step"] == step)
    lines = _title(run, step, sum(map(len, prompts.values())), layout.width)
    for completions in list(prompts.values())[: layout.prompts]:
        lines += _prompt(completions[0], layout)
        cells = [(_head(row), row["completion"]) for row in completions]
        fitting = max((layout.width + len(GAP)) // (NARROWEST + len(GAP)), 1)
        lines += _columns(cells, layout, min(len(cells), fitting))
    return "\n".join(lines + _left_out(len(prompts), layout))


def comparison(run: Path, other: Path, step: int | None, layout: Layout) -> str:
    """What two runs answered to the same prompts in the same step, one in each column.

    Args:
        run: folder.
        other: folder of the second run.
        step: None: the last one in which both have completions of the same prompt.
        layout: how much is shown.

    Raises:
        ValueError: as `page`, and where no prompt is the same.
    """
    both = [_rows(run), _rows(other)]
    common = set.intersection(*({(row["step"], _key(row)) for row in rows} for rows in both))
    if not common:
        raise ValueError(f"against: wanted a run with prompts of {run} in the same steps, "
                         f"got {other}")  # fmt: skip
    step = _step(run, [number for number, _ in common], step)
    left, right = (_by_prompt(row for row in rows if row["step"] == step) for rows in both)
    shared = [prompt for prompt in left if prompt in right]
    lines = [
        line
        for folder, found in ((run, left), (other, right))
        for line in _title(folder, step, sum(map(len, found.values())), layout.width)
    ]
    names = [plain(str(run)), plain(str(other))]
    for prompt in shared[: layout.prompts]:
        lines += _prompt(left[prompt][0], layout)
        for pair in zip_longest(left[prompt], right[prompt]):
            cells = [
                (f"{name}: {_head(row)}", row["completion"]) if row else (name, "")
                for name, row in zip(names, pair, strict=True)
            ]
            lines += _columns(cells, layout, len(cells))
    return "\n".join(lines + _left_out(len(shared), layout))


def plain(text: str) -> str:
    """The same with what a terminal might obey, or not show, as visible escapes.

    That is every character of the Unicode categories C (controls, escapes, changes of direction,
    surrogates, unassigned) and of the line and paragraph separators, but for newlines; tabs
    become four spaces.
    """
    text = text.replace("\t", "    ")
    return "".join(c if c == "\n" or not _hidden(c) else _escaped(c) for c in text)


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many terminal columns, cut at spaces where there are any."""
    found: list[str] = []
    for line in text.split("\n"):
        rest = line
        while (cut := _fitting(rest, width)) < len(rest):
            space = rest.rfind(" ", 1, cut + 1)
            end = space if space > 0 else cut
            found.append(rest[:end])
            rest = rest[end:].removeprefix(" ")
        found.append(rest)
    return found


def columns_of(text: str) -> int:
    """How many columns of a terminal a line of text takes."""
    return sum(map(_width, text))


def _rows(run: Path) -> list[Row]:
    metrics.check_run(run)
    rows = metrics.read_completions(run)
    if not rows:
        raise ValueError(f"run: wanted completions in {run / metrics.COMPLETIONS}, got none")
    return rows


def _step(run: Path, known: Iterable[int], wanted: int | None) -> int:
    steps = sorted(set(known))
    if wanted is not None and wanted not in steps:
        raise ValueError(f"step: wanted one of {_ranges(steps)}, which {run} has, got {wanted}")
    return steps[-1] if wanted is None else wanted


def _ranges(numbers: Sequence[int]) -> str:
    """As 1-4, 7."""
    runs = [
        [number for _, number in group]
        for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _key(row: Row) -> str:
    return json.dumps(row["prompt"], sort_keys=True)


def _by_prompt(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_key(row), []).append(row)
    unscored = float("-inf")
    return {
        prompt: sorted(group, key=lambda row: -(unscored if row["reward"] is None
                                                else row["reward"]))
        for prompt, group in found.items()
    }  # fmt: skip


def _title(run: Path, step: int, shown: int, width: int) -> list[str]:
    values = next((row for row in metrics.read(run) if row["step"] == step), {})
    parts = [f"{plain(str(run))}, step {step}"]
    for name in ("reward", "length"):
        if values.get(name) is not None:
            parts.append(f"mean {name} {values[name]:.4g}")
    sampled = values.get("sequences")
    parts.append(f"{shown} of {sampled:.0f} completions" if sampled else f"{shown} completions")
    return wrapped(", ".join(parts), width)


def _prompt(row: Row, layout: Layout) -> list[str]:
    text = row["prompt"] if isinstance(row["prompt"], str) else _chat(row["prompt"])
    task = f"[{plain(row['task'])}] " if row.get("task") else ""
    return ["", "=" * layout.width, *_cut(f"{task}{plain(text)}", layout.width, layout.lines)]


def _chat(messages: Sequence[dict[str, Any]]) -> str:
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)


def _head(row: Row) -> str:
    reward = "unscored" if row["reward"] is None else f"reward {row['reward']:.4g}"
    tokens = f"{row['tokens']} token{'' if row['tokens'] == 1 else 's'}"
    parts = [reward, tokens if row["finished"] else f"{tokens}, cut off"]
    if row.get("advantage") is not None:
        parts.insert(1, f"advantage {row['advantage']:+.3g}")
    if row.get("sample") is not None:
        parts.append(f"sample {row['sample']}")
    return ", ".join(parts)


def _columns(cells: Sequence[tuple[str, str]], layout: Layout, count: int) -> list[str]:
    """Heads and texts, `count` beside each other, in as many rows as it takes."""
    width = (layout.width - len(GAP) * (count - 1)) // count
    lines: list[str] = []
    for start in range(0, len(cells), count):
        cut = cells[start : start + count]
        heads = [wrapped(head, width) for head, _ in cut]
        tall = max(map(len, heads))
        block = [
            [
                *head,
                *[""] * (tall - len(head)),
                "-" * width,
                *_cut(plain(text), width, layout.lines),
            ]
            for head, (_, text) in zip(heads, cut, strict=True)
        ]
        lines.append("")
        for parts in zip_longest(*block, fillvalue=""):
            padded = [part + " " * (width - columns_of(part)) for part in parts]
            lines.append(GAP.join(padded).rstrip())
    return lines


def _cut(text: str, width: int, most: int) -> list[str]:
    lines = wrapped(text, width)
    if len(lines) <= most:
        return lines
    note = f"[{len(lines) - most} more lines]"
    return [*lines[:most], *wrapped(note, width)]


def _left_out(prompts: int, layout: Layout) -> list[str]:
    more = prompts - layout.prompts
    return ["", f"[{more} more prompts: --prompts {prompts}]"] if more > 0 else []


def _hidden(character: str) -> bool:
    category = unicodedata.category(character)
    return category.startswith("C") or category in ("Zl", "Zp")


def _escaped(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fitting(line: str, width: int) -> int:
    """How many characters of the line fit in so many columns; at least one."""
    used = 0
    for i, character in enumerate(line):
        used += _width(character)
        if used > width:
            return max(i, 1)
    return len(line)
