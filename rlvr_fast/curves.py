"""Runs as numbers over training steps: read, smoothed, seeds of the same config together."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from rlvr_fast import metrics
from rlvr_fast.config import FREE_ON_RESUME

Numbers: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float64]]
_SEED_ONLY = {"seed"} | (FREE_ON_RESUME - {"steps", "eval_prompts"})
"""Config fields in which two runs of the same training may differ."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is drawn of a run."""

    name: str
    config: Mapping[str, Any]
    rows: Sequence[metrics.Row]


@dataclass(frozen=True, kw_only=True)
class Line:
    """Runs that are drawn as one line: several are its seeds."""

    label: str
    runs: Sequence[Run]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric over training steps; NaN where nobody measured it."""

    steps: Numbers
    mean: Numbers
    """Over the runs."""
    low: Numbers
    high: Numbers


def load(folders: Sequence[Path]) -> list[Run]:
    """The runs, named by their folders' last parts, or whole paths where those are the same.

    Raises:
        ValueError: for a folder without a run, and for a run without any step.
    """
    for folder in folders:
        metrics.check_run(folder)
    last = [folder.resolve().name for folder in folders]
    names = last if len(set(last)) == len(last) else list(map(str, folders))
    return [
        Run(
            name=name,
            config=json.loads((folder / "config.json").read_text()),
            rows=metrics.read(folder),
        )
        for name, folder in zip(names, folders, strict=True)
    ]


def lines(runs: Sequence[Run], *, group: bool) -> list[Line]:
    """One line for each run, or with `group` for each set of runs that only differ by their seed.

    What changes neither the training nor what it is evaluated on, such as the device, does not
    tell runs apart.
    """
    sets: dict[str, list[Run]] = {}
    for number, run in enumerate(runs):
        same = {name: value for name, value in run.config.items() if name not in _SEED_ONLY}
        key = json.dumps(same, sort_keys=True) if group else str(number)
        sets.setdefault(key, []).append(run)
    return [Line(label=_label(members), runs=members) for members in sets.values()]


def curve(runs: Sequence[Run], metric: str, smooth: int) -> Curve | None:
    """The metric's running mean over `smooth` steps, then its mean, lowest and highest over runs.

    Args:
        runs: at least one.
        metric: a key of the rows.
        smooth: measurements of a run that are averaged: each with those before it.

    Returns:
        None if no run has a number for it.
    """
    steps = sorted({row["step"] for run in runs for row in run.rows if metric in row})
    table = np.full((len(runs), len(steps)), np.nan)
    for own, run in zip(table, runs, strict=True):
        found = {row["step"]: row[metric] for row in run.rows if metric in row}
        places = [i for i, step in enumerate(steps) if step in found]
        values = [found[steps[i]] for i in places]
        own[places] = running_mean([math.nan if v is None else v for v in values], smooth)
    known = ~np.isnan(table)
    if not known.any():
        return None
    count = known.sum(axis=0)
    some = np.where(count > 0, 1.0, np.nan)
    return Curve(
        steps=np.array(steps, dtype=np.float64),
        mean=np.where(known, table, 0.0).sum(axis=0) / np.maximum(count, 1) * some,
        low=np.where(known, table, np.inf).min(axis=0) * some,
        high=np.where(known, table, -np.inf).max(axis=0) * some,
    )


def running_mean(values: Sequence[float], count: int) -> Numbers:
    """Of each value and the `count - 1` before it, without those that are NaN; NaN stays NaN."""
    x = np.array(values, dtype=np.float64)
    known = ~np.isnan(x)
    total = np.cumsum(np.where(known, x, 0.0))
    number = np.cumsum(known)
    first = np.maximum(np.arange(len(x)) - count, -1)
    before = [np.where(first < 0, 0, sums[np.maximum(first, 0)]) for sums in (total, number)]
    mean = (total - before[0]) / np.maximum(number - before[1], 1)
    return np.where(known, mean, np.nan)


def _label(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    if len(names) == 1:
        return names[0]
    shown = ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]}"
    return f"{shown} (mean of {len(names)})"
