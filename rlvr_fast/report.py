"""An evaluation to look at: a table of text, a picture, and every completion in a file."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rlvr_fast.evaluate import Answers

_COLOURS = ("#0072B2", "#D55E00")  # Okabe and Ito's, which nobody confuses
_BINS = 20

Values = Mapping[str, Any]
"""JSON values as `evaluate.result` gives them, with `against` and `difference` of a comparison."""
Kinds = Mapping[str, Answers]
"""A model's answers by kind, as `evaluate.ask` gives them."""


def table(values: Values) -> str:
    """Means with their 95 % intervals: a section for every kind and task, a column for each model.

    With two models a last column holds the differences.
    """
    models = _models(values)
    head = ["", *(model["model"] for model in models)]
    rows: list[Sequence[str]] = [head if len(models) == 1 else [*head, "difference"]]
    for kind in _kinds(values):
        for tag in ("", *values[kind]["tasks"]):
            found = [_of_task(model[kind], tag) for model in models]
            difference = _of_task(values["difference"][kind], tag) if len(models) > 1 else None
            rows += [[], *_section(_label(kind, tag, found[0]), found, difference)]
    return _aligned(rows)


def write_completions(path: Path, values: Values, answers: Sequence[Kinds]) -> None:
    """One JSON object a line: model, kind, task, prompt, completion, reward, finished.

    Args:
        path: of the file; one that is there is replaced.
        values: as for `table`.
        answers: of each model.
    """
    with path.open("w") as file:
        for model, kinds in zip(_models(values), answers, strict=True):
            for kind, groups in kinds.items():
                for answer in (answer for group in groups for answer in group):
                    example = answer.prompt.example
                    line = {
                        "model": model["model"],
                        "kind": kind,
                        "task": example.task,
                        "prompt": example.prompt,
                        "completion": answer.text,
                        "reward": answer.reward,
                        "finished": answer.finished,
                    }
                    file.write(json.dumps(line) + "\n")


def check_plots() -> None:
    """Raises an ImportError that says what to install where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plot: wanted matplotlib: pip install matplotlib") from error


def draw(path: Path, values: Values, answers: Sequence[Kinds]) -> None:
    """Writes an image: pass@k where there are samples, mean rewards, their histogram, differences.

    Args:
        path: of the image; its suffix is the format.
        values: as for `table`.
        answers: of each model.

    Raises:
        ImportError: without matplotlib.
    """
    check_plots()
    from matplotlib.figure import Figure

    panels: list[Callable[[Any, Values], None]] = [
        _draw_means,
        lambda axes, values: _draw_histogram(axes, values, answers),
    ]
    if any(model["sampled"] for model in _models(values)):
        panels.insert(0, _draw_pass_at)
    if "difference" in values:
        panels.append(_draw_differences)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure: Any = Figure(figsize=(6.4 * columns, 4.2 * rows), dpi=120, layout="constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        panel(axes, values)
    figure.suptitle(f"{values['task']}: {' and '.join(m['model'] for m in _models(values))}")
    figure.savefig(path)


def _models(values: Values) -> list[Values]:
    return [values, *([values["against"]] if "against" in values else [])]


def _kinds(model: Values) -> list[str]:
    return [kind for kind in ("greedy", "sampled") if model[kind]]


def _of_task(found: Values, tag: str) -> Values:
    part: Values = found["tasks"][tag] if tag else found
    return part


def _label(kind: str, tag: str, found: Values) -> str:
    how = kind if kind == "greedy" else f"{found['samples']} at T={found['temperature']:g}"
    return f"{tag}, {how}" if tag else how


def _section(
    label: str, found: Sequence[Values], difference: Values | None
) -> Iterator[Sequence[str]]:
    compared = [] if difference is None else [_better(difference)]
    yield [label, *(f"{one['prompts']} prompts" for one in found), *compared]
    names = ["reward", *(f"pass@{k}" for k in found[0]["pass_at"])]
    if found[0]["majority"] is not None:
        names.append(f"maj@{found[0]['samples']}")
    for name in names:
        gains = [] if difference is None else [_gain(difference["differences"][name])]
        yield [f"  {name}", *(_mean(one, name) for one in found), *gains]
    gains = [] if difference is None else [_gain(difference["differences"]["length"])]
    yield ["  length", *(f"{one['length']:.1f}" for one in found), *gains]
    yield ["  finished", *(f"{one['finished']:.3f}" for one in found)]
    if any(one["unscored"] for one in found):
        yield ["  unscored", *(str(one["unscored"]) for one in found)]


def _mean(found: Values, name: str) -> str:
    head, _, k = name.partition("@")
    if head == "pass":
        return _with_interval(found["pass_at"][k], found["pass_at_interval"][k])
    field = "majority" if head == "maj" else "reward"
    return _with_interval(found[field], found[f"{field}_interval"])


def _gain(one: Values) -> str:
    return f"{one['value']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def _better(difference: Values) -> str:
    return f"{difference['better']} better, {difference['worse']} worse"


def _with_interval(value: float, interval: Values) -> str:
    return f"{value:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    columns = zip_longest(*rows, fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _draw_pass_at(axes: Any, values: Values) -> None:
    for model, colour in zip(_models(values), _COLOURS, strict=False):
        sampled = model["sampled"]
        ks = [int(k) for k in sampled["pass_at"]]
        intervals = sampled["pass_at_interval"].values()
        low, high = ([interval[end] for interval in intervals] for end in ("low", "high"))
        axes.plot(ks, sampled["pass_at"].values(), "o-", color=colour, label=model["model"])
        axes.fill_between(ks, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set(xscale="log", xlabel="k", ylabel="pass@k", ylim=(0, 1.02))
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_title("correct at least once in k completions", loc="left")
    axes.legend(frameon=False)


def _draw_means(axes: Any, values: Values) -> None:
    rows = [(kind, tag) for kind in _kinds(values) for tag in ("", *values[kind]["tasks"])]
    models = _models(values)
    for number, (model, colour) in enumerate(zip(models, _COLOURS, strict=False)):
        found = [_of_task(model[kind], tag) for kind, tag in rows]
        places = [place + 0.3 * (number - (len(models) - 1) / 2) for place in range(len(rows))]
        low, high = ([one["reward_interval"][end] for one in found] for end in ("low", "high"))
        axes.hlines(places, low, high, color=colour, linewidth=2)
        axes.plot([one["reward"] for one in found], places, "o", color=colour, label=model["model"])
    labels = [_label(kind, tag, values[kind]) for kind, tag in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.margins(y=0.12)
    axes.set_xlabel("mean reward, 95 % interval")
    axes.set_title("mean reward", loc="left")
    axes.legend(frameon=False)


def _draw_histogram(axes: Any, values: Values, answers: Sequence[Kinds]) -> None:
    kind = _kinds(values)[-1]
    rewards = [[a.reward or 0.0 for group in kinds[kind] for a in group] for kinds in answers]
    axes.hist(
        rewards,
        bins=_BINS,
        color=_COLOURS[: len(rewards)],
        label=[model["model"] for model in _models(values)],
        weights=[[1 / len(own)] * len(own) for own in rewards],
    )
    axes.set(xlabel="reward of a completion", ylabel="share of completions")
    axes.set_title(f"rewards, {_label(kind, '', values[kind])}", loc="left")
    axes.legend(frameon=False)


def _draw_differences(axes: Any, values: Values) -> None:
    rows = [(kind, tag) for kind in _kinds(values) for tag in ("", *values[kind]["tasks"])]
    found = [_of_task(values["difference"][k], tag)["differences"]["reward"] for k, tag in rows]
    places = range(len(rows))
    axes.axvline(0, color="grey", linewidth=1, linestyle="--")
    axes.hlines(places, [one["low"] for one in found], [one["high"] for one in found], color="k")
    axes.plot([one["value"] for one in found], places, "ko")
    axes.set_yticks(places, [_label(kind, tag, values[kind]) for kind, tag in rows])
    axes.invert_yaxis()
    axes.margins(y=0.12)
    axes.set_xlabel(f"mean reward of {values['model']} less {values['against']['model']}")
    axes.set_title("paired difference, 95 % interval", loc="left")
