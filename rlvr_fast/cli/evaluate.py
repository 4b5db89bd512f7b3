"""`rlvr-fast eval`: reward and pass@k of a model."""

import json
from pathlib import Path

from rlvr_fast import options
from rlvr_fast.cli.common import document, prepared, say, wants_help
from rlvr_fast.config import EvalConfig

USAGE = "eval MODEL --task TASK [--field value ...]"


def run(arguments: list[str]) -> int:
    if wants_help(arguments):
        return document(USAGE, EvalConfig)
    if not arguments or arguments[0].startswith("--"):
        raise ValueError("eval: wanted a model folder, hub id or name first")
    name, *rest = arguments
    given = options.merge(EvalConfig, {}, options.parse("option of eval", EvalConfig, rest))
    config = options.build("option of eval", EvalConfig, given)
    from rlvr_fast.evaluate import evaluate_model

    prepared(name)
    text = json.dumps(evaluate_model(name, config), indent=2)
    if config.output:
        Path(config.output).write_text(text + "\n")
    say(text)
    return 0
