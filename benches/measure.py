"""How the benches measure: interleaved rounds, peak memory, the machine, and tables.

A busy machine changes its speed from second to second. So all contenders run in turn, round by
round, and what counts is each one's time over the floor's *in the same round*.
"""

import ctypes
import gc
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from rlvr_fast.ops.tiled_head import release_workspace

Row = Mapping[str, str | float | None]
"""One line of a table by column; None is shown as a dash."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    name: str
    call: Callable[[], object]
    """What it returns is freed outside of the clock."""
    work: float
    """Flops or bytes that the task needs, by the formula in the bench; the same for everyone who
    does the same task, however much they really compute or move."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    name: str
    seconds: tuple[float, ...]
    """One per round."""
    ratio: float
    """Median over the rounds of the time over the floor's time in that round."""
    rate: float
    """`work` per second in the fastest round, in units of 1e9: GFLOP/s or GB/s."""

    def row(self, rate_name: str) -> dict[str, str | float | None]:
        """Its columns of a table."""
        return {
            "": self.name,
            "min s": min(self.seconds),
            "median s": median(self.seconds),
            "x floor": self.ratio,
            rate_name: self.rate,
        }


def compare(
    contenders: Sequence[Contender], *, floor: str, rounds: int, benchmark: BenchmarkFixture
) -> list[Timing]:
    """Times all contenders in `rounds` interleaved rounds, after one to warm up.

    Every round starts with the next contender, so that nobody always follows the same one.

    Args:
        floor: the name of the contender that the others are divided by.
        benchmark: pytest-benchmark's fixture; its own statistics are those of whole rounds.

    Returns:
        One `Timing` per contender, in their order.
    """
    found: list[list[float]] = []
    gc.collect()
    # Collecting between the calls then looks at their garbage only, not at torch and the peers.
    gc.freeze()

    def one_round() -> None:
        first = len(found) % len(contenders)
        seconds = [0.0] * len(contenders)
        for i in [*range(first, len(contenders)), *range(first)]:
            gc.collect()
            start = time.perf_counter()
            kept = contenders[i].call()
            seconds[i] = time.perf_counter() - start
            del kept
        found.append(seconds)

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=1)
    gc.unfreeze()
    by_contender = [tuple(times) for times in zip(*found[-rounds:], strict=True)]
    base = by_contender[[contender.name for contender in contenders].index(floor)]
    return [
        Timing(
            name=contender.name,
            seconds=seconds,
            ratio=median(own / least for own, least in zip(seconds, base, strict=True)),
            rate=contender.work / min(seconds) / 1e9,
        )
        for contender, seconds in zip(contenders, by_contender, strict=True)
    ]


def peak_bytes(call: Callable[[], object]) -> int:
    """Most resident bytes during `call` above those before, with what it returns.

    Our workspace is given back first, so that it counts. Linux only: VmHWM of this process, reset
    through `clear_refs`.
    """
    release_workspace()
    gc.collect()
    # Freed heap pages would be used again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    kept = call()
    peak = _resident("VmHWM")
    del kept
    return max(0, peak - before)


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def machine() -> str:
    """Processor, cores, how they multiply bf16, torch, threads, load and commit, on one line."""
    info = Path("/proc/cpuinfo").read_text()
    told = dict(re.findall(r"^(model name|cpu family|model|flags)\s*:\s*(.*)$", info, re.M))
    flags = told["flags"].split()
    bf16 = [name for name in ("avx512_bf16", "amx_bf16") if name in flags] or ["none"]
    return ", ".join(
        [
            f"{told['model name']} (family {told['cpu family']}, model {told['model']})",
            f"{len(os.sched_getaffinity(0))} cores",
            f"bf16 by {'+'.join(bf16)}",
            f"Python {platform.python_version()}",
            f"torch {torch.__version__}",
            f"{torch.get_num_threads()} threads",
            load(),
            f"commit {_commit()}",
        ]
    )


def load() -> str:
    """The load average of the last minute; above the number of cores somebody else is at work."""
    return f"load {os.getloadavg()[0]:.1f}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty=+changes"]
    folder = Path(__file__).parent
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    rows: Sequence[Row]
    """All with the same columns."""
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Title, table with aligned columns, notes."""
        columns = list(self.rows[0])
        cells = [columns, *([_shown(row[name]) for name in columns] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in cells
        ]
        rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
        table = [f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([f"### {self.title}", "", *table, *notes])


def _shown(value: str | float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, min(digits, 3))}f}"
