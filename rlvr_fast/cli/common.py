"""What the commands share: printing, parsing, help, and a model that is there."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from rlvr_fast import options


def say(text: str, *, to: Any = None) -> None:
    """The only place that prints. Under torchrun one process talks; all of them complain."""
    if to is None and os.environ.get("RANK", "0") != "0":
        return
    print(text, file=to or sys.stdout, flush=True)


def wants_help(arguments: list[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def document(usage: str, kind: type[Any]) -> int:
    """Prints the fields of a config; the exit code."""
    say(f"rlvr-fast {usage}\n")
    for name, text in options.document(kind).items():
        say(f"  --{name}\n      {text}")
    return 0


def prepared(name: str, folder: Path | None = None) -> str | Path:
    """The model's folder or hub id; writes the folder of a known name if it is not there."""
    from transformers.utils import logging

    from rlvr_fast import models

    logging.disable_progress_bar()
    try:
        return models.resolve(name) if folder is None else models.prepare(name, folder)
    except RuntimeError as error:
        raise OSError(f"model {name}: {error}") from error


class Parser(argparse.ArgumentParser):
    """Whose mistakes are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}")
