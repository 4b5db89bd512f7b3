"""`rlvr-fast train`: a run from a config, or the rest of one."""

import sys
from pathlib import Path

from rlvr_fast import config as configs
from rlvr_fast import options
from rlvr_fast.cli.common import document, prepared, say, wants_help
from rlvr_fast.config import TrainConfig

USAGE = "train NAME-or-CONFIG.toml [--field value ...]   or   train --resume RUN [...]"


def run(arguments: list[str]) -> int:
    if wants_help(arguments):
        return document(USAGE, TrainConfig)
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
        from rlvr_fast.run import resumed_config

        config, changed = resumed_config(Path(resume), name, given)
    say(configs.describe(config))
    for line in changed:
        say(f"changed on resume: {line}")
    try:
        from rlvr_fast.run import train

        prepared(config.model)
        done = train(config, resume=resume is not None)
    except KeyboardInterrupt:
        started = (Path(config.run_folder) / "config.json").exists()
        how = f"; go on with: rlvr-fast train --resume {config.run_folder}" if started else ""
        say(f"\nrlvr-fast: interrupted{how}", to=sys.stderr)
        return 130
    greedy = _arrow(done.reward_before, done.reward_after)
    say(f"greedy reward on {done.evaluated_on}, before and after: {greedy}")
    sampled = _arrow(done.sampled_first, done.sampled_last)
    say(f"mean sampled reward, first and last step: {sampled}")
    say(f"model: {done.run_folder}/model")
    say(f"metrics, completions, checkpoints: {done.run_folder}")
    return 0


def _arrow(before: float | None, after: float | None) -> str:
    return " -> ".join("nothing" if value is None else f"{value:.3f}" for value in (before, after))
