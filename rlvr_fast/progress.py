"""One line that says how far a run is, how it goes and how long the rest takes."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TextIO

TERMINAL, FILE = 0.1, 30.0
"""Seconds from one line to the next, at least."""
RECENT = 20
"""So many measurements of a part say how long it takes: completions grow and shrink."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do."""

    steps: int
    """Training steps in all."""
    done: int = 0
    """Those that an earlier process did."""
    every: Mapping[str, int]
    """Steps from one to the next of the other parts, such as evaluate; 0: after the last only."""

    def parts(self) -> dict[str, int]:
        """How often this process does each part; step 0 is evaluated too."""
        left = max(self.steps - self.done, 0)
        counts = {"train": left}
        for part, every in self.every.items():
            between = (self.steps - 1) // every - self.done // every if every else 0
            counts[part] = between + 1 if left else 0
        if not self.done:
            counts["evaluate"] = counts.get("evaluate", 0) + 1
        return counts


class Pace:
    """How long the rest takes: what is left of each part, times what that part took lately."""

    def __init__(
        self, plan: Plan, earlier: Mapping[str, Sequence[float]], clock: Callable[[], float]
    ) -> None:
        """Nothing has begun yet.

        Args:
            plan: of the run.
            earlier: seconds that parts took in an earlier process; count until this one knows.
            clock: gives seconds.
        """
        self._left, self._earlier, self._clock = plan.parts(), earlier, clock
        self._took: dict[str, list[float]] = {}
        self._part, self._began = "", clock()

    def begin(self, part: str) -> None:
        """Ends the present part and begins this one."""
        self.end()
        self._part, self._began = part, self._clock()

    def end(self) -> tuple[str, float]:
        """Ends the present part; its name, empty if there was none, and its seconds."""
        part, seconds = self._part, self._clock() - self._began
        if part:
            self._took.setdefault(part, []).append(seconds)
            self._left[part] = max(self._left.get(part, 0) - 1, 0)
        self._part = ""
        return part, seconds

    def remaining(self) -> float | None:
        """Seconds; None while no training step was done that could tell."""
        seconds = {part: self._seconds(part) for part, left in self._left.items() if left}
        if seconds.get("train", 0.0) is None:
            return None
        return sum(self._left[part] * (each or 0.0) for part, each in seconds.items())

    def _seconds(self, part: str) -> float | None:
        took = self._took.get(part) or list(self._earlier.get(part, []))
        # The first one compiles, allocates and fills caches.
        recent = took[1:][-RECENT:] or took
        return fmean(recent) if recent else None


class Progress:
    """Redraws its line in a terminal; elsewhere writes a new one every 30 seconds."""

    def __init__(
        self,
        stream: TextIO,
        plan: Plan,
        *,
        earlier: Mapping[str, Sequence[float]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Shows nothing before the first part begins.

        Args:
            stream: standard error, say.
            plan: of the run.
            earlier: see `Pace`.
            clock: gives seconds.
        """
        self._stream, self._clock, self._steps = stream, clock, plan.steps
        self._terminal = stream.isatty()
        self._pace = Pace(plan, earlier or {}, clock)
        self._began, self._drawn = clock(), -float("inf")
        self._step, self._doing, self._values = plan.done, "train", ""

    def doing(self, part: str) -> None:
        """The part that takes the time from here on; it is named in the line."""
        self._pace.begin(part)
        self._doing = part
        if self._terminal:
            self._draw()

    def done(self, step: int, values: Mapping[str, float]) -> float | None:
        """Ends a step, 0 included; its seconds of evaluation, None if it was not evaluated."""
        part, seconds = self._pace.end()
        self._step = step
        if step:
            self._values = summary(values)
            self._draw(now=step == self._steps)
        return seconds if part == "evaluate" else None

    def say(self, line: str) -> None:
        """A line of its own, above the one that is redrawn."""
        self._stream.write(f"{_CLEAR if self._terminal else ''}{line}\n")
        self._draw(now=self._terminal)

    def close(self) -> None:
        """The last line stays."""
        if self._terminal:
            self._draw(now=True)
            self._stream.write("\n")
        self._stream.flush()

    def line(self) -> str:
        """What is shown."""
        left = self._pace.remaining()
        doing = f" ({self._doing})" if self._terminal and self._doing != "train" else ""
        parts = [
            f"step {self._step}/{self._steps}{doing}",
            "" if self._terminal else f"{clock_time(self._clock() - self._began)} so far",
            "? left" if left is None else f"{clock_time(left)} left",
            self._values,
        ]
        return ", ".join(filter(None, parts))

    def _draw(self, *, now: bool = False) -> None:
        since, pause = self._clock() - self._drawn, TERMINAL if self._terminal else FILE
        if since < pause and not now:
            return
        self._drawn = self._clock()
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"{_CLEAR}{self.line()[:width]}")
        else:
            self._stream.write(f"{self.line()}\n")
        self._stream.flush()


_CLEAR = "\r\x1b[K"


def summary(values: Mapping[str, float]) -> str:
    """Reward, length, speed and where the step's time went, of its metrics."""
    split = time_split(values)
    whole = sum(split.values())
    shown = [f"{name} {t:.2f}s" for name, t in split.items() if t >= 0.01 * whole]
    return (
        f"reward {values['reward']:.3f}, length {values['length']:.1f}, "
        f"{values['tokens_per_second']:.0f} tok/s, {' '.join(shown)}"
    )


def time_split(values: Mapping[str, float | None]) -> dict[str, float]:
    """Seconds of a step by part; parts that ran beside the others are not among them.

    Where completions were made while the model was updated, `wait` is what the step spent on
    them; elsewhere generate and verify are, and add up to it.
    """
    found = {
        name.removeprefix("seconds_"): value
        for name, value in values.items()
        if name.startswith("seconds_") and value is not None
    }
    making = [name for name in ("generate", "verify") if name in found]
    overlapped = found.get("wait", float("inf")) < 0.95 * sum(found[name] for name in making)
    beside = {"total", "evaluate", *(making if overlapped else ["wait"])}
    order = [*making, "wait", "update", "sync"]
    names = [name for name in order if name in found] + [n for n in found if n not in order]
    return {name: found[name] for name in names if name not in beside}


def clock_time(seconds: float) -> str:
    """As 1:05 or 2:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
