"""The command `rlvr-fast`: train, evaluate, prepare a model, run benches, list methods."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rlvr_fast import options
from rlvr_fast.cli import bench, evaluate, methods, model, plot, show, train, tune
from rlvr_fast.cli.common import say

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)
"""What a command shows as one line; anything else is a bug and keeps its traceback."""


class Command(Protocol):
    """A module of this package."""

    USAGE: str

    def run(self, arguments: list[str]) -> int:
        """The exit code."""


COMMANDS: dict[str, Command] = {
    "train": train,
    "eval": evaluate,
    "model": model,
    "tune": tune,
    "bench": bench,
    "plot": plot,
    "show": show,
    "methods": methods,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit code: 0, or 2 for a mistake of the user's, 130 for Ctrl-C,
    141 for a reader that went away.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = given[:1] == ["--traceback"]
    command, *rest = given[debug:] or ["--help"]
    try:
        if command in ("-h", "--help"):
            return _help()
        options.check_known("command", command, COMMANDS)
        with _log_on_stderr():
            return COMMANDS[command].run(rest)
    except KeyboardInterrupt:
        say("\nrlvr-fast: interrupted", to=sys.stderr)
        return 130
    except BrokenPipeError:
        # `| head` has read enough; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except USER_ERRORS as error:
        if debug:
            raise
        say(f"rlvr-fast: {' '.join(str(error).split())}", to=sys.stderr)
        return 2


def _help() -> int:
    say(f"{__doc__}\n")
    for command in COMMANDS.values():
        say(f"  rlvr-fast {command.USAGE}")
    say("\n`--help` after a command shows all of its options. With `rlvr-fast --traceback COMMAND`")
    say("an error shows where it comes from.")
    return 0


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """What takes seconds says so."""
    log, handler = logging.getLogger("rlvr_fast"), logging.StreamHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
