"""Results on disk: tables, one JSON file that a stopped run resumes from, Markdown, plots."""

import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benches import measure

Row = Mapping[str, str | float | None]
"""One line of a table by column; None is shown as a dash."""


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    rows: Sequence[Row]
    """All with the same columns."""
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Title, table with aligned columns, notes."""
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([f"### {self.title}", "", *self._lines(), *notes])

    def _lines(self) -> list[str]:
        if not self.rows:
            return ["(nothing measured)"]
        columns = list(self.rows[0])
        cells = [columns, *([_shown(row[name]) for name in columns] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in cells
        ]
        rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
        return [f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]


def _shown(value: str | float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return str(value)
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, min(digits, 3))}f}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What one case of one part found."""

    tables: Sequence[Table] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What plots need beside the tables: T, D, V and the like."""
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """All timings by contender, one per round."""
    left_out: Sequence[str] = ()
    """Who or what was not measured, and why."""
    failed: str | None = None
    """Why a check did not pass."""


class Results:
    """`<folder>/<device>-<date>.json`, written after every case, and what is made from it."""

    def __init__(self, folder: Path, device: str, date: str) -> None:
        """Takes up an earlier run of the same day: what it found at another commit is ignored."""
        self.stem = folder / f"{measure.device_name(device)}-{date}"
        self.path = self.stem.with_name(f"{self.stem.name}.json")
        entries: dict[str, Any] = {}
        if self.path.exists():
            entries = json.loads(self.path.read_text())["entries"]
        self.data: dict[str, Any] = {
            "machine": measure.machine(device),
            "commit": measure.commit(),
            "versions": measure.versions(),
            "command": shlex.join(sys.orig_argv),
            "entries": {k: e for k, e in entries.items() if e["commit"] == measure.commit()},
        }

    @property
    def entries(self) -> dict[str, Any]:
        """By `part: case`, as in the file."""
        found: dict[str, Any] = self.data["entries"]
        return found

    def done(self, key: str) -> bool:
        """Measured, not just left out or failed."""
        entry = self.entries.get(key)
        return entry is not None and entry["failed"] is None and not entry["skipped"]

    def save(self, key: str, entry: Entry, *, skipped: bool = False) -> None:
        """Writes the file anew, so that a stopped run loses one case at most.

        Args:
            skipped: the whole case was left out; a resumed run tries it again.
        """
        self.entries[key] = {"commit": measure.commit(), "skipped": skipped} | asdict(entry)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.data, indent=1, allow_nan=True) + "\n")
        os.replace(unfinished, self.path)
        self.path.with_suffix(".md").write_text(self.markdown())

    def markdown(self) -> str:
        """Machine, failures, all tables, and what was left out."""
        told = ", ".join(f"{name} {version}" for name, version in self.data["versions"].items())
        head = [
            f"# {self.stem.name}",
            f"Machine: {self.data['machine']}; at the end {measure.load()}",
            f"Versions: {told}",
            f"Command: `{self.data['command']}`",
        ]
        failed = [f"- {key}: {e['failed']}" for key, e in self.entries.items() if e["failed"]]
        if failed:
            head.append("\n".join(["## Failed", "", *failed]))
        tables = [Table(**t).markdown() for e in self.entries.values() for t in e["tables"]]
        left = [f"- {key}: {x}" for key, e in self.entries.items() for x in e["left_out"]]
        tail = ["\n".join(["## Left out", "", *left])] if left else []
        return "\n\n".join([*head, *tables, *tail]) + "\n"

    def plots(self) -> list[Path]:
        """Draws what there is data for; matplotlib is in the bench extra."""
        from benches import plots

        return plots.draw(self.data, self.stem)
