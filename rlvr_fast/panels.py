"""What the panels of a picture show: metrics over the steps, and where a step's time goes."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import fmean
from typing import Any, TypeAlias

import numpy as np

from rlvr_fast.curves import Curve, Line, curve, running_mean
from rlvr_fast.progress import time_split

Axes: TypeAlias = Any
"""matplotlib's, which is not imported before something is drawn."""

GREY = "#555555"
PARTS = {
    "generate": "#88ccee",
    "verify": "#ddcc77",
    "wait": "#bbbbbb",
    "update": "#cc6677",
    "sync": "#44aa99",
}
"""Tol's muted set, for the parts of a step."""
OTHERS = ("#999933", "#aa4499", "#332288")


def draw_curves(
    axes: Axes,
    lines: Sequence[Line],
    colours: Mapping[str, str],
    metrics: Mapping[str, tuple[str, str]],
    smooth: int,
) -> None:
    """All metrics of a panel for all lines: a colour is a line, a style is a metric.

    Args:
        axes: to draw on.
        lines: at least one.
        colours: by label of a line.
        metrics: by key of the rows: what it is called, and matplotlib's format of its line.
        smooth: see `curve`; evaluations are drawn as they are.
    """
    found: list[Curve] = []
    shown: dict[str, str] = {}
    for metric, (name, style) in metrics.items():
        width = 1 if metric.startswith("eval_") else smooth
        for line in lines:
            known = curve(line.runs, metric, width)
            if known is None or (metric == "kl" and not np.nanmax(known.high)):
                continue  # on policy it is 0 by definition
            found.append(known)
            shown[name] = style
            if width > 1 and len(line.runs) == 1:
                _faint(axes, curve(line.runs, metric, 1), colours[line.label])
            _line(axes, known, colours[line.label], style, band=len(line.runs) > 1)
    if not found:
        _nothing(axes)
        return
    last = max(row["step"] for line in lines for run in line.runs for row in run.rows) or 1
    axes.set_xlim(-0.01 * last, 1.01 * last)
    _scale(axes, found, logarithmic="mismatch_kl" in metrics)
    if len(shown) > 1 or "mismatch_kl" in metrics:
        for name, style in shown.items():
            axes.plot([], [], style, color=GREY, label=name, **_MARKER)
        axes.legend(loc="best", handlelength=2.6)


_MARKER: Mapping[str, Any] = {"markersize": 5, "markerfacecolor": "white"}


def _faint(axes: Axes, every: Curve | None, colour: str) -> None:
    assert every is not None, "its running mean was there"
    axes.plot(every.steps, every.mean, color=colour, alpha=0.25, linewidth=0.9)


def _line(axes: Axes, known: Curve, colour: str, style: str, *, band: bool) -> None:
    marks = dict(_MARKER)
    if "o" not in style:
        # A value between two gaps has no line to be seen by.
        there = np.pad(~np.isnan(known.mean), 1)
        alone = np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:])
        marks = {"marker": ".", "markevery": list(alone)}
    else:
        there = ~np.isnan(known.mean)
        known = Curve(**{name: each[there] for name, each in vars(known).items()})
    axes.plot(known.steps, known.mean, style, color=colour, **marks)
    if band:
        axes.fill_between(known.steps, known.low, known.high, color=colour, alpha=0.18, linewidth=0)


def _scale(axes: Axes, found: Sequence[Curve], *, logarithmic: bool) -> None:
    values = np.concatenate([np.concatenate([each.low, each.high]) for each in found])
    positive = values[values > 0]
    if logarithmic and len(positive) and positive.max() > 30 * positive.min():
        axes.set_yscale("log")
    elif positive.size and positive.min() == np.nanmin(values) and positive.min() > 0:
        # A flat line would otherwise be drawn against a scale of its noise.
        low, high = positive.min(), positive.max()
        if high < 1.05 * low:
            axes.set_ylim(0.9 * low, 1.1 * high)


def draw_time(axes: Axes, lines: Sequence[Line], colours: Mapping[str, str], smooth: int) -> None:
    """For one line the parts of a step, stacked over the steps; for several one bar each."""
    from matplotlib.ticker import MaxNLocator

    if not any(_split(line) for line in lines):
        _nothing(axes)
        return
    seen = dict.fromkeys(part for line in lines for part in _split(line))
    parts = [part for part in PARTS if part in seen] + [part for part in seen if part not in PARTS]
    found = dict(zip(parts, _part_colours(parts), strict=True))
    if len(lines) == 1:
        _stack(axes, lines[0], found, smooth)
    else:
        _bars(axes, lines, colours, found)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
    axes.legend(
        loc="upper right" if len(lines) == 1 else "lower right",
        ncols=min(len(parts), 5),
        handlelength=1.0,
        columnspacing=1.2,
    )


def _split(line: Line) -> dict[str, float]:
    """Mean seconds of a step by part."""
    splits = [time_split(row) for run in line.runs for row in run.rows if row["step"]]
    parts = dict.fromkeys(part for split in splits for part in split)
    return {part: fmean(split.get(part, 0.0) for split in splits) for part in parts}


def _stack(axes: Axes, line: Line, parts: Mapping[str, str], smooth: int) -> None:
    by_step: dict[int, list[dict[str, float]]] = {}
    for row in sorted((row for run in line.runs for row in run.rows), key=lambda row: row["step"]):
        if split := time_split(row):
            by_step.setdefault(row["step"], []).append(split)
    heights = [
        running_mean(
            [fmean(one.get(part, 0.0) for one in each) for each in by_step.values()], smooth
        )
        for part in parts
    ]
    axes.stackplot(list(by_step), *heights, colors=list(parts.values()), labels=list(parts))
    axes.set_xlim(-0.01 * max(by_step), 1.01 * max(by_step))
    whole = np.sum(heights, axis=0)
    # The first steps compile and allocate; above, there is room for the legend.
    top = min(float(whole.max()), 2.0 * float(np.quantile(whole, 0.9)))
    axes.set_ylim(0, 1.25 * top or 1.0)


def _bars(
    axes: Axes, lines: Sequence[Line], colours: Mapping[str, str], parts: Mapping[str, str]
) -> None:
    places = np.arange(len(lines))[::-1]
    left = np.zeros(len(lines))
    for part, colour in parts.items():
        widths = np.array([_split(line).get(part, 0.0) for line in lines])
        axes.barh(places, widths, left=left, color=colour, height=0.42, label=part)
        left += widths
    for place, whole, line in zip(places, left, lines, strict=True):
        beside = {"textcoords": "offset points", "fontsize": 9.5}
        axes.annotate(f"{whole:#.3g} s", (whole, place), (4, 0), va="center", **beside)
        name, colour = text(line.label), colours[line.label]
        if len(lines) <= 5:
            axes.annotate(name, (0, place + 0.24), (2, 2), va="bottom", color=colour, **beside)
        else:
            # No room for names: the colour has to do.
            axes.plot(-0.02, place, "s", color=colour, clip_on=False, markersize=9,
                      transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set(xlabel="mean seconds per step", ylabel="", yticks=[])
    axes.set(xlim=(0, 1.12 * max(left) or 1.0), ylim=(-0.4 - 0.16 * len(lines), len(lines) - 0.4))
    axes.spines["left"].set_visible(False)


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="")


def text(label: str) -> str:
    """The same for matplotlib, to which $ begins a formula and _ a line without a legend."""
    visible = f" {label}" if label.startswith("_") else label
    return visible.replace("$", r"\$")


def _part_colours(parts: Sequence[str]) -> list[str]:
    others = cycle(OTHERS)
    return [PARTS.get(part) or next(others) for part in parts]
