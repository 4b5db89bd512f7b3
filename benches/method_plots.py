"""Plots of the methods' bench: what an update costs, what is learned on the tiny task."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

Entries = Mapping[str, Any]
COLOUR, PALE = "#d62728", "#9aa7b5"
HEIGHT, REST = 0.24, 1.5
"""Inches of a row, and of what is not rows."""


def cost(entries: Entries) -> Figure | None:
    """Bars of the time of an update over the baseline's."""
    entry = _largest(entries, "update")
    if entry is None:
        return None
    table = entry["tables"][0]
    (ratio,) = (column for column in table["rows"][0] if column.startswith("x "))
    rows = sorted(table["rows"], key=lambda row: -row[ratio])
    figure, axes = plt.subplots(figsize=(8.0, REST + HEIGHT * len(rows)))
    bars = axes.barh([row[""] for row in rows], [row[ratio] for row in rows], color=PALE)
    labels = axes.bar_label(bars, [f"{row[ratio]:.2f}" for row in rows], padding=4, fontsize=9)
    for label in labels:  # The line of the baseline goes behind them.
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set(xlabel=f"time of an update over that of {ratio[2:]} (lower is better)")
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlim(0, 1.12 * max(row[ratio] for row in rows))
    _laid_out(figure, table["title"])
    return figure


def learning(entries: Entries) -> Figure | None:
    """The greedy reward at the end and the sampled one of all steps; lines from seed to seed."""
    entry = _largest(entries, "learning")
    if entry is None:
        return None
    table, sampled = entry["tables"][0], entry["facts"]["sampled"]
    rows = sorted(table["rows"], key=lambda row: row["greedy"])
    figure, panels = plt.subplots(1, 2, sharey=True, figsize=(8.0, REST + HEIGHT * len(rows)))
    for i, row in enumerate(rows):
        means = [fmean(run) for run in sampled[row[""]]]
        seeds = ((row["least"], row["greedy"], row["greatest"]),
                 (min(means), fmean(means), max(means)))  # fmt: skip
        for axes, (least, mean, greatest) in zip(panels, seeds, strict=True):
            axes.plot([least, greatest], [i, i], color=PALE, linewidth=3, solid_capstyle="round")
            axes.plot(mean, i, marker="o", color=COLOUR, markersize=5)
    panels[0].set_yticks(range(len(rows)), [row[""] for row in rows])
    for axes, label in zip(panels, ("greedy, after the last step", "sampled, all steps"),
                           strict=True):  # fmt: skip
        axes.set(xlabel=label, xlim=(-0.02, 1.02), ylim=(-0.7, len(rows) - 0.3))
        axes.grid(axis="x", color="#e3e3e3", linewidth=0.6)
    _laid_out(figure, table["title"])
    return figure


def _largest(entries: Entries, part: str) -> Mapping[str, Any] | None:
    """Of the cases of a part the one with the most methods, if anything was measured."""
    found = [
        entry
        for key, entry in entries.items()
        if key.startswith(f"{part}: ") and entry["tables"][0]["rows"]
    ]
    return max(found, key=lambda entry: len(entry["tables"][0]["rows"]), default=None)


def _laid_out(figure: Figure, title: str) -> None:
    height = figure.get_figheight()
    for axes in figure.axes:
        axes.tick_params(axis="y", labelsize=9, length=0)
    figure.suptitle(title, x=0.02, y=1 - 0.12 / height, ha="left", va="top", fontsize=11)
    figure.subplots_adjust(left=0.2, right=0.96, top=1 - 0.45 / height, bottom=0.7 / height,
                           wspace=0.08)  # fmt: skip
