"""One picture of one or more runs: reward, length, entropy, KL, where the time goes, speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlvr_fast.curves import Line
from rlvr_fast.panels import GREY, draw_curves, draw_time, text

FORMATS = (".png", ".pdf", ".svg")
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"),
    *("#882255", "#999933", "#332288"),
)
"""Okabe and Ito's without yellow, then Tol's: told apart by colour-blind readers."""
STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 11,
    "axes.titlesize": 12.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.9,
}


def draw(lines: Sequence[Line], out: Path, *, smooth: int | None = None) -> Path:
    """Writes one picture with a panel for each question.

    Args:
        lines: at least one.
        out: a .png, .pdf or .svg file in a folder that exists.
        smooth: training steps that are averaged; None: a 40th of the longest run, at least 1.

    Returns:
        `out`.

    Raises:
        ValueError: for another kind of file, for more lines than there are colours, and where
            matplotlib is missing.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"out: wanted a file that ends in {', '.join(FORMATS)}, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"out: wanted a file in a folder that exists, got {out}")
    if smooth is not None and smooth < 1:
        raise ValueError(f"smooth: wanted >= 1, got {smooth}")
    if len(lines) > len(COLOURS):
        raise ValueError(f"runs: wanted at most {len(COLOURS)} lines, got {len(lines)}")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ValueError("plot: wanted matplotlib (pip install matplotlib), got none") from error
    longest = max(row["step"] for line in lines for run in line.runs for row in run.rows)
    with mpl.rc_context(STYLE):
        _figure(lines, smooth or max(longest // 40, 1)).savefig(out)
    return out


def _figure(lines: Sequence[Line], smooth: int) -> Any:
    from matplotlib.figure import Figure

    columns = _legend_columns(lines)
    legend_rows = 0 if len(lines) == 1 else -(-len(lines) // columns)
    figure: Any = Figure(figsize=(13.0, 11.0 + 0.3 * legend_rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, hspace=0.03, wspace=0.02)
    panels = figure.subplots(3, 2)
    drawn = {line.label: colour for line, colour in zip(lines, COLOURS, strict=False)}
    for axes, (title, unit, metrics) in zip(panels.flat, _PANELS, strict=False):
        axes.set_title(title)
        axes.set(xlabel="training step", ylabel=unit)
        if metrics:
            draw_curves(axes, lines, drawn, metrics, smooth)
        else:
            draw_time(axes, lines, drawn, smooth)
    if len(lines) > 1:
        _legend(figure, drawn, columns)
    else:
        figure.suptitle(text(lines[0].label), x=0.01, ha="left", fontsize=14)
    figure.supxlabel(_footer(lines, smooth), x=0.01, ha="left", fontsize=9, color=GREY)
    return figure


_PANELS: Sequence[tuple[str, str, Mapping[str, tuple[str, str]]]] = (
    (
        "Reward",
        "mean reward",
        {"reward": ("sampled", "-"), "eval_reward": ("greedy evaluation", "o--")},
    ),
    (
        "Completion length",
        "tokens",
        {"length": ("sampled", "-"), "eval_length": ("greedy evaluation", "o--")},
    ),
    ("Entropy", "nats per token", {"entropy": ("of the policy", "-")}),
    (
        "KL divergence",
        "nats per token",
        {
            "mismatch_kl": ("sampler to trainer", "-"),
            "kl": ("policy before the step to policy", ":"),
            "ref_kl": ("policy to reference", "--"),
        },
    ),
    ("Time of a step", "seconds per step", {}),
    ("Speed", "sampled tokens per second", {"tokens_per_second": ("", "-")}),
)
"""Title, unit, and by metric what it is called and how its line looks; in reading order."""


def _legend_columns(lines: Sequence[Line]) -> int:
    """As many as fit: about 140 characters and 8 for each sample of a colour."""
    longest = max(len(line.label) for line in lines)
    return max(min(140 // (longest + 8), len(lines), 4), 1)


def _legend(figure: Any, colours: Mapping[str, str], columns: int) -> None:
    from matplotlib.lines import Line2D

    figure.legend(
        [Line2D([], [], color=colour, linewidth=3) for colour in colours.values()],
        list(map(text, colours)),
        loc="outside upper left",
        ncols=columns,
        fontsize=11,
    )


def _footer(lines: Sequence[Line], smooth: int) -> str:
    notes = []
    if smooth > 1:
        notes.append(f"lines: running mean over {smooth} steps; faint: every step")
    if any(len(line.runs) > 1 for line in lines):
        notes.append("bands: from the lowest to the highest run")
    return "; ".join(notes)
