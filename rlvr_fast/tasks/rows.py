"""Rows of a data set: from JSON, Parquet and CSV files, folders of them, and the Hugging Face hub.

Every row knows where it came from, so that whatever is wrong with it can be found.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Row(NamedTuple):
    """What a line of a file says."""

    source: str
    """The file, or the hub's data set."""
    number: int
    """From 1: the line of a JSONL or CSV file, else the row."""
    values: Mapping[str, Any]
    """By column."""

    @property
    def place(self) -> str:
        return f"{self.source}, row {self.number}"


def read(path: str, *, name: str = "", split: str = "") -> list[Row]:
    """All rows of a file, of the files of a folder, or of a split on the hub; at least one.

    Args:
        path: a .jsonl, .json, .parquet or .csv file; a folder, whose files of these kinds are read
            in the order of their names; or else the id of a data set on the hub.
        name: of a configuration of the hub's data set; empty: its only one.
        split: of the hub's data set, empty: train. In a folder, only the files whose names start
            with it; empty: all of them. A file has none.

    Raises:
        FileNotFoundError: where there is nothing of that name.
        ValueError: for a file without rows, or whose rows cannot be read; the message says which.
        ImportError: for Parquet without pyarrow and for the hub without datasets.
    """
    place = Path(path)
    if not place.exists():
        if place.suffix in _READERS or not _HUB_ID.fullmatch(path):
            raise FileNotFoundError(f"path: wanted a file, a folder or a hub id, got {path}")
        return _checked(path, list(hub_rows(path, name, split or "train")))
    if name:
        raise ValueError(f"name: wanted none, since {path} is no data set of the hub, got {name}")
    if place.is_dir():
        return [row for file in _files(place, split) for row in _file_rows(file)]
    if split:
        raise ValueError(f"split: wanted none, since {path} is a file, got {split}")
    return _file_rows(place)


def hub_rows(path: str, name: str, split: str) -> Iterator[Row]:
    """Rows of one split of a data set that the package datasets finds."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"path: {path} is no file or folder here, and the hub needs datasets: "
            f"pip install datasets"
        ) from error
    found = datasets.load_dataset(path, name or None, split=split)
    for number, values in enumerate(found.to_list(), 1):
        yield Row(f"{path} ({split})", number, values)


def _files(folder: Path, split: str) -> list[Path]:
    known = sorted(file for file in folder.rglob("*") if file.suffix in _READERS)
    files = [file for file in known if file.name.startswith(split)]
    if not files:
        names = ", ".join(str(file.relative_to(folder)) for file in known) or "none"
        wanted = f"files {split}*, one of" if split else "at least one file of"
        raise FileNotFoundError(f"{folder}: wanted {wanted} {', '.join(_READERS)}, got {names}")
    return files


def _file_rows(file: Path) -> list[Row]:
    if file.suffix not in _READERS:
        raise ValueError(f"path: wanted a file of {', '.join(_READERS)}, got {file}")
    try:
        rows = [Row(str(file), *row) for row in _READERS[file.suffix](file)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: wanted UTF-8, got {error}") from None
    return _checked(str(file), rows)


def _checked(source: str, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ValueError(f"{source}: wanted at least one row, got none")
    return rows


_Numbered = Iterator[tuple[int, Mapping[str, Any]]]


def _jsonl(file: Path) -> _Numbered:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _object(_parsed(line, f"{file}, row {number}"), file, number)


def _json(file: Path) -> _Numbered:
    """An array of objects; or JSON lines, which often go by this name."""
    text = file.read_bytes()
    if not text.decode("utf-8-sig").lstrip().startswith("["):
        yield from _jsonl(file)
        return
    for number, value in enumerate(_parsed(text, str(file)), 1):
        yield number, _object(value, file, number)


def _parsed(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: wanted JSON, got: {error}") from None


def _object(value: Any, file: Path, number: int) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        got = type(value).__name__
        raise ValueError(f"{file}, row {number}: wanted a JSON object of columns, got {got}")
    return value


def _csv(file: Path) -> _Numbered:
    with file.open(encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text, strict=True)
        try:
            header = next(lines, [])
            if len(set(header)) < len(header):
                raise ValueError(f"{file}: wanted columns of different names, got {header}")
            number = lines.line_num + 1
            for cells in lines:
                if cells and len(cells) != len(header):
                    raise ValueError(
                        f"{file}, row {number}: wanted {len(header)} columns, got {len(cells)}"
                    )
                if cells:
                    yield number, dict(zip(header, cells, strict=True))
                number = lines.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{file}, row {lines.line_num}: wanted CSV, got: {error}") from None


def _parquet(file: Path) -> _Numbered:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"{file}: Parquet needs pyarrow: pip install pyarrow") from error
    try:
        table = parquet.read_table(file)
        if len(set(table.column_names)) < len(table.column_names):
            got = table.column_names
            raise ValueError(f"{file}: wanted columns of different names, got {got}")
        return enumerate(table.to_pylist(), 1)
    except ArrowException as error:
        raise ValueError(f"{file}: wanted Parquet, got: {error}") from None


_READERS: Mapping[str, Callable[[Path], _Numbered]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
}
