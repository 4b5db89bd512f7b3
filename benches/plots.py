"""PNG plots of a results file: curves over T, D and V, memory, distance to the floor, errors."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benches import method_plots

FLOOR, OURS = "floor: 3 GEMMs", "policy_loss"
COLOURS = {
    FLOOR: "black",
    OURS: "#d62728",
    "torch": "#7f7f7f",
    "torch.compile": "#bcbd22",
    "TRL op": "#1f77b4",
    "Liger fused GRPO": "#2ca02c",
    "Liger scaled CE": "#17becf",
    "verl torch head": "#9467bd",
    "verl Triton head": "#8c564b",
    "cut-cross-entropy": "#ff7f0e",
}
OTHERS = "#e377c2"
STYLE = {
    "figure.figsize": (8.0, 5.0),
    "figure.dpi": 125,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
}
Points = list[tuple[float, float]]
Entries = Mapping[str, Any]


def draw(data: Mapping[str, Any], stem: Path) -> list[Path]:
    """Writes `<stem>-<plot>.png` for every plot that has data; 1000 pixels wide."""
    entries = {k: e for k, e in data["entries"].items() if e["tables"] and not e["failed"]}
    footer = data["machine"].split(", Python")[0] + f", commit {data['commit']}"
    drawn = []
    with plt.rc_context(STYLE):
        for name, make in PLOTS.items():
            figure = make(entries)
            if figure is None:
                continue
            figure.text(0.01, 0.008, footer, fontsize=7.5, color="#666666")
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path)
            plt.close(figure)
            drawn.append(path)
    return drawn


def curves(entries: Entries, part: str, axis: str, column: str, scale: float) -> dict[str, Points]:
    """By contender, over the fact `axis` of all cases of a part."""
    found: dict[str, Points] = {}
    for key, entry in entries.items():
        if key.startswith(f"{part}: "):
            for row in entry["tables"][0]["rows"]:
                if row.get(column):
                    point = (entry["facts"][axis], row[column] * scale)
                    found.setdefault(row[""], []).append(point)
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def _curve_plot(
    part: str, axis: str, x_label: str, column: str, y_label: str, title: str, *, scale: float = 1.0
) -> Callable[[Entries], Figure | None]:
    def make(entries: Entries) -> Figure | None:
        lines = curves(entries, part, axis, column, scale)
        lines.pop("floor: fresh gradients", None)
        if not lines:
            return None
        figure, axes = plt.subplots()
        for name, points in lines.items():
            strong = name in (OURS, FLOOR)
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS.get(name, OTHERS),
                linewidth=2.4 if strong else 1.5,
                linestyle="--" if name == FLOOR else "-",
                marker="o",
                markersize=4,
                zorder=3 if strong else 2,
            )
        axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        axes.set_title(f"{title}, {_fixed(entries, part, axis)}")
        _plain_ticks(axes, sorted({x for points in lines.values() for x, _ in points}))
        _label_ends(axes, lines)
        figure.subplots_adjust(left=0.12, right=0.74, top=0.92, bottom=0.15)
        return figure

    return make


def _fixed(entries: Entries, part: str, axis: str) -> str:
    facts = next(e["facts"] for k, e in entries.items() if k.startswith(f"{part}: "))
    return ", ".join(f"{name}={facts[name]}" for name in "TDV" if name != axis)


def _plain_ticks(axes: Axes, ticks: Sequence[float]) -> None:
    shown = [x for x, y in zip(ticks, [*ticks[1:], math.inf], strict=True) if y > 1.3 * x]
    axes.set_xticks(shown, [_thousands(x) for x in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def _thousands(x: float) -> str:
    return f"{x / 1024:g}k" if x >= 1024 and x % 1024 == 0 else f"{x:g}"


def _label_ends(axes: Axes, lines: Mapping[str, Points]) -> None:
    """Names at the right ends of the lines, pushed apart where they would overlap."""
    axes.figure.canvas.draw()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    ends = sorted((points[-1][1], name) for name, points in lines.items())
    to_axes = axes.transData + axes.transAxes.inverted()
    right = max(points[-1][0] for points in lines.values())
    heights = _apart([float(to_axes.transform((right, y))[1]) for y, _ in ends], 0.055)
    for i, (y, name) in enumerate(ends):
        x, y_end = to_axes.transform((lines[name][-1][0], y))
        colour = COLOURS.get(name, OTHERS)
        axes.annotate(
            name,
            (x, y_end),
            (1.03, heights[i]),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=10,
            fontweight="bold" if name == OURS else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """The same heights, ascending, moved as little as it takes to lie `gap` apart."""
    found = list(wanted)
    for _ in range(1000):
        for i in range(len(found) - 1):
            lacking = gap - (found[i + 1] - found[i])
            if lacking > 1e-4:
                found[i] -= lacking / 2
                found[i + 1] += lacking / 2
    shift = min(0.0, 1.02 - found[-1]) + max(0.0, -0.02 - found[0])
    return [height + shift for height in found]


def _distance(entries: Entries) -> Figure | None:
    """Horizontal bars of the time over the floor, at the main shape."""
    entry = entries.get("policy_loss: dense")
    if entry is None:
        return None
    rows = [r for r in entry["tables"][0]["rows"] if not r[""].startswith("floor: fresh")]
    rows.sort(key=lambda r: -r["x floor"])
    figure, axes = plt.subplots(figsize=(8.0, 1.4 + 0.3 * len(rows)))
    names, values = [r[""] for r in rows], [r["x floor"] for r in rows]
    colours = [OWN_COLOUR if n.startswith(OWN) else COLOURS.get(n, "#9aa7b5") for n in names]
    bars = axes.barh(names, values, color=colours, height=0.7)
    axes.bar_label(bars, [f"{v:.2f}" for v in values], padding=4, fontsize=9)
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set(xlabel="time over three bare GEMMs, forward and backward (lower is better)")
    axes.set_xlim(0, max(values) * 1.1)
    axes.tick_params(axis="y", labelsize=9, length=0)
    figure.suptitle(entry["tables"][0]["title"], x=0.02, ha="left", fontsize=11)
    figure.subplots_adjust(left=0.34, right=0.97, top=0.91, bottom=0.14)
    return figure


OWN, OWN_COLOUR = ("policy_loss", "linear_logprobs"), COLOURS[OURS]


def _errors(entries: Entries) -> Figure | None:
    """One panel an input, a dot for each quantity."""
    entry = entries.get("accuracy: fp64")
    if entry is None:
        return None
    tables = entry["tables"]
    figure, panels = plt.subplots(1, len(tables), sharey=True, squeeze=False, figsize=(8.0, 5.6))
    names = [row[""] for row in reversed(tables[0]["rows"])]
    for axes, table in zip(panels[0], tables, strict=True):
        for lift, (column, (marker, colour)) in zip(LIFTS, QUANTITIES.items(), strict=True):
            values = {row[""]: row[column] for row in table["rows"] if row[column]}
            known = [(values[n], i + lift) for i, n in enumerate(names) if n in values]
            axes.scatter(
                *zip(*known, strict=True), marker=marker, s=20, color=colour, label=column, zorder=3
            )
        axes.set(xscale="log", xlabel="relative error")
        axes.set_title(table["title"].split(":")[0], fontsize=10)
        axes.set_yticks(range(len(names)), names, fontsize=8.5)
        axes.tick_params(axis="x", labelsize=9)
        axes.grid(color="#e3e3e3", linewidth=0.6)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, loc="upper right", frameon=False, fontsize=9)
    figure.text(0.02, 0.955, "Relative error against fp64", fontsize=12)
    figure.subplots_adjust(left=0.29, right=0.98, top=0.87, bottom=0.13, wspace=0.08)
    return figure


QUANTITIES = {
    "logp": ("o", "#d62728"),
    "entropy": ("s", "#1f77b4"),
    "d_hidden": ("^", "#2ca02c"),
    "d_weight": ("D", "#9467bd"),
}
LIFTS = (0.12, -0.12, 0.12, -0.12)
"""Of the dots above the line, so that none hides another."""


def _skipping(entries: Entries) -> Figure | None:
    entry = entries.get("skipping: zero advantages")
    if entry is None:
        return None
    figure, axes = plt.subplots()
    rows = entry["tables"][0]["rows"]
    for name, colour in (("policy_loss", OWN_COLOUR), ("score_all", "#ff7f0e")):
        points = [(r["% zero"], r[f"{name} x none"]) for r in rows if r.get(f"{name} x none")]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, linewidth=2.2)
            axes.annotate(name, points[-1], (8, 0), textcoords="offset points", color=colour,
                          va="center")  # fmt: skip
    ideal = [(r["% zero"], 1 - r["% zero"] / 100) for r in rows]
    axes.plot(*zip(*ideal, strict=True), color="black", linestyle="--", linewidth=1)
    axes.annotate("proportional", ideal[-1], (8, 0), textcoords="offset points", va="center")
    axes.set(xlabel="groups without a signal, %", ylabel="time over that with none", ylim=(0, None))
    axes.set_title(entry["tables"][0]["title"])
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    figure.subplots_adjust(left=0.1, right=0.82, top=0.92, bottom=0.15)
    return figure


TIME, MS = "forward and backward, ms", "median ms"
PLOTS: dict[str, Callable[[Entries], Figure | None]] = {
    "time-tokens": _curve_plot("tokens", "T", "tokens T", MS, TIME, "Time by tokens"),
    "time-hidden": _curve_plot("hidden", "D", "hidden size D", MS, TIME, "Time by hidden size"),
    "time-vocabulary": _curve_plot(
        "vocabulary", "V", "vocabulary V", MS, TIME, "Time by vocabulary"
    ),
    "memory-tokens": _curve_plot(
        "tokens",
        "T",
        "tokens T",
        "MB",
        "peak memory beyond inputs and gradients, MB",
        "Peak memory by tokens",
    ),
    "floor-tokens": _curve_plot(
        "tokens", "T", "tokens T", "x floor", "time over three bare GEMMs", "Distance to the floor"
    ),
    "floor": _distance,
    "errors": _errors,
    "skipping": _skipping,
    "cost": method_plots.cost,
    "learning": method_plots.learning,
}
