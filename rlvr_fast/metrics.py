"""Where numbers and completions go: JSON lines always, TensorBoard and a progress bar on top."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

from rlvr_fast.methods.rollouts import Groups

METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"


class _Board(Protocol):
    def add_scalar(self, tag: str, value: float, step: int) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Writes what each step reports; a context manager.

    `metrics.jsonl` has one line per step, with null for what is not a finite number.
    """

    def __init__(
        self, folder: Path, *, step: int, steps: int, tensorboard: bool, completions: int
    ) -> None:
        """Everything that an earlier process wrote of steps after `step` is removed.

        Args:
            folder: of the run.
            step: training steps done so far; 0 starts over.
            steps: training steps in all.
            tensorboard: write event files too, if tensorboard can be imported.
            completions: how many to write per step.
        """
        for name in (METRICS, COMPLETIONS):
            _truncate(folder / name, step)
        self._metrics = (folder / METRICS).open("a")
        self._texts = (folder / COMPLETIONS).open("a")
        self._board = _board(folder / "tensorboard", step) if tensorboard else None
        self._bar = tqdm(
            total=steps,
            initial=step,
            unit="step",
            file=sys.stderr,
            # Every refresh is a line of its own in a file.
            mininterval=0.1 if sys.stderr.isatty() else 30,
        )
        self._completions = completions

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._metrics.close()
        self._texts.close()
        if self._board is not None:
            self._board.close()

    def doing(self, what: str) -> None:
        """Shows in front of the progress bar what takes the time."""
        self._bar.set_description_str(what)

    def say(self, line: str) -> None:
        """One line above the progress bar."""
        self._bar.write(line, file=sys.stderr)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """All metrics of a step; step 0 is the model before training."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.write(json.dumps({"step": step, **finite}) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if step:
            self._bar.set_postfix_str(_summary(values), refresh=False)
            self._bar.update()

    def write_completions(self, step: int, groups: Groups) -> None:
        """The first few rollouts of the step, spread over the groups."""
        rounds = max(map(len, groups), default=0)
        spread = [group[i] for i in range(rounds) for group in groups if i < len(group)]
        for rollout in spread[: self._completions]:
            row = {
                "step": step,
                "prompt": rollout.prompt.example.prompt,
                "completion": rollout.text,
                "reward": rollout.reward,
                "tokens": len(rollout.completion_ids),
                "finished": rollout.finished,
            }
            self._texts.write(json.dumps(row) + "\n")
        self._texts.flush()


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, without one that a killed process left half written."""
    file = folder / METRICS
    return _lines(file) if file.exists() else []


def _lines(file: Path) -> list[dict[str, Any]]:
    whole, _, _ = file.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _truncate(file: Path, step: int) -> None:
    """Whole lines of steps up to `step` stay; none if that is 0, which is written again."""
    if file.exists():
        kept = [json.dumps(row) + "\n" for row in _lines(file) if 0 < step >= row["step"]]
        scratch = file.with_name(f".{file.name}")
        scratch.write_text("".join(kept))
        scratch.replace(file)


def _board(folder: Path, step: int) -> _Board | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    board: _Board = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
    return board


def _summary(values: Mapping[str, float]) -> str:
    parts = [
        f"reward {values['reward']:.3f}",
        f"length {values['length']:.1f}",
        f"{values['tokens_per_second']:.0f} tok/s",
        *(f"{name} {values[f'seconds_{name}']:.2f}s" for name in ("generate", "update", "sync")),
    ]
    return ", ".join(parts)
