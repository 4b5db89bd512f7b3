"""Configs from TOML and the command line, and as plain values."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from rlvr_fast import options
from rlvr_fast.config.training import TrainConfig

SHIPPED = Path(__file__).parents[1] / "configs"


def load(name_or_path: str, overrides: Mapping[str, object] | None = None) -> TrainConfig:
    """A shipped config by name or a TOML file, with some fields replaced.

    Args:
        name_or_path: a file if it ends in `.toml` or has a slash, else the name of a shipped one.
        overrides: by field, or by `table.option`; values of the field's type, or text of them.

    Raises:
        FileNotFoundError: where there is no such config; the message lists the shipped ones.
        ValueError: for an unknown field, a wrong type or an impossible value.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml" and len(path.parts) == 1:
        path = SHIPPED / f"{name_or_path}.toml"
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        shipped = ", ".join(sorted(found.stem for found in SHIPPED.glob("*.toml")))
        raise FileNotFoundError(
            f"config: wanted a TOML file or one of {shipped}, got {name_or_path}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config {name_or_path}: wanted TOML, got: {error}") from None
    return from_values({"run_folder": _free_folder(path.stem)} | values, overrides or {})


def from_values(
    values: Mapping[str, object], overrides: Mapping[str, object] | None = None
) -> TrainConfig:
    """As `load`, from a dictionary such as `to_values` gives.

    Fields that neither of the two names are as the method's `settings` have them, then as
    `TrainConfig` has them.

    Raises:
        ValueError: as `load`.
    """
    merged = options.merge(TrainConfig, values, overrides or {})
    from rlvr_fast.methods import METHODS  # which imports torch and transformers

    chosen = METHODS.get(str(merged.get("method")))
    belonging = {} if chosen is None else chosen.settings
    return options.build("config field", TrainConfig, {**belonging, **merged})


def to_values(config: TrainConfig) -> dict[str, Any]:
    """Plain JSON and TOML values; `from_values` inverts it."""
    return {
        name: value.value if isinstance(value, Enum) else value
        for name, value in asdict(config).items()
    }


def changes(old: TrainConfig, new: TrainConfig) -> dict[str, str]:
    """By field, one line `field: old -> new` for every field that differs."""
    before, after = to_values(old), to_values(new)
    return {
        name: f"{name}: {before[name]} -> {after[name]}"
        for name in before
        if before[name] != after[name]
    }


def describe(config: TrainConfig) -> str:
    """One line per field."""
    values = to_values(config)
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in values.items())


def _free_folder(stem: str) -> str:
    """The first of runs/STEM-1, runs/STEM-2 ... that does not exist."""
    n = 1
    while (Path("runs") / f"{stem}-{n}").exists():
        n += 1
    return str(Path("runs") / f"{stem}-{n}")
