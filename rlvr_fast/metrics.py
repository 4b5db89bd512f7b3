"""Where numbers and completions go: JSON lines in the run folder, a progress line, trackers."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rlvr_fast.config import TrainConfig
from rlvr_fast.progress import Plan, Progress
from rlvr_fast.trackers import Tracker

if TYPE_CHECKING:
    # Reading a run should not wait for torch and transformers.
    from rlvr_fast.methods.rollouts import Groups, Rollout

METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"

Row = dict[str, Any]
"""A line of one of these files."""


class RunLog:
    """Writes what each step reports; a context manager.

    `metrics.jsonl` has one line per step, with null for what is not a finite number.
    `completions.jsonl` has one line per completion: step, group (its place in the step), sample
    (its place in the group), task, prompt, completion, reward, advantage (its mean, where every
    token has its own), tokens, finished.
    """

    def __init__(self, config: TrainConfig, *, step: int, trackers: Sequence[Tracker] = ()) -> None:
        """Everything that an earlier process wrote of steps after `step` is removed.

        Args:
            config: of the run, whose folder exists.
            step: training steps done so far; 0 starts over.
            trackers: get the same numbers; closed with the log.
        """
        folder = Path(config.run_folder)
        for name in (METRICS, COMPLETIONS):
            _truncate(folder / name, step)
        earlier = [row["seconds_evaluate"] for row in read(folder) if "seconds_evaluate" in row]
        self._metrics = (folder / METRICS).open("a")
        self._texts = (folder / COMPLETIONS).open("a")
        self._trackers, self._completions = trackers, config.log_completions
        every = {"evaluate": config.eval_every, "save": config.checkpoint_every}
        plan = Plan(steps=config.steps, done=step, every=every)
        self._progress = Progress(sys.stderr, plan, earlier={"evaluate": earlier})

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._progress.close()
        self._metrics.close()
        self._texts.close()
        for tracker in self._trackers:
            tracker.close(failed=kind is not None)

    def doing(self, what: str) -> None:
        """Shows what takes the time: train, evaluate or save."""
        self._progress.doing(what)

    def say(self, line: str) -> None:
        """One line beside the progress."""
        self._progress.say(line)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """All metrics of a step, to which the seconds of its evaluation are added."""
        seconds = self._progress.done(step, values)
        if seconds is not None:
            values = {**values, "seconds_evaluate": seconds}
            self._progress.say(_evaluated(step, values))
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.write(json.dumps({"step": step, **finite}) + "\n")
        self._metrics.flush()
        for tracker in self._trackers:
            tracker.log(step, values)

    def write_completions(self, step: int, groups: "Groups") -> None:
        """As many as the config asks for: of each group its best and worst, then the others."""
        for group, sample in _chosen(groups, self._completions):
            row = _completion(groups[group][sample])
            row = {"step": step, "group": group, "sample": sample, **row}
            self._texts.write(json.dumps(row) + "\n")
        self._texts.flush()


class Silence(RunLog):
    """The log of a rank that does not lead: nothing comes of what it is told."""

    def __init__(self) -> None:
        """Opens no file."""

    def __exit__(self, *of_error: object) -> None: ...

    def doing(self, what: str) -> None: ...

    def say(self, line: str) -> None: ...

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def write_completions(self, step: int, groups: "Groups") -> None: ...


def read(folder: Path) -> list[Row]:
    """The lines of a run's `metrics.jsonl`, without one that a killed process left half written.

    Raises:
        ValueError: for a file of something else.
    """
    return _lines(folder / METRICS)


def read_completions(folder: Path) -> list[Row]:
    """The lines of a run's `completions.jsonl`, as `read`.

    Raises:
        ValueError: for a file of something else.
    """
    return _lines(folder / COMPLETIONS)


def check_run(folder: Path) -> None:
    """Raises a ValueError unless the folder holds a run with at least one step in it."""
    if not (folder / "config.json").exists():
        raise ValueError(f"run: wanted a folder with a config.json, got {folder}")
    if not read(folder):
        raise ValueError(f"run: wanted steps in {folder / METRICS}, got none yet")


def _lines(file: Path) -> list[Row]:
    if not file.exists():
        return []
    whole, _, _ = file.read_text().rpartition("\n")
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: wanted one JSON object a line, got: {error}") from None


def _truncate(file: Path, step: int) -> None:
    """Whole lines of steps up to `step` stay; none if that is 0, which is written again."""
    if file.exists():
        kept = [json.dumps(row) + "\n" for row in _lines(file) if 0 < step >= row["step"]]
        scratch = file.with_name(f".{file.name}")
        scratch.write_text("".join(kept))
        scratch.replace(file)


def _evaluated(step: int, values: Mapping[str, float]) -> str:
    known = {name: v for name, v in values.items() if name.startswith("eval_") and v == v}
    return f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in known.items())


def _chosen(groups: "Groups", count: int) -> list[tuple[int, int]]:
    """Group and sample of those that are written, in the order of both."""
    ranks = [
        # Two of each group, then one more of each at a time.
        (max(rank - 1, 0), group, sample)
        for group, rollouts in enumerate(groups)
        for rank, sample in enumerate(_best_and_worst_first(rollouts))
    ]
    return sorted((group, sample) for _, group, sample in sorted(ranks)[:count])


def _best_and_worst_first(group: "Sequence[Rollout]") -> list[int]:
    scored = [i for i, rollout in enumerate(group) if rollout.reward is not None]
    by_reward = sorted(scored, key=lambda i: -(group[i].reward or 0.0))
    first = [by_reward[0], by_reward[-1]] if len(by_reward) > 1 else by_reward
    return [*first, *(i for i in range(len(group)) if i not in first)]


def _completion(rollout: "Rollout") -> Row:
    advantage = rollout.advantage
    if isinstance(advantage, Sequence):
        advantage = math.fsum(advantage) / max(len(advantage), 1)
    return {
        "task": getattr(rollout.prompt.example, "task", ""),
        "prompt": rollout.prompt.example.prompt,
        "completion": rollout.text,
        "reward": rollout.reward,
        "advantage": advantage,
        "tokens": len(rollout.completion_ids),
        "finished": rollout.finished,
    }
