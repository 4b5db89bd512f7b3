"""Launch options and logits budgets that were measured, by device and class of shape.

An entry comes from the user's own file (`$RLVR_FAST_TUNED`, else `~/.cache/rlvr_fast/tuned.json`;
`rlvr-fast tune` writes it), else from the files shipped in `rlvr_fast/tuned`, else it is the
default. Nothing is measured here. A process reads each file once, so results do not change under
it. Another block size or budget changes the order of sums, and with it the last bits of results.
"""

import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

Values = dict[str, int]
"""`BLOCK_V` and `num_warps` of a row kernel, or `logits_budget` in bytes."""
Table = dict[str, dict[str, Values]]
"""By device name, then by entry."""

VARIABLE = "RLVR_FAST_TUNED"
SHIPPED = Path(__file__).parent / "tuned"
KERNELS = ("statistics", "gradient", "fused")

_instead: Table | None = None


def row_launch(
    kernel: str, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, int | bool]:
    """Launch options of a kernel with one program a row, `kernel` being one of `KERNELS`.

    Raises:
        ValueError: for a file of tuned values that cannot be used.
    """
    return _row_launch(kernel, vocab_size, dtype, device, os.environ.get(VARIABLE))


def logits_budget(device: torch.device, hidden_size: int, vocab_size: int, default: int) -> int:
    """Bytes of logits alive at once for a head of `[vocab_size, hidden_size]`.

    Raises:
        ValueError: for a file of tuned values that cannot be used.
    """
    table = _entries(device, os.environ.get(VARIABLE))
    return table.get(budget_entry(hidden_size, vocab_size), {}).get("logits_budget", default)


def row_entry(kernel: str, vocab_size: int, dtype: torch.dtype) -> str:
    return f"{kernel} {str(dtype).removeprefix('torch.')} V<={_size_class(vocab_size)}"


def budget_entry(hidden_size: int, vocab_size: int) -> str:
    return f"budget D<={_size_class(hidden_size)} V<={_size_class(vocab_size)}"


def device_name(device: torch.device) -> str:
    """As its maker calls it: every machine with the same one shares its entries."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def user_file() -> Path:
    return _user_file(os.environ.get(VARIABLE))


def load(path: Path) -> Table:
    """A file of tuned values; empty if there is none.

    Raises:
        ValueError: naming the file and the entry that no tuning wrote.
    """
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: wanted JSON that `rlvr-fast tune` wrote: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: wanted entries by device name, got {table!r:.40}")
    for device, entries in table.items():
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: {device}: wanted entries by name, got {entries!r:.40}")
        for entry, values in entries.items():
            _check(f"{path}: {device}: {entry}", entry, values)
    return table


def save(table: Table, path: Path) -> None:
    """Replaces what the file says of the devices in `table`; all or nothing.

    Raises:
        ValueError: for a file that is there and is none of ours.
    """
    text = json.dumps(load(path) | table, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(text)
    new.replace(path)
    forget()


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Within, `table` stands in for every file, in all threads."""
    global _instead
    before, _instead = _instead, table
    forget()
    try:
        yield
    finally:
        _instead = before
        forget()


def forget() -> None:
    """Files are read again at the next use."""
    _row_launch.cache_clear()
    _entries.cache_clear()


@cache
def _row_launch(
    kernel: str, vocab_size: int, dtype: torch.dtype, device: torch.device, variable: str | None
) -> dict[str, int | bool]:
    from rlvr_fast.kernels.logprobs import row_launch

    assert kernel in KERNELS
    default: dict[str, int | bool] = row_launch(vocab_size)
    return default | _entries(device, variable).get(row_entry(kernel, vocab_size, dtype), {})


@cache
def _entries(device: torch.device, variable: str | None) -> dict[str, Values]:
    paths = [*sorted(SHIPPED.glob("*.json")), _user_file(variable)]
    tables = [load(path) for path in paths] if _instead is None else [_instead]
    if not any(tables):
        return {}
    name = device_name(device)
    return {entry: values for table in tables for entry, values in table.get(name, {}).items()}


def _user_file(variable: str | None) -> Path:
    return Path(variable or "~/.cache/rlvr_fast/tuned.json").expanduser()


def _size_class(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def _check(where: str, entry: str, values: Any) -> None:
    kernel, *rest = entry.split(" ")
    if kernel in KERNELS and re.fullmatch(r"(float32|bfloat16|float16) V<=\d+", " ".join(rest)):
        limits = {"BLOCK_V": (128, 65536), "num_warps": (1, 32)}
    elif re.fullmatch(r"budget D<=\d+ V<=\d+", entry):
        limits = {"logits_budget": (1, 1 << 62)}
    else:
        raise ValueError(f"{where}: wanted `KERNEL DTYPE V<=N` or `budget D<=N V<=N`")
    if not isinstance(values, dict) or values.keys() != limits.keys():
        raise ValueError(f"{where}: wanted {' and '.join(limits)}, got {values!r:.60}")
    for name, (low, high) in limits.items():
        value = values[name]
        power = name == "logits_budget" or (isinstance(value, int) and value.bit_count() == 1)
        if type(value) is not int or not low <= value <= high or not power:
            kind = "a number" if name == "logits_budget" else "a power of two"
            raise ValueError(f"{where}: {name}: wanted {kind} from {low} to {high}, got {value!r}")
