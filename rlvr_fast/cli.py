"""The command `rlvr-fast`: train, evaluate, prepare a model, run benches, list methods."""

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rlvr_fast import config as configs
from rlvr_fast import options
from rlvr_fast.config import EvalConfig, TrainConfig

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
"""What a command shows as one line; anything else is a bug and keeps its traceback."""

COMMANDS = {
    "train": "train NAME-or-CONFIG.toml [--field value ...]   or   train --resume RUN [...]",
    "eval": "eval MODEL --task TASK [--field value ...]",
    "model": "model NAME [--folder FOLDER]",
    "tune": "tune [--device cuda|cpu] [--minutes N] [--out FILE]",
    "bench": "bench [--out FOLDER] [--only PART] [--minutes N] [--quick]",
    "methods": "methods",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; gives the exit code: 0, or 2 for a mistake of the user's, 130 for Ctrl-C,
    141 for a reader that went away.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = given[:1] == ["--traceback"]
    run: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "model": _model,
        "tune": _tune,
        "bench": _bench,
        "methods": _methods,
    }
    command, *rest = given[debug:] or ["--help"]
    try:
        if command in ("-h", "--help"):
            return _help()
        options.check_known("command", command, run)
        with _log_on_stderr():
            return run[command](rest)
    except KeyboardInterrupt:
        _say("\nrlvr-fast: interrupted", to=sys.stderr)
        return 130
    except BrokenPipeError:
        # `| head` has read enough; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except USER_ERRORS as error:
        if debug:
            raise
        _say(f"rlvr-fast: {' '.join(str(error).split())}", to=sys.stderr)
        return 2


def _help() -> int:
    _say(f"{__doc__}\n")
    for usage in COMMANDS.values():
        _say(f"  rlvr-fast {usage}")
    _say(
        "\n`--help` after a command shows all of its options. With `rlvr-fast --traceback COMMAND`"
    )
    _say("an error shows where it comes from.")
    return 0


def _train(arguments: list[str]) -> int:
    if _wants_help(arguments):
        return _document("train", TrainConfig)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("--") else None
    given = options.parse("config field", TrainConfig, arguments, besides=["resume"])
    resume = given.pop("resume", None)
    if name is None and resume is None:
        raise ValueError("train: wanted the name of a config, a TOML file or --resume RUN")
    changed: list[str] = []
    if resume is None:
        assert name is not None
        config = configs.load(name, given)
    else:
        from rlvr_fast.trainer import resumed_config

        config, changed = resumed_config(Path(resume), name, given)
    _say(configs.describe(config))
    for line in changed:
        _say(f"changed on resume: {line}")
    try:
        from rlvr_fast.trainer import train

        _prepared(config.model)
        done = train(config, resume=resume is not None)
    except KeyboardInterrupt:
        started = (Path(config.run_folder) / "config.json").exists()
        how = f"; go on with: rlvr-fast train --resume {config.run_folder}" if started else ""
        _say(f"\nrlvr-fast: interrupted{how}", to=sys.stderr)
        return 130
    greedy = _arrow(done.reward_before, done.reward_after)
    _say(f"greedy reward on {done.evaluated_on}, before and after: {greedy}")
    sampled = _arrow(done.sampled_first, done.sampled_last)
    _say(f"mean sampled reward, first and last step: {sampled}")
    _say(f"model: {done.run_folder}/model")
    _say(f"metrics, completions, checkpoints: {done.run_folder}")
    return 0


def _eval(arguments: list[str]) -> int:
    if _wants_help(arguments):
        return _document("eval", EvalConfig)
    if not arguments or arguments[0].startswith("--"):
        raise ValueError("eval: wanted a model folder, hub id or name first")
    name, *rest = arguments
    given = options.merge(EvalConfig, {}, options.parse("option of eval", EvalConfig, rest))
    config = options.build("option of eval", EvalConfig, given)
    from rlvr_fast.evaluate import evaluate_model

    _prepared(name)
    text = json.dumps(evaluate_model(name, config), indent=2)
    if config.output:
        Path(config.output).write_text(text + "\n")
    _say(text)
    return 0


def _model(arguments: list[str]) -> int:
    parser = _Parser("rlvr-fast model", description="Writes a model as a Hugging Face folder.")
    parser.add_argument("name", help="smollm2-135m or tiny")
    parser.add_argument("--folder", type=Path, help="new or empty; default: the cache")
    chosen = parser.parse_args(arguments)
    _say(str(_prepared(chosen.name, chosen.folder)))
    return 0


def _prepared(name: str, folder: Path | None = None) -> str | Path:
    """The model's folder or hub id; writes the folder of a known name if it is not there."""
    from transformers.utils import logging

    from rlvr_fast import models

    logging.disable_progress_bar()
    try:
        return models.resolve(name) if folder is None else models.prepare(name, folder)
    except RuntimeError as error:
        raise OSError(f"model {name}: {error}") from error


def _bench(arguments: list[str]) -> int:
    benches = Path(__file__).parents[1] / "benches"
    if not (benches / "suite.py").exists():
        raise ValueError(
            f"bench: wanted the source checkout, whose benches are at {benches}, got none there"
        )
    path = os.pathsep.join([str(benches.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benches.suite", *arguments]
    return subprocess.call(command, env=os.environ | {"PYTHONPATH": path})


def _tune(arguments: list[str]) -> int:
    parser = _Parser("rlvr-fast tune", description="Measures block sizes and logits budgets.")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--minutes", type=float, default=10.0, help="to spend; default: 10")
    parser.add_argument("--out", type=Path, help="a JSON file; default: the one that is looked up")
    chosen = parser.parse_args(arguments)
    from rlvr_fast import autotune, devices, tuning

    path = chosen.out or tuning.user_file()
    tuning.load(path)  # a foreign file is no surprise after minutes
    found = autotune.tune(devices.device(chosen.device), chosen.minutes, progress=_say)
    tuning.save(found.table(), path)
    _say(f"\n{found.markdown()}\n\nwritten: {path}")
    return 0


def _methods(arguments: list[str]) -> int:
    if arguments and not _wants_help(arguments):
        raise ValueError(f"methods: wanted no arguments, got {arguments[0]}")
    from rlvr_fast.methods import METHODS

    for name, kind in METHODS.items():
        module = sys.modules[kind.__module__]
        _say(f"{name}: {module.__doc__}")
        for option, text in options.document(kind).items():
            _say(f"  --method_options.{option}: {text}")
    return 0


def _document(command: str, kind: type[Any]) -> int:
    _say(f"rlvr-fast {COMMANDS[command]}\n")
    for name, text in options.document(kind).items():
        _say(f"  --{name}\n      {text}")
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


def _wants_help(arguments: list[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


def _arrow(before: float | None, after: float | None) -> str:
    return " -> ".join("nothing" if value is None else f"{value:.3f}" for value in (before, after))


def _say(text: str, *, to: Any = None) -> None:
    """The only place that prints."""
    print(text, file=to or sys.stdout, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: {message}")


if __name__ == "__main__":
    sys.exit(main())
